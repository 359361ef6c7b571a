// Everything that needs CUDA's own headers: NCCL, a GPU's memory, and reading state out of it beside the step.
//
// Compiled for every build; without the feature `nccl` each function only says that there is no CUDA. Only device.rs and c10d.cpp call it.

#include "cuda.h"

#include "shared.h"

#ifdef USE_C10D_NCCL

#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/CUDAEvent.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>

#include <memory>

c10::intrusive_ptr<c10d::Backend> everlit_nccl(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size,
                                               std::chrono::milliseconds timeout) {
  auto options = c10d::ProcessGroupNCCL::Options::create();
  options->timeout = timeout;
  const auto own = c10::make_intrusive<c10d::PrefixStore>("nccl", store);
  return c10::make_intrusive<c10d::ProcessGroupNCCL>(own, rank, size, options);
}

namespace {

// Copies out of a GPU's memory on a stream of its own.
struct Reader {
  c10::cuda::CUDAStream stream = at::cuda::getStreamFromPool(/*isHighPriority=*/false);
  // What the copies wait for.
  at::cuda::CUDAEvent mark;
};

}  // namespace

extern "C" {

int everlit_cuda_select(int index) {
  return guarded([&] { c10::cuda::set_device(static_cast<c10::DeviceIndex>(index)); });
}

int everlit_cuda_memory(size_t* free, size_t* total) {
  return guarded([&] { C10_CUDA_CHECK(cudaMemGetInfo(free, total)); });
}

int everlit_cuda_name(void* into, void (*got)(void* into, const char* name)) {
  return guarded([&] { got(into, at::cuda::getCurrentDeviceProperties()->name); });
}

int everlit_cuda_reader_new(void** out) {
  return guarded([&] { *out = new Reader; });
}

void everlit_cuda_reader_free(void* reader) {
  guarded([&] { delete static_cast<Reader*>(reader); });
}

// Copies into pinned memory are several times as fast, and run beside the thread that orders them.
int everlit_cuda_pin(void* start, size_t bytes) {
  return guarded([&] { C10_CUDA_CHECK(cudaHostRegister(start, bytes, cudaHostRegisterDefault)); });
}

int everlit_cuda_unpin(void* start) {
  return guarded([&] { C10_CUDA_CHECK(cudaHostUnregister(start)); });
}

// Later reads come after whatever the calling thread has queued by now.
int everlit_cuda_reader_mark(void* reader) {
  return guarded([&] { static_cast<Reader*>(reader)->mark.record(); });
}

int everlit_cuda_reader_begin(void* reader) {
  return guarded([&] {
    auto* own = static_cast<Reader*>(reader);
    c10::cuda::set_device(own->stream.device_index());
    own->mark.block(own->stream);
  });
}

int everlit_cuda_reader_read(void* reader, const void* device, void* host, size_t bytes) {
  return guarded([&] {
    C10_CUDA_CHECK(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, static_cast<Reader*>(reader)->stream.stream()));
  });
}

int everlit_cuda_reader_wait(void* reader) {
  return guarded([&] { static_cast<Reader*>(reader)->stream.synchronize(); });
}

}  // extern "C"

#else

namespace {

[[noreturn]] void no_cuda() { TORCH_CHECK(false, "this build of everlit-worker has no CUDA"); }

}  // namespace

c10::intrusive_ptr<c10d::Backend> everlit_nccl(const c10::intrusive_ptr<c10d::Store>&, int, int, std::chrono::milliseconds) {
  no_cuda();
}

extern "C" {

int everlit_cuda_select(int) { return guarded(no_cuda); }
int everlit_cuda_memory(size_t*, size_t*) { return guarded(no_cuda); }
int everlit_cuda_name(void*, void (*)(void*, const char*)) { return guarded(no_cuda); }
int everlit_cuda_reader_new(void**) { return guarded(no_cuda); }
void everlit_cuda_reader_free(void*) {}
int everlit_cuda_pin(void*, size_t) { return guarded(no_cuda); }
int everlit_cuda_unpin(void*) { return guarded(no_cuda); }
int everlit_cuda_reader_mark(void*) { return guarded(no_cuda); }
int everlit_cuda_reader_begin(void*) { return guarded(no_cuda); }
int everlit_cuda_reader_read(void*, const void*, void*, size_t) { return guarded(no_cuda); }
int everlit_cuda_reader_wait(void*) { return guarded(no_cuda); }

}  // extern "C"

#endif
