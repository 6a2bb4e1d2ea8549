// Scratch memory that outlives a call: grown once, then reused, one set of slots a thread.
#pragma once

#include <array>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace cxgrad {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  // at least `count` elements, 64-byte aligned; contents are what the last user left
  template <class T>
  T* get(int64_t count) {
    const size_t bytes = size_t(count) * sizeof(T);
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + bytes / 4 + 4095) / 4096 * 4096;
      data_ = std::aligned_alloc(4096, size_);
      if (!data_) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// what a slot holds is valid until its next use on the same thread
enum class Slot {
  kTransformedA,
  kTransformedB,
  kFactorsA,
  kFactorsB,
  kProducts,
  kWeights,
  kPartials,
  kSums,
  kRows,
  kGradient,
  kCount
};

template <class T>
inline T* scratch(Slot slot, int64_t count) {
  thread_local std::array<Scratch, size_t(Slot::kCount)> slots;
  return slots[size_t(slot)].get<T>(count);
}

}  // namespace cxgrad
