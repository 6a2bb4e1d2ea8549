// C (+)= A B in registers: the inner product of every convolution here.
//
// B and C have rows of whole vectors. A is read an element at a time through two strides, so that the same code serves
// A (rows: tiles or positions, columns: channels) and its transpose (weight gradients).
#pragma once

#include "simd.h"

namespace cxgrad {

// vectors of a row of C that one register block holds, and its rows: rows * vectors accumulators, one row of B, one of A
inline constexpr int kMaxVectors = kRegisters == 32 ? 4 : 3;
constexpr int rows_for(int vectors) {
  if (kRegisters == 32) return vectors == 1 ? 16 : vectors == 2 ? 12 : vectors == 3 ? 8 : 6;
  return vectors == 1 ? 8 : vectors == 2 ? 6 : 4;
}
inline constexpr int kMaxRows = 16;

// splits a row of `vectors` vectors into register blocks: the width of the block that starts at vector `at`
inline int block_vectors(int vectors, int at) {
  const int left = vectors - at;
  if (left <= kMaxVectors) return left;
  if (left == kMaxVectors + 1) return 3 < left - 2 ? 3 : left - 2;  // 4 + 1 is worse than 3 + 2
  return vectors % 3 == 0 ? 3 : kMaxVectors;
}

template <class T, int Rows, int Vectors, bool Accumulate>
inline void register_block(const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t b_k, T* c, int64_t c_row,
                           int64_t depth) {
  constexpr int W = kWidth<T>;
  Vec<T> sum[Rows][Vectors];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int n = 0; n < Vectors; ++n) {
      if constexpr (Accumulate)
        sum[i][n] = load(c + i * c_row + n * W);
      else
        sum[i][n] = Vec<T>{};
    }
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> row[Vectors];
#pragma GCC unroll 4
    for (int n = 0; n < Vectors; ++n) row[n] = load(b + k * b_k + n * W);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const Vec<T> value = broadcast(a[i * a_row + k * a_k]);
#pragma GCC unroll 4
      for (int n = 0; n < Vectors; ++n) sum[i][n] += value * row[n];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int n = 0; n < Vectors; ++n) store(c + i * c_row + n * W, sum[i][n]);
}

// all rows of one column block: `rows` is rounded up to the register block, whose surplus rows must be readable in A
// and writable in C
template <class T, int Vectors, bool Accumulate>
inline void column_block(int64_t rows, const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t b_k, T* c,
                         int64_t c_row, int64_t depth) {
  constexpr int R = rows_for(Vectors);
  for (int64_t i = 0; i < rows; i += R)
    register_block<T, R, Vectors, Accumulate>(a + i * a_row, a_row, a_k, b, b_k, c + i * c_row, c_row, depth);
}

template <class T, bool Accumulate>
inline void column_block(int vectors, int64_t rows, const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t b_k,
                         T* c, int64_t c_row, int64_t depth) {
  switch (vectors) {
    case 1: return column_block<T, 1, Accumulate>(rows, a, a_row, a_k, b, b_k, c, c_row, depth);
    case 2: return column_block<T, 2, Accumulate>(rows, a, a_row, a_k, b, b_k, c, c_row, depth);
    case 3: return column_block<T, 3, Accumulate>(rows, a, a_row, a_k, b, b_k, c, c_row, depth);
    default: return column_block<T, kMaxVectors, Accumulate>(rows, a, a_row, a_k, b, b_k, c, c_row, depth);
  }
}

}  // namespace cxgrad
