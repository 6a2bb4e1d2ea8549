// 1x1 convolutions and their gradients: products of matrices, positions by channels.
#pragma once

#include <algorithm>

#include "gemm.h"
#include "simd.h"
#include "workspace.h"

namespace cxgrad {

inline constexpr int64_t kRowsAtOnce = 48;  // a multiple of every register block's rows

// w [outputs, inputs] (turned: [inputs, outputs]) -> u [column blocks, inputs, block], surplus columns zero
template <class T>
void pack_matrix(const T* w, int64_t inputs, int64_t outputs, bool turned, T* u) {
  constexpr int W = kWidth<T>;
  const int vectors = int(round_up(outputs, W) / W);
  for (int at = 0, width; at < vectors; at += width) {
    width = block_vectors(vectors, at);
    for (int64_t ci = 0; ci < inputs; ++ci)
      for (int64_t n = 0; n < width * W; ++n) {
        const int64_t co = at * W + n;
        u[inputs * at * W + ci * width * W + n] = co < outputs ? w[turned ? ci * outputs + co : co * inputs + ci] : T(0);
      }
  }
}

template <class T>
struct MatrixSource {
  const T* x;  // [rows, channels]
  const T* u;  // packed
  int64_t channels;
};

// y [rows, outputs] = sum over sources of x w, rows `first` to `first + count` of `total`
template <class T>
void multiply_block(const MatrixSource<T>* sources, int source_count, int64_t outputs, int64_t first, int64_t count,
                    int64_t total, T* y) {
  constexpr int W = kWidth<T>;
  const int64_t out_row = round_up(outputs, W);
  const int vectors = int(out_row / W);
  T* product = scratch<T>(Slot::kProducts, (kRowsAtOnce + kMaxRows) * out_row);
  for (int64_t start = first; start < first + count; start += kRowsAtOnce) {
    const int64_t rows = std::min(kRowsAtOnce, first + count - start);
    for (int s = 0; s < source_count; ++s) {
      const auto& [x, u, channels] = sources[s];
      const T* a = x + start * channels;
      if (start + kRowsAtOnce > total) {  // surplus rows of the register block would lie behind the tensor
        T* copy = scratch<T>(Slot::kRows, (kRowsAtOnce + kMaxRows) * channels);
        std::copy(a, a + rows * channels, copy);
        a = copy;
      }
      for (int at = 0, width; at < vectors; at += width) {
        width = block_vectors(vectors, at);
        const T* b = u + channels * at * W;
        if (s == 0)
          column_block<T, false>(width, rows, a, channels, 1, b, width * W, product + at * W, out_row, channels);
        else
          column_block<T, true>(width, rows, a, channels, 1, b, width * W, product + at * W, out_row, channels);
      }
    }
    for (int64_t i = 0; i < rows; ++i)
      std::copy(product + i * out_row, product + i * out_row + outputs, y + (start + i) * outputs);
  }
}

template <class T>
inline int64_t matrix_gradient_size(int64_t inputs, int64_t outputs) {
  return round_up(inputs + kMaxRows, kMaxRows) * round_up(outputs, kWidth<T>);
}

// sum [inputs, padded outputs] (+)= x' dy over `count` rows
template <class T>
void matrix_gradient_block(const T* x, int64_t inputs, const T* dy, int64_t outputs, int64_t count, bool begin,
                           T* sum) {
  constexpr int W = kWidth<T>;
  const int64_t in_row = round_up(inputs, kMaxRows) + kMaxRows, out_row = round_up(outputs, W);
  const int vectors = int(out_row / W);
  T* a = scratch<T>(Slot::kTransformedA, kRowsAtOnce * in_row);
  T* b = scratch<T>(Slot::kTransformedB, kRowsAtOnce * out_row);
  for (int64_t start = 0; start < count; start += kRowsAtOnce) {
    const int64_t rows = std::min(kRowsAtOnce, count - start);
    for (int64_t i = 0; i < rows; ++i) {
      std::copy(x + (start + i) * inputs, x + (start + i + 1) * inputs, a + i * in_row);
      std::copy(dy + (start + i) * outputs, dy + (start + i + 1) * outputs, b + i * out_row);
      std::fill(b + i * out_row + outputs, b + (i + 1) * out_row, T(0));
    }
    for (int at = 0, width; at < vectors; at += width) {
      width = block_vectors(vectors, at);
      if (begin && start == 0)
        column_block<T, false>(width, inputs, a, 1, in_row, b + at * W, out_row, sum + at * W, out_row, rows);
      else
        column_block<T, true>(width, inputs, a, 1, in_row, b + at * W, out_row, sum + at * W, out_row, rows);
    }
  }
}

}  // namespace cxgrad
