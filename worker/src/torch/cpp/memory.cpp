// Memory of CPU tensors: large blocks are kept and handed out again.
//
// A step frees what the next one asks for, in the same sizes. The usual allocator gives large blocks back to the system each time, and
// every page of them is cleared again: several percent of a step. Small blocks stay the usual allocator's.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace {

constexpr size_t kLargeBytes = size_t{1} << 20;
constexpr size_t kHugePage = size_t{2} << 20;

// Sizes with three bits of fraction: at most an eighth is wasted.
size_t rounded(size_t bytes) {
  size_t unit = kLargeBytes / 8;
  while (unit * 16 <= bytes) {
    unit *= 2;
  }
  return (bytes + unit - 1) / unit * unit;
}

class KeepingAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kLargeBytes) {
      void* small = c10::alloc_cpu(bytes);
      return {small, small, &release, c10::Device(c10::DeviceType::CPU)};
    }
    const size_t size = rounded(bytes);
    void* block = take(size);
    return {block, block, &release, c10::Device(c10::DeviceType::CPU)};
  }

  // oneDNN's scratch memory (bfloat16 products) comes and goes without a DataPtr, and so with one deleter for all sizes.
  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  struct Pool {
    std::mutex mutex;
    std::unordered_map<size_t, std::vector<void*>> free;
    std::unordered_map<void*, size_t> sizes;
  };

  // Never destroyed: tensors may outlive everything else.
  static Pool& pool() {
    static Pool* pool = new Pool;
    return *pool;
  }

  static void* take(size_t size) {
    {
      std::lock_guard<std::mutex> lock(pool().mutex);
      auto& list = pool().free[size];
      if (!list.empty()) {
        void* block = list.back();
        list.pop_back();
        return block;
      }
    }
    void* block = nullptr;
    TORCH_CHECK(posix_memalign(&block, kHugePage, size) == 0, "not enough memory: ", size, " bytes were asked for");
    madvise(block, size, MADV_HUGEPAGE);
    std::lock_guard<std::mutex> lock(pool().mutex);
    pool().sizes[block] = size;
    return block;
  }

  static void release(void* block) {
    // Every large block begins a huge page, and hardly ever a small one does.
    if (reinterpret_cast<uintptr_t>(block) % kHugePage == 0 && give(block)) {
      return;
    }
    c10::free_cpu(block);
  }

  // Whether it is a large block.
  static bool give(void* block) {
    std::lock_guard<std::mutex> lock(pool().mutex);
    const auto size = pool().sizes.find(block);
    if (size == pool().sizes.end()) {
      return false;
    }
    pool().free[size->second].push_back(block);
    return true;
  }
};

}  // namespace

extern "C" void everlit_keep_memory() {
  static KeepingAllocator allocator;
  c10::SetCPUAllocator(&allocator, /*priority=*/1);
}
