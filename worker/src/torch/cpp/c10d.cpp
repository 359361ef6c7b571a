// The C face of libtorch's c10d: a store of callbacks, a group over Gloo (and NCCL) that can be aborted, the DDP reducer; and
// AdamW, the gradients' norm and activation checkpointing, which tch does not have.
//
// Every function answers 0, or 1 with a message in everlit_error(); no C++ exception passes to Rust. Tensors come in as
// the at::Tensor* that tch holds: they are copied (one reference each), never freed. Only c10d.rs calls this file.

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <torch/csrc/distributed/c10d/comm.hpp>
#include <torch/csrc/distributed/c10d/reducer.hpp>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "cuda.h"
#include "shared.h"

std::string& everlit_last_error() {
  thread_local std::string text;
  return text;
}

namespace {

// c10d's flight recorder of collectives is one object for all groups of a process, and takes down a new group without a
// lock (FlightRecorderDetail.hpp, all_pg_status_): a process with two groups that begin at once may crash. Nobody here
// reads what it records, so it is off, from before anything can ask for it. Who sets the variable has it, with that flaw.
const int flight_recorder_off = setenv("TORCH_FR_BUFFER_SIZE", "0", /*overwrite=*/0);

std::vector<at::Tensor> tensors(void* const* pointers, size_t count) {
  std::vector<at::Tensor> list;
  list.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    list.push_back(*static_cast<const at::Tensor*>(pointers[i]));
  }
  return list;
}

}  // namespace

extern "C" {
// Answers 0, or 1 when the store failed or timed out. `got` is called with the value's bytes before the answer.
struct EverlitStore {
  void* context;
  int (*set)(void* context, const char* key, size_t key_bytes, const uint8_t* value, size_t bytes);
  int (*get)(void* context, const char* key, size_t key_bytes, int64_t timeout_ms, void* into,
             void (*got)(void* into, const uint8_t* value, size_t bytes));
  int (*check)(void* context, const char* key, size_t key_bytes);
};
}

namespace {

// Gloo and NCCL ask for set, get, check and wait; whatever else c10d knows is refused aloud.
class CallbackStore : public c10d::Store {
 public:
  CallbackStore(EverlitStore callbacks, std::chrono::milliseconds timeout) : Store(timeout), callbacks_(callbacks) {}

  c10::intrusive_ptr<c10d::Store> clone() override {
    return c10::make_intrusive<CallbackStore>(callbacks_, timeout_);
  }

  void set(const std::string& key, const std::vector<uint8_t>& value) override {
    if (callbacks_.set(callbacks_.context, key.data(), key.size(), value.data(), value.size()) != 0) {
      C10_THROW_ERROR(DistStoreError, "rendezvous: could not write " + key);
    }
  }

  std::vector<uint8_t> get(const std::string& key) override { return get_within(key, timeout_); }

  bool check(const std::vector<std::string>& keys) override {
    for (const auto& key : keys) {
      if (callbacks_.check(callbacks_.context, key.data(), key.size()) != 0) {
        return false;
      }
    }
    return true;
  }

  void wait(const std::vector<std::string>& keys) override { wait(keys, timeout_); }

  void wait(const std::vector<std::string>& keys, const std::chrono::milliseconds& timeout) override {
    for (const auto& key : keys) {
      get_within(key, timeout);
    }
  }

  int64_t add(const std::string&, int64_t) override { refuse("add"); }
  bool deleteKey(const std::string&) override { refuse("deleteKey"); }
  int64_t getNumKeys() override { refuse("getNumKeys"); }

 private:
  std::vector<uint8_t> get_within(const std::string& key, std::chrono::milliseconds timeout) {
    std::vector<uint8_t> value;
    auto got = [](void* into, const uint8_t* bytes, size_t count) {
      static_cast<std::vector<uint8_t>*>(into)->assign(bytes, bytes + count);
    };
    if (callbacks_.get(callbacks_.context, key.data(), key.size(), timeout.count(), &value, got) != 0) {
      C10_THROW_ERROR(DistStoreError, "rendezvous: no value for " + key);
    }
    return value;
  }

  [[noreturn]] static void refuse(const char* what) {
    C10_THROW_ERROR(NotImplementedError, std::string("the rendezvous store has no ") + what);
  }

  EverlitStore callbacks_;
};

// Gloo's own abort does nothing; this one does to each connection what Gloo does itself when a collective times out.
class AbortableGloo : public c10d::ProcessGroupGloo {
 public:
  using c10d::ProcessGroupGloo::ProcessGroupGloo;

  void abort() override {
    for (const auto& context : contexts_) {
      for (int peer = 0; peer < getSize(); ++peer) {
        if (peer == getRank()) {
          continue;
        }
        auto* pair = context->getPair(peer).get();
        if (pair != nullptr) {
          reinterpret_cast<gloo::transport::tcp::Pair*>(pair)->signalExceptionExternal("the group was aborted");
        }
      }
    }
  }
};

// Gloo moves what is in the machine's memory; NCCL, when it is there, what is in a GPU's, else Gloo does that too.
struct Group {
  c10::intrusive_ptr<CallbackStore> store;
  c10::intrusive_ptr<AbortableGloo> gloo;
  c10::intrusive_ptr<c10d::Backend> nccl;
  c10::intrusive_ptr<c10d::ProcessGroup> group;
  std::atomic<bool> aborted{false};

  c10d::Backend& backend(const at::Tensor& tensor) { return tensor.is_cuda() && nccl ? *nccl : *gloo; }

  // A collective of NCCL's only queues work on the GPU: what went wrong shows here, once that work was waited for.
  void check() const {
    TORCH_CHECK(!aborted, "the group was aborted");
    TORCH_CHECK(!nccl || nccl->getError() == c10d::ErrorType::SUCCESS, "NCCL: connection to a peer failed or timed out");
  }
};

// Bytes over all ranks up to which a bucket is gathered instead of reduced around the ring.
constexpr int64_t kGatherBytesMax = 1 << 20;

// For small models: every rank gathers all gradients and sums them in rank order. The ring takes several times as many
// messages one after the other, and messages are what a tiny step is made of.
class GatherHook : public c10d::CppCommHookInterface<c10::intrusive_ptr<c10d::ProcessGroup>> {
 public:
  using CppCommHookInterface::CppCommHookInterface;

  c10::intrusive_ptr<c10::ivalue::Future> runHook(c10d::GradBucket& bucket) override {
    at::Tensor own = bucket.getBufferRef();
    const int64_t size = state_->getSize();
    at::Tensor all = at::empty({size, own.numel()}, own.options());
    std::vector<std::vector<at::Tensor>> outputs = {all.unbind(0)};
    std::vector<at::Tensor> inputs = {own};
    auto work = state_->allgather(outputs, inputs);
    return work->getFuture()->then(
        [own, all, size](c10::ivalue::Future& gathered) {
          gathered.value();  // Throws what the gather threw.
          at::NoGradGuard no_grad;
          own.copy_(all[0]);
          for (int64_t rank = 1; rank < size; ++rank) {
            own.add_(all[rank]);
          }
          own.div_(size);
          return c10::IValue(std::vector<at::Tensor>{own});
        },
        c10::ListType::ofTensors());
  }
};

// Buckets that are rebuilt after the first step change the summing order, so a restart would change the bits at three
// ranks and more. These are "rebuilt" from the start: fixed, and nothing is remembered for a rebuild.
class FixedReducer : public c10d::Reducer {
 public:
  using c10d::Reducer::Reducer;

  void fix_buckets() { has_rebuilt_bucket_ = true; }

  // From when this rank's own gradients were all there until the sums were, in the last step; on a GPU, by its own clock. The wall clock of
  // the processor may jump: whoever asks must bound the answer.
  double waited() const {
    if (!timer_) {
      return 0;
    }
    const auto gap = timer_->measureDifference(c10d::Timer::Event::kBackwardComputeEnd, c10d::Timer::Event::kBackwardCommEnd);
    return static_cast<double>(gap.value_or(0)) * 1e-9;
  }
};

// A reducer whose backward pass ends with an error soon after the group was aborted, not only when all of it is computed.
struct OwnedReducer {
  OwnedReducer(const OwnedReducer&) = delete;
  OwnedReducer& operator=(const OwnedReducer&) = delete;

  OwnedReducer(const Group* group, std::vector<at::Tensor> list, std::unique_ptr<FixedReducer> own)
      : reducer(std::move(own)), parameters(std::move(list)) {
    for (const auto& parameter : parameters) {
      hooks.push_back(parameter.register_hook([group](const at::Tensor&) { group->check(); }));
    }
  }

  ~OwnedReducer() {
    for (size_t i = 0; i < hooks.size(); ++i) {
      parameters[i].remove_hook(hooks[i]);
    }
  }

  std::unique_ptr<FixedReducer> reducer;
  std::vector<at::Tensor> parameters;
  std::vector<unsigned> hooks;
};

// A layer of Rust's: run answers a new tensor that is ours, or null after a panic. The graph owns it until it is freed.
extern "C" {
struct EverlitLayer {
  void* context;
  void* (*run)(void* context, int64_t layer, const void* input);
  void (*drop)(void* context);
};
}

struct OwnedLayer : public torch::CustomClassHolder {
  OwnedLayer(EverlitLayer own, int64_t number) : layer(own), number(number) {}
  OwnedLayer(const OwnedLayer&) = delete;
  OwnedLayer& operator=(const OwnedLayer&) = delete;
  ~OwnedLayer() override { layer.drop(layer.context); }

  at::Tensor run(const at::Tensor& input) const {
    std::unique_ptr<at::Tensor> output(static_cast<at::Tensor*>(layer.run(layer.context, number, &input)));
    TORCH_CHECK(output != nullptr, "layer ", number, " failed");
    return *output;
  }

  EverlitLayer layer;
  int64_t number;
};

// Activation checkpointing: forward keeps the input alone, backward runs the layer again.
struct Recompute : public torch::autograd::Function<Recompute> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& input,
                            const c10::intrusive_ptr<OwnedLayer>& layer) {
    context->save_for_backward({input});
    context->saved_data["layer"] = c10::IValue::make_capsule(layer);
    return layer->run(input);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    auto input = context->get_saved_variables()[0].detach();
    input.set_requires_grad(true);
    const auto layer = c10::static_intrusive_pointer_cast<OwnedLayer>(context->saved_data["layer"].toCapsule());
    at::Tensor output;
    {
      c10::AutoGradMode enabled(true);
      output = layer->run(input);
    }
    torch::autograd::backward({output}, {gradients[0]});
    return {input.grad(), at::Tensor()};
  }
};

struct AdamW {
  std::vector<at::Tensor> parameters, first_moments, second_moments, steps, gradients;
  // One counter for all: `steps` holds it once per parameter, as the fused kernel wants it.
  at::Tensor step;
};

}  // namespace

extern "C" {

const char* everlit_error() { return everlit_last_error().c_str(); }

int everlit_set_threads(int intra, int inter) {
  return guarded([&] {
    at::set_num_threads(intra);
    at::set_num_interop_threads(inter);
  });
}

// The same bits on every run, also on a GPU. A fast way that can not promise that is left, or is an error.
int everlit_deterministic() {
  return guarded([&] {
    auto& context = at::globalContext();
    context.setDeterministicAlgorithms(true, /*warn_only=*/false);
    context.setDeterministicFillUninitializedMemory(false);
    context.setBenchmarkCuDNN(false);
    context.setSDPUseMemEfficient(false);
    context.setSDPUseCuDNN(false);
  });
}

int everlit_group_new(EverlitStore callbacks, int rank, int size, const char* host, int nccl, int64_t setup_ms,
                      int64_t timeout_ms, void** out) {
  return guarded([&] {
    auto own = std::make_unique<Group>();
    own->store = c10::make_intrusive<CallbackStore>(callbacks, std::chrono::milliseconds(setup_ms));
    auto options = c10d::ProcessGroupGloo::Options::create(std::chrono::milliseconds(setup_ms));
    options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForHostname(host, false));
    options->threads = 2;
    own->gloo = c10::make_intrusive<AbortableGloo>(own->store, rank, size, options);
    own->gloo->setTimeout(std::chrono::milliseconds(timeout_ms));
    own->group = c10::make_intrusive<c10d::ProcessGroup>(own->store, rank, size);
    own->group->setBackend(c10::DeviceType::CPU, c10d::ProcessGroup::BackendType::GLOO, own->gloo);
    own->group->setDefaultBackend(c10d::ProcessGroup::BackendType::GLOO);
    if (nccl != 0) {
      own->nccl = everlit_nccl(own->store, rank, size, std::chrono::milliseconds(timeout_ms));
      own->group->setBackend(c10::DeviceType::CUDA, c10d::ProcessGroup::BackendType::NCCL, own->nccl);
    } else {
      own->group->setBackend(c10::DeviceType::CUDA, c10d::ProcessGroup::BackendType::GLOO, own->gloo);
    }
    *out = own.release();
  });
}

void everlit_group_free(void* group) {
  guarded([&] {
    std::unique_ptr<Group> own(static_cast<Group*>(group));
    own->group.reset();
    own->nccl.reset();
    own->gloo.reset();
  });
}

int everlit_group_abort(void* group) {
  return guarded([&] {
    auto* own = static_cast<Group*>(group);
    own->aborted = true;
    own->gloo->abort();
    if (own->nccl) {
      own->nccl->abort();
    }
  });
}

int everlit_group_check(void* group) {
  return guarded([&] { static_cast<Group*>(group)->check(); });
}

int everlit_group_all_reduce(void* group, void* tensor) {
  return guarded([&] {
    std::vector<at::Tensor> list = tensors(&tensor, 1);
    static_cast<Group*>(group)->backend(list[0]).allreduce(list)->wait();
  });
}

// Point to point: begins to move the bytes. A tag is one tensor's on both sides.
int everlit_group_send(void* group, void* tensor, int to, int tag, void** out) {
  return guarded([&] {
    std::vector<at::Tensor> list = tensors(&tensor, 1);
    *out = new c10::intrusive_ptr<c10d::Work>(static_cast<Group*>(group)->gloo->send(list, to, tag));
  });
}

int everlit_group_receive(void* group, void* tensor, int from, int tag, void** out) {
  return guarded([&] {
    std::vector<at::Tensor> list = tensors(&tensor, 1);
    *out = new c10::intrusive_ptr<c10d::Work>(static_cast<Group*>(group)->gloo->recv(list, from, tag));
  });
}

// Blocks until the bytes are out or in; frees the work.
int everlit_work_wait(void* work) {
  return guarded([&] {
    const std::unique_ptr<c10::intrusive_ptr<c10d::Work>> own(static_cast<c10::intrusive_ptr<c10d::Work>*>(work));
    (*own)->wait();
  });
}

// `buckets[i]` is the bucket of parameter `order[i]`; buckets count up from 0 along `order`.
int everlit_reducer_new(void* group, void* const* list, size_t count, const size_t* order, const size_t* buckets,
                        void** out) {
  return guarded([&] {
    std::vector<std::vector<size_t>> indices;
    for (size_t i = 0; i < count; ++i) {
      if (buckets[i] >= indices.size()) {
        indices.emplace_back();
      }
      indices[buckets[i]].push_back(order[i]);
    }
    auto reducer = std::make_unique<FixedReducer>(
        tensors(list, count), indices, static_cast<Group*>(group)->group, std::vector<bool>(count, false),
        c10d::kDefaultBucketBytesCap, /*find_unused=*/false, /*gradient_as_bucket_view=*/true,
        std::unordered_map<size_t, std::string>{}, c10d::kDefaultFirstBucketBytes, /*skip_all_reduce_unused=*/false,
        /*use_python_reducer=*/false, std::vector<int64_t>{});
    reducer->fix_buckets();
    // Times are taken in every step, not in one of a hundred.
    reducer->set_ddp_runtime_logging_sample_rate(1);
    int64_t bytes = 0;
    for (const auto& tensor : tensors(list, count)) {
      bytes += static_cast<int64_t>(tensor.nbytes());
    }
    const auto& ranks = static_cast<Group*>(group)->group;
    // A GPU's step is not made of messages.
    const bool on_cpu = count > 0 && tensor(list[0]).is_cpu();
    if (on_cpu && bytes * ranks->getSize() <= kGatherBytesMax) {
      reducer->register_comm_hook(std::make_unique<GatherHook>(ranks));
    }
    *out = new OwnedReducer(static_cast<Group*>(group), tensors(list, count), std::move(reducer));
  });
}

void everlit_reducer_free(void* reducer) {
  guarded([&] { delete static_cast<OwnedReducer*>(reducer); });
}

int everlit_reducer_prepare(void* reducer) {
  return guarded([&] {
    auto* own = static_cast<OwnedReducer*>(reducer);
    own->reducer->prepare_for_forward();
    own->reducer->prepare_for_backward({});
  });
}

// After a backward pass: the seconds for which it waited for the others.
int everlit_reducer_waited(void* reducer, double* seconds) {
  return guarded([&] { *seconds = static_cast<OwnedReducer*>(reducer)->reducer->waited(); });
}

// Owns the layer's context from the call on, whatever the answer.
int everlit_recompute(const void* input, EverlitLayer layer, int64_t number, void** out) {
  return guarded([&] {
    const auto own = c10::make_intrusive<OwnedLayer>(layer, number);
    *out = new at::Tensor(Recompute::apply(tensor(input), own));
  });
}

int everlit_adamw_new(void* const* parameters, void* const* first, void* const* second, size_t count, void** out) {
  return guarded([&] {
    auto own = std::make_unique<AdamW>();
    own->parameters = tensors(parameters, count);
    own->first_moments = tensors(first, count);
    own->second_moments = tensors(second, count);
    const auto device = count > 0 ? own->parameters[0].device() : c10::Device(c10::kCPU);
    own->step = at::zeros({}, at::TensorOptions().dtype(at::kFloat).device(device));
    own->steps.assign(count, own->step);
    own->gradients.resize(count);
    *out = own.release();
  });
}

void everlit_adamw_free(void* optimizer) {
  guarded([&] { delete static_cast<AdamW*>(optimizer); });
}

// `step` is the number of this update, from 1. The gradients are divided by `scale` and dropped.
int everlit_adamw_step(void* optimizer, int64_t step, double rate, double beta1, double beta2, double decay, double epsilon,
                       double scale) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    auto* own = static_cast<AdamW*>(optimizer);
    for (size_t i = 0; i < own->parameters.size(); ++i) {
      own->gradients[i] = own->parameters[i].grad();
      TORCH_CHECK(own->gradients[i].defined(), "parameter ", i, " has no gradient");
    }
    own->step.fill_(step);
    std::optional<at::Tensor> divisor;
    if (scale != 1.0) {
      divisor = at::full({}, scale, own->step.options());
    }
    at::_fused_adamw_(own->parameters, own->gradients, own->first_moments, own->second_moments, {}, own->steps, rate,
                      beta1, beta2, decay, epsilon, /*amsgrad=*/false, /*maximize=*/false, divisor);
    for (size_t i = 0; i < own->parameters.size(); ++i) {
      own->gradients[i].reset();
      own->parameters[i].mutable_grad().reset();
    }
  });
}

// The norm of all gradients together; not a finite number when one of them is not.
int everlit_gradient_norm(void* const* list, size_t count, double* norm) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    std::vector<at::Tensor> gradients;
    gradients.reserve(count);
    for (size_t i = 0; i < count; ++i) {
      gradients.push_back(tensor(list[i]).grad());
      TORCH_CHECK(gradients[i].defined(), "parameter ", i, " has no gradient");
    }
    if (count > 0 && gradients[0].is_cuda()) {
      // One wait for the GPU, not one for each parameter.
      const at::Tensor norms = at::stack(at::_foreach_norm(gradients)).to(at::kDouble);
      *norm = at::linalg_vector_norm(norms).item<double>();
      return;
    }
    double squares = 0;
    for (const auto& gradient : gradients) {
      const double own = at::linalg_vector_norm(gradient).item<double>();
      squares += own * own;
    }
    *norm = std::sqrt(squares);
  });
}

// Drops the gradients themselves: tch's way detaches them in place, which views of a bucket refuse.
int everlit_drop_gradients(void* const* list, size_t count) {
  return guarded([&] {
    for (size_t i = 0; i < count; ++i) {
      static_cast<at::Tensor*>(list[i])->mutable_grad().reset();
    }
  });
}

}  // extern "C"
