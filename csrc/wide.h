// Either precision read as float64, a vector at a time, and sums whose order depends on nothing but the count.
#pragma once

#include <algorithm>

#include "simd.h"

namespace cxgrad {

typedef float NarrowVec __attribute__((vector_size(kVectorBytes / 2)));  // as many float32 as a vector has float64

inline Vec<double> load_wide(const double* p) { return load(p); }
inline Vec<double> load_wide(const float* p) {
  NarrowVec v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, Vec<double>);
}

// the first `count` elements; the rest is zero
template <class T>
inline Vec<double> load_wide(const T* p, int64_t count) {
  if (count >= kWidth<double>) return load_wide(p);
  Vec<double> v{};
  for (int64_t i = 0; i < count; ++i) v[i] = double(p[i]);
  return v;
}

inline void store_rounded(double* p, Vec<double> v) { store(p, v); }
inline void store_rounded(float* p, Vec<double> v) {
  const NarrowVec narrow = __builtin_convertvector(v, NarrowVec);
  std::memcpy(p, &narrow, sizeof narrow);
}

template <class T>
inline void store_rounded(T* p, Vec<double> v, int64_t count) {
  if (count >= kWidth<double>) return store_rounded(p, v);
  for (int64_t i = 0; i < count; ++i) p[i] = T(v[i]);
}

inline double sum(Vec<double> v) {
  double total = 0;
  for (int i = 0; i < kWidth<double>; ++i) total += v[i];
  return total;
}

// sum of a[i] b[i] in float64: float32 products are exact there
template <class A, class B>
inline double inner_product(const A* a, const B* b, int64_t count) {
  constexpr int64_t W = kWidth<double>;
  Vec<double> sums[4] = {};  // independent, to hide the latency of an addition
  int64_t i = 0;
  for (; i + 4 * W <= count; i += 4 * W)
    for (int k = 0; k < 4; ++k) sums[k] += load_wide(a + i + k * W) * load_wide(b + i + k * W);
  for (; i < count; i += W) sums[0] += load_wide(a + i, count - i) * load_wide(b + i, count - i);
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

}  // namespace cxgrad
