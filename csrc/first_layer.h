// The first layer in one pass over the images (MATH.md 2): its statistics are known beforehand from the patches', so
// that convolution, normalisation, activation and pooling happen in registers and nothing of the images' size but with
// all channels is ever stored. Its derivatives are sparse: products at the arg-max of each pooling window alone.
//
// One image lies padded by a border of zeros, its rows interleaved in pairs: entry (channel, row, column, 0 or 1) is
// pixel (row + 0 or 1, column). The four corners of a window under one tap of the filter are then four neighbours, in
// the order of norm.h's corners, and a permutation by the corner fetches every channel's own.
#pragma once

#include <algorithm>
#include <cstring>

#include "norm.h"
#include "rounding.h"
#include "simd.h"

namespace cxgrad {

struct FirstLayer {
  int64_t inputs, height, width, outputs;
  int64_t taps() const { return 9 * inputs; }
  int64_t columns() const { return width + 2; }                   // with the border
  int64_t row_size() const { return 2 * columns(); }              // interleaved
  int64_t plane_size() const { return (height + 1) * row_size(); }  // of one input channel
  // a vector may be read from any pixel
  template <class T>
  int64_t image_size() const {
    return inputs * plane_size() + 2 * kWidth<T> + 16;
  }
};

// pixels [inputs, H, W] in any strides -> interleaved
template <class T>
void interleave(const FirstLayer& layer, const T* image, const int64_t* strides, T* out) {
  std::memset(out, 0, size_t(layer.image_size<T>()) * sizeof(T));
  for (int64_t c = 0; c < layer.inputs; ++c)
    for (int64_t i = 0; i < layer.height; ++i) {
      const T* row = image + c * strides[0] + i * strides[1];
      // pixel row i is row i + 1 of the padded image: the second of pair i, the first of pair i + 1
      T* second = out + c * layer.plane_size() + i * layer.row_size() + 2 + 1;
      T* first = second + layer.row_size() - 1;
      for (int64_t j = 0; j < layer.width; ++j) first[2 * j] = second[2 * j] = row[j * strides[2]];
    }
}

// w [outputs, inputs, 3, 3] -> [taps, padded outputs]
template <class T>
void pack_taps(const FirstLayer& layer, const T* w, T* out) {
  const int64_t row = round_up(layer.outputs, kWidth<T>), taps = layer.taps();
  for (int64_t k = 0; k < taps; ++k)
    for (int64_t c = 0; c < row; ++c) out[k * row + c] = c < layer.outputs ? w[c * taps + k] : T(0);
}

// where the tap (input channel, row, column) of the window at pooled (i, j) starts
inline int64_t tap_offset(const FirstLayer& layer, int64_t c, int64_t row, int64_t column) {
  return c * layer.plane_size() + row * layer.row_size() + 2 * column;
}

// a row of windows, `Vectors` vectors of channels from `channel` on, `Windows` windows at a time
template <class T, int Vectors, int Windows>
inline void first_forward_row(const FirstLayer& layer, const T* image, const T* weights, int64_t weight_row,
                              const Affine<T>& affine, T slope, int64_t channel, int64_t columns, T* out, T* selected,
                              uint8_t* corners) {
  constexpr int W = kWidth<T>;
  for (int64_t j = 0; j < columns; j += Windows) {
    Vec<T> sum[Windows * 4 * Vectors];
    unrolled<Windows * 4 * Vectors>([&](auto i) CXGRAD_INLINE { sum[i] = Vec<T>{}; });
    const T* weight = weights;
    for (int64_t input = 0; input < layer.inputs; ++input)
      for (int64_t row = 0; row < 3; ++row) {
        const T* pixels = image + tap_offset(layer, input, row, 2 * j);
        unrolled<3>([&](auto column) CXGRAD_INLINE {
          Vec<T> taps[Vectors];
          unrolled<Vectors>([&](auto n) CXGRAD_INLINE { taps[n] = load(weight + n * W); });
          weight += weight_row;
          unrolled<4 * Windows>([&](auto k) CXGRAD_INLINE {
            const Vec<T> pixel = broadcast(pixels[2 * column + k]);
            unrolled<Vectors>([&](auto n) CXGRAD_INLINE { sum[k * Vectors + n] += pixel * taps[n]; });
          });
        });
      }
    unrolled<Windows>([&](auto w) CXGRAD_INLINE {
      if (j + w >= columns) return;
      const int64_t at = (j + w) * layer.outputs;
      unrolled<Vectors>([&](auto n) CXGRAD_INLINE {
        const int64_t c = channel + n * W;
        const Vec<T> mean = load(affine.mean + c), inverse = load(affine.inverse + c);
        const Vec<T> scale = load(affine.scale + c), bias = load(affine.bias + c);
        Vec<T> best_unit = (sum[4 * w * Vectors + n] - mean) * inverse, best = best_unit * scale + bias;
        Vec<Integer<T>> best_corner{};
        auto try_corner = [&](auto corner) CXGRAD_INLINE {
          const Vec<T> unit = (sum[(4 * w + corner) * Vectors + n] - mean) * inverse;
          keep_larger<T>(unit * scale + bias, unit, corner, best, best_unit, best_corner);
        };
        try_corner(std::integral_constant<int, 2>());  // row-major order decides ties
        try_corner(std::integral_constant<int, 1>());
        try_corner(std::integral_constant<int, 3>());
        store_pooled<T>(best, best_unit, best_corner, slope, at + n * W, lanes_from<T>(c, layer.outputs), out, selected,
                        corners);
      });
    });
  }
}

// one interleaved image -> out, selected, corners [H / 2, W / 2, outputs]; weights from pack_taps
template <class T>
void first_forward(const FirstLayer& layer, const T* image, const T* weights, const Affine<T>& affine, T slope, T* out,
                   T* selected, uint8_t* corners) {
  constexpr int W = kWidth<T>;
  constexpr int kMost = kRegisters == 32 ? 3 : 2, kWindows = kRegisters == 32 ? 2 : 1;
  const int64_t rows = layer.height / 2, columns = layer.width / 2, weight_row = round_up(layer.outputs, W);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t channel = 0, vectors; channel < weight_row; channel += vectors * W) {
      vectors = std::min<int64_t>(kMost, (weight_row - channel) / W);
      const T* row = image + tap_offset(layer, 0, 2 * i, 0);
      const int64_t at = i * columns * layer.outputs + channel;
      auto run = [&](auto constant) {
        first_forward_row<T, constant, kWindows>(layer, row, weights + channel, weight_row, affine, slope, channel,
                                                 columns, out + at, selected + at, corners + at);
      };
      if (vectors == 3)
        run(std::integral_constant<int, kMost>());
      else if (vectors == 2)
        run(std::integral_constant<int, 2>());
      else
        run(std::integral_constant<int, 1>());
    }
}

// of one window, every channel's value at its own corner
template <class T>
inline Vec<T> at_corners(const T* pixels, Vec<Integer<T>> corners) {
#ifndef __clang__  // which shuffles by constants alone
  if constexpr (kWidth<T> >= 4) return __builtin_shuffle(load(pixels), corners);
#endif
  const Vec<T> upper = corners == Integer<T>(0) ? broadcast(pixels[0]) : broadcast(pixels[1]);
  const Vec<T> lower = corners == Integer<T>(2) ? broadcast(pixels[2]) : broadcast(pixels[3]);
  return corners < Integer<T>(2) ? upper : lower;
}

inline constexpr int kInputsAtOnce = 3;  // their 27 sums fit the registers of AVX-512

// a row of windows: sums [9 * Inputs, ...] += patch * dz, a row in T, rows in double
template <int Dropped, class T, int Inputs, class Lanes>
inline void accumulate_taps(const FirstLayer& layer, const T* window, const T* q, const uint8_t* corners, T slope,
                            int64_t windows, Lanes lanes, double* sums, int64_t sum_row) {
  Vec<T> sum[9 * Inputs];
  unrolled<9 * Inputs>([&](auto k) CXGRAD_INLINE { sum[k] = Vec<T>{}; });
  for (int64_t j = 0; j < windows; ++j) {
    const auto code = Corners<T>::read(corners + j * layer.outputs, lanes);
    const Vec<T> dz = rounded<Dropped, T>(load(q + j * layer.outputs, lanes) * Corners<T>::factor(code, slope));
    const auto corner = Corners<T>::at(code);
    unrolled<3 * Inputs>([&](auto row) CXGRAD_INLINE {
      const T* pixels = window + tap_offset(layer, row / 3, row % 3, 2 * j);
      unrolled<3>([&](auto column) CXGRAD_INLINE {
        sum[3 * row + column] += at_corners(pixels + 2 * column, corner) * dz;
      });
    });
  }
  unrolled<9 * Inputs>([&](auto k) CXGRAD_INLINE { add_to<T>(sums + k * sum_row, sum[k]); });
}

// sum [taps, padded outputs] += the window's patch times dz = q * factor, at the arg-max: D of MATH.md 2; dz without
// its last `Dropped` bits
template <int Dropped, class T>
void first_weight_gradient(const FirstLayer& layer, const T* image, const T* q, const uint8_t* corners, T slope,
                           double* sum) {
  const int64_t rows = layer.height / 2, columns = layer.width / 2, sum_row = round_up(layer.outputs, kWidth<T>);
  for (int64_t i = 0; i < rows; ++i)
    for_channels<T>(layer.outputs, [&](int64_t c, auto lanes) {
      const int64_t at = i * columns * layer.outputs + c;
      for (int64_t input = 0; input < layer.inputs;) {
        const T* window = image + tap_offset(layer, input, 2 * i, 0);
        double* sums = sum + 9 * input * sum_row + c;
        if (kRegisters == 32 && layer.inputs - input >= kInputsAtOnce) {
          accumulate_taps<Dropped, T, kInputsAtOnce>(layer, window, q + at, corners + at, slope, columns, lanes, sums,
                                                     sum_row);
          input += kInputsAtOnce;
        } else {
          accumulate_taps<Dropped, T, 1>(layer, window, q + at, corners + at, slope, columns, lanes, sums, sum_row);
          input += 1;
        }
      }
    });
}

// [H / 2, W / 2, outputs] of conv(x, w) at the arg-max
template <class T>
void first_select(const FirstLayer& layer, const T* image, const T* weights, const uint8_t* corners, T* out) {
  const int64_t rows = layer.height / 2, columns = layer.width / 2, weight_row = round_up(layer.outputs, kWidth<T>);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j)
      for_channels<T>(layer.outputs, [&](int64_t c, auto lanes) {
        const int64_t at = (i * columns + j) * layer.outputs + c;
        const T* window = image + tap_offset(layer, 0, 2 * i, 2 * j);
        const T* weight = weights + c;
        const auto corner = Corners<T>::at(Corners<T>::read(corners + at, lanes));
        Vec<T> sum[3]{};  // one a column: sums that do not wait for each other
        for (int64_t row = 0; row < 3 * layer.inputs; ++row) {
          const T* pixels = window + tap_offset(layer, row / 3, row % 3, 0);
          unrolled<3>([&](auto column) CXGRAD_INLINE {
            sum[column] += at_corners(pixels + 2 * column, corner) * load(weight + (3 * row + column) * weight_row);
          });
        }
        store(out + at, sum[0] + sum[1] + sum[2], lanes);
      });
}

// the first layer's share of the second derivative: the gradient for q, from u at the arg-max (or none)
template <class T>
void first_second(const Plane& plane, const T* u, const T* selected, const uint8_t* corners, const Second<T>& s,
                  T slope, T* q_) {
  for (int64_t p = 0; p < plane.pooled_height() * plane.pooled_width(); ++p)
    for_channels<T>(plane.channels, [&](int64_t c, auto lanes) {
      const int64_t at = p * plane.channels + c;
      const Vec<T> factor = Corners<T>::factor(Corners<T>::read(corners + at, lanes), slope);
      const Vec<T> value = u ? load(u + at, lanes) : Vec<T>{};
      store(q_ + at, second_q(s, value, load(selected + at, lanes), c) * factor, lanes);
    });
}

}  // namespace cxgrad
