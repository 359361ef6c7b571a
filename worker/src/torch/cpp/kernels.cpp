// Parts of a transformer layer as one pass over memory each: RMS norm, the split into turned heads, SwiGLU. Float32 on a CPU.
//
// libtorch builds them from five to ten passes each, and a small model on a CPU spends half its time in those. The sums
// have one order whatever the number of threads. Each is an autograd function with its own backward. Only kernels.rs calls this.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "shared.h"
#include "vectors.h"

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// Rows per task, and per partial sum of a weight's gradient: fixed, so that the order of summing is.
constexpr int64_t kRows = 64;

EVERLIT_CLONES void norm_rows(const float* __restrict x, const float* __restrict w, float* __restrict y, float* __restrict scales, int64_t rows, int64_t dim, float epsilon) {
  for (int64_t row = 0; row < rows; ++row) {
    const float* __restrict in = x + row * dim;
    float* __restrict out = y + row * dim;
    // Sixteen sums side by side: one order, and a vector's width.
    float sums[16] = {0};
    int64_t i = 0;
    for (; i + 16 <= dim; i += 16) {
      for (int lane = 0; lane < 16; ++lane) {
        sums[lane] += in[i + lane] * in[i + lane];
      }
    }
    float sum = 0;
    for (; i < dim; ++i) {
      sum += in[i] * in[i];
    }
    for (int lane = 0; lane < 16; ++lane) {
      sum += sums[lane];
    }
    const float scale = 1.0f / std::sqrt(sum / static_cast<float>(dim) + epsilon);
    scales[row] = scale;
    for (int64_t j = 0; j < dim; ++j) {
      out[j] = in[j] * scale * w[j];
    }
  }
}

EVERLIT_CLONES void norm_rows_back(const float* __restrict g, const float* __restrict x, const float* __restrict w, const float* __restrict scales, float* __restrict dx, float* __restrict dw,
                                   int64_t rows, int64_t dim) {
  for (int64_t row = 0; row < rows; ++row) {
    const float* __restrict gradient = g + row * dim;
    const float* __restrict in = x + row * dim;
    float* __restrict out = dx + row * dim;
    const float scale = scales[row];
    float sums[16] = {0};
    int64_t i = 0;
    for (; i + 16 <= dim; i += 16) {
      for (int lane = 0; lane < 16; ++lane) {
        sums[lane] += gradient[i + lane] * w[i + lane] * in[i + lane];
      }
    }
    float sum = 0;
    for (; i < dim; ++i) {
      sum += gradient[i] * w[i] * in[i];
    }
    for (int lane = 0; lane < 16; ++lane) {
      sum += sums[lane];
    }
    const float pull = sum * scale * scale * scale / static_cast<float>(dim);
    for (int64_t j = 0; j < dim; ++j) {
      out[j] = gradient[j] * w[j] * scale - in[j] * pull;
      dw[j] += gradient[j] * in[j] * scale;
    }
  }
}

// Adds `parts` rows of `dim` in order.
EVERLIT_CLONES void add_parts(const float* __restrict parts, float* __restrict sum, int64_t count, int64_t dim) {
  for (int64_t part = 0; part < count; ++part) {
    for (int64_t j = 0; j < dim; ++j) {
      sum[j] += parts[part * dim + j];
    }
  }
}

EVERLIT_CLONES void swiglu_rows(const float* __restrict both, float* __restrict y, int64_t rows, int64_t hidden) {
  for (int64_t row = 0; row < rows; ++row) {
    const float* __restrict gate = both + row * 2 * hidden;
    const float* __restrict up = gate + hidden;
    float* __restrict out = y + row * hidden;
    for (int64_t j = 0; j < hidden; ++j) {
      out[j] = gate[j] / (1.0f + exponential(-gate[j])) * up[j];
    }
  }
}

EVERLIT_CLONES void swiglu_rows_back(const float* __restrict g, const float* __restrict both, float* __restrict dboth, int64_t rows, int64_t hidden) {
  for (int64_t row = 0; row < rows; ++row) {
    const float* __restrict gradient = g + row * hidden;
    const float* __restrict gate = both + row * 2 * hidden;
    const float* __restrict up = gate + hidden;
    float* __restrict dgate = dboth + row * 2 * hidden;
    float* __restrict dup = dgate + hidden;
    for (int64_t j = 0; j < hidden; ++j) {
      const float share = 1.0f / (1.0f + exponential(-gate[j]));
      dup[j] = gradient[j] * gate[j] * share;
      dgate[j] = gradient[j] * up[j] * share * (1.0f + gate[j] * (1.0f - share));
    }
  }
}

int64_t blocks(int64_t rows) { return (rows + kRows - 1) / kRows; }

// Runs body(block, first row, rows) over fixed blocks of rows.
template <typename Body>
void over_blocks(int64_t rows, Body body) {
  at::parallel_for(0, blocks(rows), 1, [&](int64_t from, int64_t to) {
    for (int64_t block = from; block < to; ++block) {
      const int64_t first = block * kRows;
      body(block, first, std::min(kRows, rows - first));
    }
  });
}

struct RmsNorm : public Function<RmsNorm> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& input, const at::Tensor& weight, double epsilon) {
    const at::Tensor x = input.contiguous();
    const int64_t dim = x.size(-1), rows = x.numel() / dim;
    at::Tensor y = at::empty_like(x);
    at::Tensor scales = at::empty({rows}, x.options());
    const float *from = x.const_data_ptr<float>(), *w = weight.const_data_ptr<float>();
    float *to = y.mutable_data_ptr<float>(), *s = scales.mutable_data_ptr<float>();
    over_blocks(rows, [&](int64_t, int64_t first, int64_t count) {
      norm_rows(from + first * dim, w, to + first * dim, s + first, count, dim, static_cast<float>(epsilon));
    });
    context->save_for_backward({x, weight, scales});
    return y;
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const auto saved = context->get_saved_variables();
    const at::Tensor &x = saved[0], &weight = saved[1], &scales = saved[2];
    const at::Tensor gradient = gradients[0].contiguous();
    const int64_t dim = x.size(-1), rows = x.numel() / dim;
    at::Tensor dx = at::empty_like(x), dw = at::zeros_like(weight);
    at::Tensor parts = at::zeros({blocks(rows), dim}, x.options());
    const float *g = gradient.const_data_ptr<float>(), *from = x.const_data_ptr<float>();
    const float *w = weight.const_data_ptr<float>(), *s = scales.const_data_ptr<float>();
    float *to = dx.mutable_data_ptr<float>(), *p = parts.mutable_data_ptr<float>();
    over_blocks(rows, [&](int64_t block, int64_t first, int64_t count) {
      norm_rows_back(g + first * dim, from + first * dim, w, s + first, to + first * dim, p + block * dim, count, dim);
    });
    add_parts(p, dw.mutable_data_ptr<float>(), blocks(rows), dim);
    return {dx, dw, at::Tensor()};
  }
};

struct SwiGlu : public Function<SwiGlu> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& input) {
    const at::Tensor both = input.contiguous();
    const int64_t hidden = both.size(-1) / 2, rows = both.numel() / (2 * hidden);
    auto shape = both.sizes().vec();
    shape.back() = hidden;
    at::Tensor y = at::empty(shape, both.options());
    const float* from = both.const_data_ptr<float>();
    float* to = y.mutable_data_ptr<float>();
    over_blocks(rows, [&](int64_t, int64_t first, int64_t count) {
      swiglu_rows(from + first * 2 * hidden, to + first * hidden, count, hidden);
    });
    context->save_for_backward({both});
    return y;
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const at::Tensor both = context->get_saved_variables()[0];
    const at::Tensor gradient = gradients[0].contiguous();
    const int64_t hidden = both.size(-1) / 2, rows = both.numel() / (2 * hidden);
    at::Tensor dboth = at::empty_like(both);
    const float *g = gradient.const_data_ptr<float>(), *from = both.const_data_ptr<float>();
    float* to = dboth.mutable_data_ptr<float>();
    over_blocks(rows, [&](int64_t, int64_t first, int64_t count) {
      swiglu_rows_back(g + first * hidden, from + first * 2 * hidden, to + first * 2 * hidden, count, hidden);
    });
    return {dboth};
  }
};

// [samples, positions, (heads + 2 kv_heads) * head] into turned queries and keys, and values: [samples, heads, positions, head].
struct Heads : public Function<Heads> {
  static variable_list forward(AutogradContext* context, const at::Tensor& input, const at::Tensor& cos, const at::Tensor& sin,
                               int64_t heads, int64_t kv_heads) {
    const at::Tensor joined = input.contiguous();
    const int64_t samples = joined.size(0), length = joined.size(1), width = joined.size(2);
    const int64_t head = width / (heads + 2 * kv_heads);
    // Positions outside heads: the layout that attention reads without copying.
    const auto make = [&](int64_t count) { return at::empty({samples, length, count, head}, joined.options()); };
    at::Tensor q = make(heads), k = make(kv_heads), v = make(kv_heads);
    const float *from = joined.const_data_ptr<float>(), *c = cos.const_data_ptr<float>(), *s = sin.const_data_ptr<float>();
    float *to_q = q.mutable_data_ptr<float>(), *to_k = k.mutable_data_ptr<float>(), *to_v = v.mutable_data_ptr<float>();
    over_blocks(samples * length, [&](int64_t, int64_t first, int64_t count) {
      for (int64_t row = first; row < first + count; ++row) {
        const float* in = from + row * width;
        const float *angle_c = c + row % length * head, *angle_s = s + row % length * head + head / 2;
        for (int64_t h = 0; h < heads; ++h, in += head) {
          turn(in, to_q + (row * heads + h) * head, angle_c, angle_s, head / 2);
        }
        for (int64_t h = 0; h < kv_heads; ++h, in += head) {
          turn(in, to_k + (row * kv_heads + h) * head, angle_c, angle_s, head / 2);
        }
        std::memcpy(to_v + row * kv_heads * head, in, sizeof(float) * kv_heads * head);
      }
    });
    context->save_for_backward({cos, sin});
    context->saved_data["heads"] = heads;
    context->saved_data["kv_heads"] = kv_heads;
    return {q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)};
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const auto saved = context->get_saved_variables();
    const int64_t heads = context->saved_data["heads"].toInt(), kv_heads = context->saved_data["kv_heads"].toInt();
    const at::Tensor dq = gradients[0].transpose(1, 2).contiguous(), dk = gradients[1].transpose(1, 2).contiguous();
    const at::Tensor dv = gradients[2].transpose(1, 2).contiguous();
    const int64_t samples = dq.size(0), length = dq.size(1), head = dq.size(3);
    const int64_t width = (heads + 2 * kv_heads) * head;
    at::Tensor dinput = at::empty({samples, length, width}, dq.options());
    const float *c = saved[0].const_data_ptr<float>(), *s = saved[1].const_data_ptr<float>();
    const float *from_q = dq.const_data_ptr<float>(), *from_k = dk.const_data_ptr<float>(), *from_v = dv.const_data_ptr<float>();
    float* to = dinput.mutable_data_ptr<float>();
    over_blocks(samples * length, [&](int64_t, int64_t first, int64_t count) {
      for (int64_t row = first; row < first + count; ++row) {
        float* out = to + row * width;
        const float *angle_c = c + row % length * head, *angle_s = s + row % length * head + head / 2;
        for (int64_t h = 0; h < heads; ++h, out += head) {
          turn_back(from_q + (row * heads + h) * head, out, angle_c, angle_s, head / 2);
        }
        for (int64_t h = 0; h < kv_heads; ++h, out += head) {
          turn_back(from_k + (row * kv_heads + h) * head, out, angle_c, angle_s, head / 2);
        }
        std::memcpy(out, from_v + row * kv_heads * head, sizeof(float) * kv_heads * head);
      }
    });
    return {dinput, at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

extern "C" {

int everlit_rms_norm(const void* x, const void* weight, double epsilon, void** out) {
  return guarded([&] { *out = new at::Tensor(RmsNorm::apply(tensor(x), tensor(weight), epsilon)); });
}

int everlit_swiglu(const void* both, void** out) {
  return guarded([&] { *out = new at::Tensor(SwiGlu::apply(tensor(both))); });
}

int everlit_heads(const void* joined, const void* cos, const void* sin, int64_t heads, int64_t kv_heads, void** out) {
  return guarded([&] {
    auto parts = Heads::apply(tensor(joined), tensor(cos), tensor(sin), heads, kv_heads);
    for (int i = 0; i < 3; ++i) {
      out[i] = new at::Tensor(parts[i]);
    }
  });
}

}  // extern "C"
