// Causal attention with rotary positions and grouped queries, from the joined projection to the mixed values, in one autograd function.
//
// For many short heads on a CPU: products of a few rows with a head's transposed keys stay in registers and the first cache, the upper
// triangle is not computed, and neither turned queries nor scores are kept for the backward pass (which needs one number a row). One task
// per sample and key head, each summing in one order: the bits do not depend on the number of threads. Only kernels.rs calls this.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
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

// Rows that are worked on together, and columns that a row of scores is padded to.
constexpr int64_t kRows = 8;
constexpr int64_t kColumns = 64;

// c[4][columns] = factor * a[4][depth] * bt[depth][columns]; columns is a multiple of 64.
EVERLIT_CLONES void four_by_columns(const float* __restrict a, int64_t lda, const float* __restrict bt, int64_t ldb, int64_t depth,
                                    float factor, float* __restrict c, int64_t ldc, int64_t columns) {
  for (int64_t j = 0; j < columns; j += kColumns) {
    Vector s00{}, s01{}, s02{}, s03{}, s10{}, s11{}, s12{}, s13{}, s20{}, s21{}, s22{}, s23{}, s30{}, s31{}, s32{}, s33{};
    for (int64_t d = 0; d < depth; ++d) {
      const float* b = bt + d * ldb + j;
      const Vector b0 = load(b), b1 = load(b + 16), b2 = load(b + 32), b3 = load(b + 48);
      const float x0 = a[d], x1 = a[lda + d], x2 = a[2 * lda + d], x3 = a[3 * lda + d];
      s00 += x0 * b0, s01 += x0 * b1, s02 += x0 * b2, s03 += x0 * b3;
      s10 += x1 * b0, s11 += x1 * b1, s12 += x1 * b2, s13 += x1 * b3;
      s20 += x2 * b0, s21 += x2 * b1, s22 += x2 * b2, s23 += x2 * b3;
      s30 += x3 * b0, s31 += x3 * b1, s32 += x3 * b2, s33 += x3 * b3;
    }
    float *c0 = c + j, *c1 = c0 + ldc, *c2 = c1 + ldc, *c3 = c2 + ldc;
    store(c0, factor * s00), store(c0 + 16, factor * s01), store(c0 + 32, factor * s02), store(c0 + 48, factor * s03);
    store(c1, factor * s10), store(c1 + 16, factor * s11), store(c1 + 32, factor * s12), store(c1 + 48, factor * s13);
    store(c2, factor * s20), store(c2 + 16, factor * s21), store(c2 + 32, factor * s22), store(c2 + 48, factor * s23);
    store(c3, factor * s30), store(c3 + 16, factor * s31), store(c3 + 32, factor * s32), store(c3 + 48, factor * s33);
  }
}

// out[8][32 of a head] = p[8][count] * v[count][32].
EVERLIT_CLONES void eight_times(const float* __restrict p, int64_t ldp, int64_t count, const float* __restrict v, int64_t ldv,
                                float* __restrict out, int64_t ldo) {
  Vector o00{}, o01{}, o10{}, o11{}, o20{}, o21{}, o30{}, o31{}, o40{}, o41{}, o50{}, o51{}, o60{}, o61{}, o70{}, o71{};
  for (int64_t j = 0; j < count; ++j) {
    const Vector v0 = load(v + j * ldv), v1 = load(v + j * ldv + 16);
    const float* x = p + j;
    o00 += x[0] * v0, o01 += x[0] * v1;
    o10 += x[ldp] * v0, o11 += x[ldp] * v1;
    o20 += x[2 * ldp] * v0, o21 += x[2 * ldp] * v1;
    o30 += x[3 * ldp] * v0, o31 += x[3 * ldp] * v1;
    o40 += x[4 * ldp] * v0, o41 += x[4 * ldp] * v1;
    o50 += x[5 * ldp] * v0, o51 += x[5 * ldp] * v1;
    o60 += x[6 * ldp] * v0, o61 += x[6 * ldp] * v1;
    o70 += x[7 * ldp] * v0, o71 += x[7 * ldp] * v1;
  }
  store(out, o00), store(out + 16, o01);
  store(out + ldo, o10), store(out + ldo + 16, o11);
  store(out + 2 * ldo, o20), store(out + 2 * ldo + 16, o21);
  store(out + 3 * ldo, o30), store(out + 3 * ldo + 16, o31);
  store(out + 4 * ldo, o40), store(out + 4 * ldo + 16, o41);
  store(out + 5 * ldo, o50), store(out + 5 * ldo + 16, o51);
  store(out + 6 * ldo, o60), store(out + 6 * ldo + 16, o61);
  store(out + 7 * ldo, o70), store(out + 7 * ldo + 16, o71);
}

// sum[count][32 of a head] += s[8][count] transposed * rows[8][32].
EVERLIT_CLONES void add_outer(const float* __restrict s, int64_t lds, int64_t count, const float* __restrict rows, int64_t ldr,
                              float* __restrict sum, int64_t ldsum) {
  Vector r[kRows][2];
  for (int64_t row = 0; row < kRows; ++row) {
    r[row][0] = load(rows + row * ldr);
    r[row][1] = load(rows + row * ldr + 16);
  }
  for (int64_t j = 0; j < count; ++j) {
    float* to = sum + j * ldsum;
    const float* x = s + j;
    Vector k0 = load(to), k1 = load(to + 16);
    k0 += x[0] * r[0][0], k1 += x[0] * r[0][1];
    k0 += x[lds] * r[1][0], k1 += x[lds] * r[1][1];
    k0 += x[2 * lds] * r[2][0], k1 += x[2 * lds] * r[2][1];
    k0 += x[3 * lds] * r[3][0], k1 += x[3 * lds] * r[3][1];
    k0 += x[4 * lds] * r[4][0], k1 += x[4 * lds] * r[4][1];
    k0 += x[5 * lds] * r[5][0], k1 += x[5 * lds] * r[5][1];
    k0 += x[6 * lds] * r[6][0], k1 += x[6 * lds] * r[6][1];
    k0 += x[7 * lds] * r[7][0], k1 += x[7 * lds] * r[7][1];
    store(to, k0), store(to + 16, k1);
  }
}

// e^(x - most) in place over the first `seen` of `columns`, zero behind; answers the sum.
EVERLIT_CLONES float soften(float* __restrict x, int64_t seen, int64_t columns, float* most_out) {
  float highest[16];
  for (int lane = 0; lane < 16; ++lane) {
    highest[lane] = x[0];
  }
  int64_t i = 0;
  for (; i + 16 <= seen; i += 16) {
    for (int lane = 0; lane < 16; ++lane) {
      highest[lane] = x[i + lane] > highest[lane] ? x[i + lane] : highest[lane];
    }
  }
  float most = x[0];
  for (; i < seen; ++i) {
    most = x[i] > most ? x[i] : most;
  }
  for (int lane = 0; lane < 16; ++lane) {
    most = highest[lane] > most ? highest[lane] : most;
  }
  for (int64_t j = 0; j < columns; ++j) {
    x[j] = j < seen ? exponential(x[j] - most) : 0.0f;
  }
  float sums[16] = {0};
  for (int64_t j = 0; j < columns; j += 16) {
    for (int lane = 0; lane < 16; ++lane) {
      sums[lane] += x[j + lane];
    }
  }
  float sum = 0;
  for (int lane = 0; lane < 16; ++lane) {
    sum += sums[lane];
  }
  *most_out = most;
  return sum;
}

// p = e^(p - level) over the first `seen`, zero behind; ds = p * (dp - pull) * factor, in dp's place.
EVERLIT_CLONES void pull_back(float* __restrict p, float* __restrict dp, int64_t seen, int64_t columns, float level, float pull,
                              float factor) {
  for (int64_t j = 0; j < columns; ++j) {
    const float share = j < seen ? exponential(p[j] - level) : 0.0f;
    p[j] = share;
    dp[j] = share * (dp[j] - pull) * factor;
  }
}

EVERLIT_CLONES void divide(float* __restrict x, float by, int64_t count) {
  const float factor = 1.0f / by;
  for (int64_t i = 0; i < count; ++i) {
    x[i] *= factor;
  }
}

EVERLIT_CLONES float dot(const float* __restrict a, const float* __restrict b, int64_t count) {
  float sums[16] = {0};
  for (int64_t i = 0; i < count; i += 16) {
    for (int lane = 0; lane < 16; ++lane) {
      sums[lane] += a[i + lane] * b[i + lane];
    }
  }
  float sum = 0;
  for (int lane = 0; lane < 16; ++lane) {
    sum += sums[lane];
  }
  return sum;
}

EVERLIT_CLONES void transpose(const float* __restrict from, int64_t rows, int64_t columns, int64_t ld_from, float* __restrict to, int64_t ld_to) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      to[column * ld_to + row] = from[row * ld_from + column];
    }
  }
}

struct Shape {
  int64_t samples, length, heads, kv_heads, head, width, padded;
  float factor;

  Shape(const at::Tensor& joined, int64_t heads, int64_t kv_heads)
      : samples(joined.size(0)), length(joined.size(1)), heads(heads), kv_heads(kv_heads), head(joined.size(2) / (heads + 2 * kv_heads)),
        width(joined.size(2)), padded((length + kColumns - 1) / kColumns * kColumns),
        factor(1.0f / std::sqrt(static_cast<float>(head))) {}

  // Columns that the rows from `row` on see, padded.
  int64_t columns(int64_t row) const {
    const int64_t seen = std::min(length, row + kRows);
    return (seen + kColumns - 1) / kColumns * kColumns;
  }
};

// What a task works in, kept by its thread.
struct Scratch {
  std::vector<float> memory;

  float* of(size_t floats) {
    if (memory.size() < floats) {
      memory.resize(floats);
    }
    std::fill(memory.begin(), memory.begin() + static_cast<int64_t>(floats), 0.0f);
    return memory.data();
  }
};

thread_local Scratch scratch;

// The turned keys of one sample and key head, as they are and transposed.
EVERLIT_CLONES void turned_keys(const Shape& shape, const float* keys, const float* cos, const float* sin, float* plain, float* transposed) {
  for (int64_t t = 0; t < shape.length; ++t) {
    turn(keys + t * shape.width, plain + t * shape.head, cos + t * shape.head, sin + t * shape.head + shape.head / 2, shape.head / 2);
  }
  transpose(plain, shape.length, shape.head, shape.head, transposed, shape.padded);
}

// The gradients of `count` turned heads, turned back; strides in floats.
EVERLIT_CLONES void turned_back(const float* from, int64_t ld_from, float* to, int64_t ld_to, const float* cos, const float* sin,
                                int64_t head, int64_t count) {
  for (int64_t t = 0; t < count; ++t) {
    turn_back(from + t * ld_from, to + t * ld_to, cos + t * head, sin + t * head + head / 2, head / 2);
  }
}

// Turned queries of up to eight rows; rows behind the end stay zero.
EVERLIT_CLONES int64_t turned_queries(const Shape& shape, const float* queries, int64_t row, const float* cos, const float* sin, float* block) {
  const int64_t count = std::min(kRows, shape.length - row);
  std::memset(block, 0, sizeof(float) * static_cast<size_t>(kRows * shape.head));
  for (int64_t r = 0; r < count; ++r) {
    const int64_t t = row + r;
    turn(queries + t * shape.width, block + r * shape.head, cos + t * shape.head, sin + t * shape.head + shape.head / 2, shape.head / 2);
  }
  return count;
}

void scores(const Shape& shape, const float* block, const float* transposed, float factor, float* s, int64_t columns) {
  four_by_columns(block, shape.head, transposed, shape.padded, shape.head, factor, s, shape.padded, columns);
  four_by_columns(block + 4 * shape.head, shape.head, transposed, shape.padded, shape.head, factor, s + 4 * shape.padded, shape.padded,
                  columns);
}

void attend(const Shape& shape, int64_t sample, int64_t kv, const float* joined, const float* cos, const float* sin, float* out,
            float* levels) {
  const int64_t head = shape.head, group = shape.heads / shape.kv_heads;
  float* memory = scratch.of(static_cast<size_t>(shape.length * head + head * shape.padded + kRows * shape.padded + 2 * kRows * head));
  float* keys = memory;
  float* transposed = keys + shape.length * head;
  float* s = transposed + head * shape.padded;
  float* block = s + kRows * shape.padded;
  float* mixed = block + kRows * head;
  const float* base = joined + sample * shape.length * shape.width;
  const float* values = base + (shape.heads + shape.kv_heads + kv) * head;
  turned_keys(shape, base + (shape.heads + kv) * head, cos, sin, keys, transposed);
  for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
    for (int64_t row = 0; row < shape.length; row += kRows) {
      const int64_t count = turned_queries(shape, base + h * head, row, cos, sin, block);
      const int64_t columns = shape.columns(row);
      scores(shape, block, transposed, shape.factor, s, columns);
      float sums[kRows];
      for (int64_t r = 0; r < kRows; ++r) {
        float most = 0;
        sums[r] = soften(s + r * shape.padded, std::min(row + r + 1, shape.length), columns, &most);
        if (r < count) {
          levels[(sample * shape.heads + h) * shape.length + row + r] = most + std::log(sums[r]);
        }
      }
      for (int64_t d = 0; d < head; d += 32) {
        eight_times(s, shape.padded, std::min(shape.length, row + kRows), values + d, shape.width, mixed + d, head);
      }
      for (int64_t r = 0; r < count; ++r) {
        float* to = out + ((sample * shape.length + row + r) * shape.heads + h) * head;
        std::memcpy(to, mixed + r * head, sizeof(float) * static_cast<size_t>(head));
        divide(to, sums[r], head);
      }
    }
  }
}

void attend_back(const Shape& shape, int64_t sample, int64_t kv, const float* joined, const float* cos, const float* sin, const float* out,
                 const float* levels, const float* gradient, float* dinput) {
  const int64_t head = shape.head, group = shape.heads / shape.kv_heads, plane = shape.length * head, wide = head * shape.padded;
  float* memory = scratch.of(static_cast<size_t>(3 * plane + 2 * wide + 2 * kRows * shape.padded + 3 * kRows * head));
  float *keys = memory, *dkeys = keys + plane, *dvalues = dkeys + plane;
  float *keys_t = dvalues + plane, *values_t = keys_t + wide;
  float *p = values_t + wide, *ds = p + kRows * shape.padded;
  float *block = ds + kRows * shape.padded, *dout = block + kRows * head, *dblock = dout + kRows * head;
  const float* base = joined + sample * shape.length * shape.width;
  float* dbase = dinput + sample * shape.length * shape.width;
  turned_keys(shape, base + (shape.heads + kv) * head, cos, sin, keys, keys_t);
  transpose(base + (shape.heads + shape.kv_heads + kv) * head, shape.length, head, shape.width, values_t, shape.padded);
  for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
    for (int64_t row = 0; row < shape.length; row += kRows) {
      const int64_t count = turned_queries(shape, base + h * head, row, cos, sin, block);
      const int64_t columns = shape.columns(row), seen = std::min(shape.length, row + kRows);
      std::memset(dout, 0, sizeof(float) * static_cast<size_t>(kRows * head));
      for (int64_t r = 0; r < count; ++r) {
        std::memcpy(dout + r * head, gradient + ((sample * shape.length + row + r) * shape.heads + h) * head,
                    sizeof(float) * static_cast<size_t>(head));
      }
      scores(shape, block, keys_t, shape.factor, p, columns);
      scores(shape, dout, values_t, 1.0f, ds, columns);
      for (int64_t r = 0; r < kRows; ++r) {
        const bool real = r < count;
        const int64_t at = (sample * shape.length + row + r) * shape.heads + h;
        const float pull = real ? dot(dout + r * head, out + at * head, head) : 0.0f;
        const float level = real ? levels[(sample * shape.heads + h) * shape.length + row + r] : 0.0f;
        pull_back(p + r * shape.padded, ds + r * shape.padded, real ? row + r + 1 : 0, columns, level, pull, shape.factor);
      }
      for (int64_t d = 0; d < head; d += 32) {
        eight_times(ds, shape.padded, seen, keys + d, head, dblock + d, head);
        add_outer(ds, shape.padded, seen, block + d, head, dkeys + d, head);
        add_outer(p, shape.padded, seen, dout + d, head, dvalues + d, head);
      }
      turned_back(dblock, head, dbase + row * shape.width + h * head, shape.width, cos + row * head, sin + row * head, head, count);
    }
  }
  float* dkv = dbase + (shape.heads + kv) * head;
  turned_back(dkeys, head, dkv, shape.width, cos, sin, head, shape.length);
  for (int64_t t = 0; t < shape.length; ++t) {
    std::memcpy(dkv + t * shape.width + shape.kv_heads * head, dvalues + t * head, sizeof(float) * static_cast<size_t>(head));
  }
}

struct Attention : public Function<Attention> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& input, const at::Tensor& cos, const at::Tensor& sin,
                            int64_t heads, int64_t kv_heads) {
    const at::Tensor joined = input.contiguous();
    const Shape shape(joined, heads, kv_heads);
    TORCH_CHECK(shape.head % 32 == 0, "heads of ", shape.head, " features: must be a multiple of 32");
    at::Tensor out = at::empty({shape.samples, shape.length, heads * shape.head}, joined.options());
    at::Tensor levels = at::empty({shape.samples, heads, shape.length}, joined.options());
    const float *from = joined.const_data_ptr<float>(), *c = cos.const_data_ptr<float>(), *s = sin.const_data_ptr<float>();
    float *to = out.mutable_data_ptr<float>(), *l = levels.mutable_data_ptr<float>();
    at::parallel_for(0, shape.samples * kv_heads, 1, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        attend(shape, task / kv_heads, task % kv_heads, from, c, s, to, l);
      }
    });
    context->save_for_backward({joined, cos, sin, out, levels});
    context->saved_data["heads"] = heads;
    context->saved_data["kv_heads"] = kv_heads;
    return out;
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const auto saved = context->get_saved_variables();
    const int64_t heads = context->saved_data["heads"].toInt(), kv_heads = context->saved_data["kv_heads"].toInt();
    const at::Tensor& joined = saved[0];
    const Shape shape(joined, heads, kv_heads);
    const at::Tensor gradient = gradients[0].contiguous();
    at::Tensor dinput = at::empty_like(joined);
    const float *from = joined.const_data_ptr<float>(), *c = saved[1].const_data_ptr<float>(), *s = saved[2].const_data_ptr<float>();
    const float *out = saved[3].const_data_ptr<float>(), *levels = saved[4].const_data_ptr<float>();
    const float* g = gradient.const_data_ptr<float>();
    float* to = dinput.mutable_data_ptr<float>();
    at::parallel_for(0, shape.samples * kv_heads, 1, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        attend_back(shape, task / kv_heads, task % kv_heads, from, c, s, out, levels, g, to);
      }
    });
    return {dinput, at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

extern "C" int everlit_attention(const void* joined, const void* cos, const void* sin, int64_t heads, int64_t kv_heads, void** out) {
  return guarded([&] { *out = new at::Tensor(Attention::apply(tensor(joined), tensor(cos), tensor(sin), heads, kv_heads)); });
}
