// Vectors of the widest register that the build's target has, by GCC's and clang's vector extensions: one source for
// AVX-512, AVX2 and SSE2 (the compiler fuses a * b + c where the target can).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace cxgrad {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
inline constexpr int kVectorBytes = 64;
inline constexpr int kRegisters = 32;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
inline constexpr int kRegisters = 16;
#else
inline constexpr int kVectorBytes = 16;
inline constexpr int kRegisters = 16;
#endif

// 32- or 64-bit whole numbers, as wide as the floating-point type they select
template <class T>
struct IntegerOf;
template <>
struct IntegerOf<float> {
  using type = int32_t;
};
template <>
struct IntegerOf<double> {
  using type = int64_t;
};
template <class T>
using Integer = typename IntegerOf<T>::type;

template <class T>
inline constexpr int kWidth = kVectorBytes / int(sizeof(T));  // elements of a vector

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VecOf<int32_t> {
  typedef int32_t type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VecOf<uint32_t> {
  typedef uint32_t type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VecOf<int64_t> {
  typedef int64_t type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VecOf<T>::type;

template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
inline void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}

// the first `count` elements of a vector; the rest is zero
template <class T>
inline Vec<T> load(const T* p, int count) {
  if (count >= kWidth<T>) return load(p);
  Vec<T> v{};
  std::memcpy(&v, p, size_t(count) * sizeof(T));
  return v;
}

template <class T>
inline void store(T* p, Vec<T> v, int count) {
  if (count >= kWidth<T>) return store(p, v);
  std::memcpy(p, &v, size_t(count) * sizeof(T));
}

template <class T>
inline Vec<T> broadcast(T s) {
  return s - Vec<T>{};
}

// f(0), f(1), ... f(N - 1), each with a constant: arrays indexed by it stay in registers, which loops do not promise
template <class F, int... I>
inline __attribute__((always_inline)) void unrolled(std::integer_sequence<int, I...>, const F& f) {
  (f(std::integral_constant<int, I>()), ...);
}
template <int N, class F>
inline __attribute__((always_inline)) void unrolled(const F& f) {
  unrolled(std::make_integer_sequence<int, N>(), f);
}
#define CXGRAD_INLINE __attribute__((always_inline))

// element i is number lane(i) of `first` and `second` in a row; `lane` is a constant function
template <class F, int... I>
inline Vec<int32_t> shuffled(std::integer_sequence<int, I...>, Vec<int32_t> first, Vec<int32_t> second, F lane) {
#ifdef __clang__
  return __builtin_shufflevector(first, second, lane(I)...);
#else
  return __builtin_shuffle(first, second, Vec<int32_t>{lane(I)...});
#endif
}
template <class F>
inline Vec<int32_t> shuffled(Vec<int32_t> first, Vec<int32_t> second, F lane) {
  return shuffled(std::make_integer_sequence<int, kWidth<int32_t>>(), first, second, lane);
}

inline constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
inline constexpr int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

}  // namespace cxgrad
