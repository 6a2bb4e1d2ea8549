// Products of float32 values in fewer digits: both factors are rounded to the nearest value, sums stay float32. What
// tensor cores and tile registers are given, for any machine (kernels/conv_block/convolution.py is the same in Triton).
#pragma once

#include <algorithm>

#include "simd.h"

namespace cxgrad {

enum class Precision { kFloat32, kTf32, kBfloat16 };

// the last bits of a float32 that a factor does without; float64 is never rounded
template <class T>
inline int dropped_bits(Precision precision) {
  if (!std::is_same_v<T, float> || precision == Precision::kFloat32) return 0;
  return precision == Precision::kTf32 ? 13 : 16;
}

template <int Dropped, class T>
inline Vec<T> rounded(Vec<T> value) {
  if constexpr (Dropped == 0 || !std::is_same_v<T, float>) {
    return value;
  } else {
    Vec<uint32_t> bits;
    std::memcpy(&bits, &value, sizeof bits);
    // TF32: ties away from zero, as cvt.rna has it; bfloat16: to even
    bits += Dropped == 16 ? ((bits >> Dropped) & 1u) + 0x7fffu : Vec<uint32_t>{} + (1u << (Dropped - 1));
    bits &= -(1u << Dropped);
    Vec<T> out;
    std::memcpy(&out, &bits, sizeof out);
    return value == value ? out : value;  // the sum would carry a NaN into the sign
  }
}

// calls f with the number of bits to drop as a constant
template <class T, class F>
inline void with_dropped_bits(Precision precision, const F& f) {
  switch (dropped_bits<T>(precision)) {
    case 0: return f(std::integral_constant<int, 0>());
    case 13: return f(std::integral_constant<int, 13>());
    default: return f(std::integral_constant<int, 16>());
  }
}

// `in` and `out` may be the same
template <class T>
void round_values(Precision precision, const T* in, int64_t count, T* out) {
  constexpr int W = kWidth<T>;
  with_dropped_bits<T>(precision, [&](auto dropped) {
    for (int64_t i = 0; i < count; i += W) {
      const int lanes = int(std::min<int64_t>(W, count - i));
      store(out + i, rounded<dropped, T>(load(in + i, lanes)), lanes);
    }
  });
}

}  // namespace cxgrad
