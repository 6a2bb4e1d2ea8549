#include "buffers.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

namespace cxgrad {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kSmall = 64 << 10;  // below, the system's allocator reuses memory well by itself

class Pool {
 public:
  void* take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      used_ += bytes;
      peak_ = std::max(peak_, used_);
      auto found = free_.find(bytes);
      if (found != free_.end() && !found->second.empty()) {
        void* block = found->second.back();
        found->second.pop_back();
        kept_ -= bytes;
        return block;
      }
    }
    void* block = std::aligned_alloc(kPage, bytes);
    if (!block) {
      release();
      block = std::aligned_alloc(kPage, bytes);
    }
    if (!block) throw std::bad_alloc();
    fresh_ += bytes;
    return block;
  }

  void give(void* block, size_t bytes) {
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      used_ -= bytes;
      // what was needed at once is enough to keep: a step asks for the same sizes as the last
      if (used_ + kept_ + bytes <= peak_) {
        free_[bytes].push_back(block);
        kept_ += bytes;
        return;
      }
    }
    std::free(block);
  }

  int64_t release() {
    const std::lock_guard<std::mutex> guard(mutex_);
    for (auto& [bytes, blocks] : free_) {
      for (void* block : blocks) std::free(block);
      blocks.clear();
    }
    const size_t released = kept_;
    kept_ = 0;
    peak_ = used_;
    return int64_t(released);
  }

  int64_t fresh() const { return int64_t(fresh_); }

 private:
  std::mutex mutex_;
  std::atomic<size_t> fresh_{0};  // taken from the system since the start
  std::unordered_map<size_t, std::vector<void*>> free_;
  size_t used_ = 0, kept_ = 0, peak_ = 0;
};

// never destroyed: tensors may outlive every static object
Pool& pool() {
  static Pool* const instance = new Pool;
  return *instance;
}

bool poisoned = false;

}  // namespace

at::Tensor empty_buffer(at::IntArrayRef sizes, const at::TensorOptions& options) {
  int64_t count = 1;
  for (const int64_t size : sizes) count *= size;
  size_t bytes = size_t(count) * options.dtype().itemsize();
  at::Tensor tensor;
  if (bytes < kSmall) {
    tensor = at::empty(sizes, options);
  } else {
    const size_t whole = (bytes + kPage - 1) / kPage * kPage;
    void* block = pool().take(whole);
    tensor = at::from_blob(block, sizes, [whole](void* data) { pool().give(data, whole); }, options);
  }
  if (poisoned && bytes) std::memset(tensor.data_ptr(), 0xFF, bytes);
  return tensor;
}

at::Tensor empty_images(int64_t tasks, int64_t images, int64_t channels, int64_t height, int64_t width,
                        const at::TensorOptions& options) {
  return empty_buffer({tasks, images, height, width, channels}, options).permute({0, 1, 4, 2, 3});
}

int64_t release_buffers() { return pool().release(); }

int64_t fresh_buffer_bytes() { return pool().fresh(); }

void poison_buffers(bool on) { poisoned = on; }

}  // namespace cxgrad
