#include "buffers.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <set>

namespace cxgrad {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kHuge = size_t(2) << 20;
constexpr size_t kSmall = 64 << 10;  // below, the system's allocator reuses memory well by itself

// One range of addresses, whose used part ends at `top_`. Free ranges are joined with their neighbours and the smallest
// that is large enough is cut: the phases of a step ask for different sizes, and lists of blocks by size kept 1.45 of
// ResNet-12's peak. Pages come with their first touch and stay until they are released.
class Arena {
 public:
  Arena() {
    const size_t memory = size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGESIZE));
    size_ = (memory + kHuge - 1) / kHuge * kHuge;
    void* range = mmap(nullptr, size_ + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (range == MAP_FAILED) {  // the system limits addresses, or promises no more than it has
      size_ = 0;
      return;
    }
    start_ = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(range) + kHuge - 1) / kHuge * kHuge);
#ifdef MADV_HUGEPAGE
    madvise(start_, size_, MADV_HUGEPAGE);
#endif
  }

  // nullptr where it is full
  void* take(size_t bytes) {
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto best = by_size_.lower_bound({bytes, 0});
    if (best != by_size_.end()) {
      const size_t at = best->second;
      const Range range = remove(at);
      if (range.size > bytes) add(at + bytes, {range.size - bytes, range.touched});
      return start_ + at;
    }
    // the range behind the last block grows, from a free one at its end
    const size_t at = end_of_use();
    if (bytes > size_ - at) return nullptr;
    if (at < top_) remove(at);
    fresh_ += at + bytes - top_;
    top_ = at + bytes;
    return start_ + at;
  }

  void give(void* block, size_t bytes) {
    const std::lock_guard<std::mutex> guard(mutex_);
    size_t at = size_t(static_cast<char*>(block) - start_);
    Range range{bytes, true};
    if (const auto next = free_.find(at + bytes); next != free_.end()) range.size += remove(next->first).size;
    if (const auto next = free_.lower_bound(at); next != free_.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second.size == at) {
        at = before->first;
        range.size += remove(at).size;
      }
    }
    add(at, range);
  }

  bool owns(const void* block) const { return block >= start_ && block < start_ + size_; }

  size_t release() {
    const std::lock_guard<std::mutex> guard(mutex_);
    size_t released = 0;
    for (auto& [at, range] : free_) {
      if (!range.touched) continue;
      madvise(start_ + at, range.size, MADV_DONTNEED);
      released += range.size;
      range.touched = false;
    }
    const size_t end = end_of_use();
    if (end < top_) remove(end);
    top_ = end;
    return released;
  }

  size_t fresh() const { return fresh_; }

 private:
  struct Range {
    size_t size;
    bool touched;  // since it was released
  };

  void add(size_t at, Range range) {
    free_.emplace(at, range);
    by_size_.emplace(range.size, at);
  }

  Range remove(size_t at) {
    const auto found = free_.find(at);
    const Range range = found->second;
    by_size_.erase({range.size, at});
    free_.erase(found);
    return range;
  }

  // where the free range before `top_` starts; `top_` if there is none
  size_t end_of_use() const {
    if (free_.empty()) return top_;
    const auto last = std::prev(free_.end());
    return last->first + last->second.size == top_ ? last->first : top_;
  }

  std::mutex mutex_;
  char* start_ = nullptr;
  size_t size_ = 0, top_ = 0;
  std::atomic<size_t> fresh_{0};
  std::map<size_t, Range> free_;                 // by offset
  std::set<std::pair<size_t, size_t>> by_size_;  // (size, offset)
};

// never destroyed: tensors may outlive every static object
Arena& arena() {
  static Arena* const instance = new Arena;
  return *instance;
}

void* take(size_t bytes) {
#ifndef __SANITIZE_ADDRESS__  // which sees what runs over its own blocks
  if (void* block = arena().take(bytes)) return block;
#endif
  void* block = std::aligned_alloc(kPage, bytes);
  if (!block) throw std::bad_alloc();
  return block;
}

void give(void* block, size_t bytes) {
  if (arena().owns(block))
    arena().give(block, bytes);
  else
    std::free(block);
}

bool poisoned = false;

}  // namespace

at::Tensor empty_buffer(at::IntArrayRef sizes, const at::TensorOptions& options) {
  int64_t count = 1;
  for (const int64_t size : sizes) count *= size;
  const size_t bytes = size_t(count) * options.dtype().itemsize();
  at::Tensor tensor;
  if (bytes < kSmall) {
    tensor = at::empty(sizes, options);
  } else {
    const size_t whole = (bytes + kPage - 1) / kPage * kPage;
    void* block = take(whole);
    tensor = at::from_blob(block, sizes, [whole](void* data) { give(data, whole); }, options);
  }
  if (poisoned && bytes) std::memset(tensor.data_ptr(), 0xFF, bytes);
  return tensor;
}

int64_t release_buffers() { return int64_t(arena().release()); }

int64_t fresh_buffer_bytes() { return int64_t(arena().fresh()); }

void poison_buffers(bool on) { poisoned = on; }

}  // namespace cxgrad
