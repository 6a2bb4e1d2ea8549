// 3x3 convolutions with padding 1 and their gradients by Winograd's F(2x2, 3x3) (Lavin and Gray 2016): 16 products
// where the direct form has 36, in float32 no less accurate (tests/test_conv_block.py compares both with float64).
//
//   Y = A' [ (G g G') . (B' d B) ] A     d: 4x4 inputs, g: 3x3 weight, Y: 2x2 outputs, '.': over channels a product of
//                                        matrices for each of the 16 frequencies
//   dg = G' [ (B' d B) . (A dY A') ] G   summed over tiles; the gradient of d is the convolution by the turned weight
//
// Images are [S, H, W, C] in memory. A tile is a 2x2 block of outputs, the window of the pooling that follows.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "gemm.h"
#include "simd.h"
#include "workspace.h"

namespace cxgrad {

inline constexpr int kFrequencies = 16;

struct Shape {
  int64_t images, height, width;
  int64_t tile_rows() const { return blocks_of(height, 2); }
  int64_t tile_columns() const { return blocks_of(width, 2); }
  int64_t tiles() const { return images * tile_rows() * tile_columns(); }
  int64_t positions() const { return images * height * width; }
};

template <class T>
constexpr int64_t padded(int64_t channels) {
  return round_up(channels, kWidth<T>);
}

// rows of tiles between frequencies are kept off multiples of 4 KiB, which would all fall into one set of the cache
template <class T>
inline int64_t frequency_stride(int64_t tiles, int64_t row) {
  return tiles * row + kWidth<T>;
}

// tiles whose transforms fit the second-level cache together; a multiple of every register block's rows
template <class T>
inline int64_t tiles_at_once(int64_t inputs, int64_t outputs) {
  const int64_t bytes = kFrequencies * (padded<T>(inputs) + padded<T>(outputs)) * int64_t(sizeof(T));
  return std::clamp<int64_t>((512 << 10) / bytes / 48 * 48, 48, 96);
}

// --- weights ---

// elements of a transformed weight
template <class T>
inline int64_t weight_size(int64_t inputs, int64_t outputs) {
  return kFrequencies * inputs * padded<T>(outputs);
}

// one vector of outputs of G g G', frequency f to `u + f * stride`; tap(i, j) gives the vector of g's entry
template <class T, class Tap>
inline void transform_weight(const Tap& tap, T* u, int64_t stride) {
  Vec<T> rows[4][3];
  const T half = T(0.5);
  for (int j = 0; j < 3; ++j) {
    const Vec<T> g0 = tap(0, j), g1 = tap(1, j), g2 = tap(2, j);
    rows[0][j] = g0;
    rows[1][j] = half * (g0 + g2 + g1);
    rows[2][j] = half * (g0 + g2 - g1);
    rows[3][j] = g2;
  }
  for (int i = 0; i < 4; ++i) {
    const Vec<T> g0 = rows[i][0], g1 = rows[i][1], g2 = rows[i][2];
    store(u + (4 * i + 0) * stride, g0);
    store(u + (4 * i + 1) * stride, half * (g0 + g2 + g1));
    store(u + (4 * i + 2) * stride, half * (g0 + g2 - g1));
    store(u + (4 * i + 3) * stride, g2);
  }
}

// w [outputs, inputs, 3, 3] -> u [16, column blocks, inputs, block]. `turned`: the weight of the input gradient, with
// channels exchanged and taps turned by 180 degrees; then w is [inputs, outputs, 3, 3].
template <class T>
void pack_weight(const T* w, int64_t inputs, int64_t outputs, bool turned, T* u) {
  constexpr int W = kWidth<T>;
  const int vectors = int(padded<T>(outputs) / W);
  const int64_t frequency = inputs * vectors * W;
  const int64_t output_step = turned ? 9 : 9 * inputs, input_step = turned ? 9 * outputs : 9;
  for (int at = 0, width; at < vectors; at += width) {
    width = block_vectors(vectors, at);
    for (int64_t ci = 0; ci < inputs; ++ci)
      for (int n = 0; n < width; ++n) {
        const int64_t co = int64_t(at + n) * W;
        const int lanes = int(std::min<int64_t>(W, outputs - co));
        Vec<T> taps[9]{};
        for (int lane = 0; lane < lanes; ++lane) {
          const T* g = w + (co + lane) * output_step + ci * input_step;
          for (int k = 0; k < 9; ++k) taps[k][lane] = g[turned ? 8 - k : k];
        }
        transform_weight<T>([&](int i, int j) { return taps[3 * i + j]; },
                            u + inputs * at * W + (ci * width + n) * W, frequency);
      }
  }
}

// --- tiles ---

struct Tile {
  int64_t image, row, column;  // of its first output
};

inline Tile tile_at(const Shape& shape, int64_t index) {
  const int64_t columns = shape.tile_columns(), rows = shape.tile_rows();
  return {index / (rows * columns), index / columns % rows * 2, index % columns * 2};
}

template <class T>
struct Transforms {
  // B' d B of 4 vectors of a row or column
  static inline void input(const Vec<T> d0, const Vec<T> d1, const Vec<T> d2, const Vec<T> d3, Vec<T>* r) {
    r[0] = d0 - d2;
    r[1] = d1 + d2;
    r[2] = d2 - d1;
    r[3] = d1 - d3;
  }
};

// B' d B of `count` tiles from `first`: v [16, tiles, padded channels]; x [S, H, W, channels]
template <class T>
void transform_input(const Shape& shape, const T* x, int64_t channels, int64_t first, int64_t count, T* v,
                     int64_t stride) {
  constexpr int W = kWidth<T>;
  const int64_t row_size = padded<T>(channels);
  const T* zeros = nullptr;
  alignas(64) static const T nothing[W] = {};
  zeros = nothing;
  for (int64_t t = 0; t < count; ++t) {
    const Tile tile = tile_at(shape, first + t);
    const T* image = x + tile.image * shape.height * shape.width * channels;
    const T* entry[16];
    bool inside[16];
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 4; ++j) {
        const int64_t row = tile.row + i - 1, column = tile.column + j - 1;
        inside[4 * i + j] = row >= 0 && row < shape.height && column >= 0 && column < shape.width;
        entry[4 * i + j] = inside[4 * i + j] ? image + (row * shape.width + column) * channels : zeros;
      }
    const bool interior = inside[0] && inside[15];
    T* out = v + t * row_size;
    for (int64_t c = 0; c < channels; c += W) {
      const int lanes = int(std::min<int64_t>(W, channels - c));
      Vec<T> d[4][4], r[4][4], s[4];
      if (interior && lanes == W) {
#pragma GCC unroll 16
        for (int k = 0; k < 16; ++k) d[k / 4][k % 4] = load(entry[k] + c);
      } else {
        for (int k = 0; k < 16; ++k) d[k / 4][k % 4] = inside[k] ? load(entry[k] + c, lanes) : Vec<T>{};
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        Transforms<T>::input(d[0][j], d[1][j], d[2][j], d[3][j], s);
        for (int i = 0; i < 4; ++i) r[i][j] = s[i];
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        Transforms<T>::input(r[i][0], r[i][1], r[i][2], r[i][3], s);
        for (int j = 0; j < 4; ++j) store(out + (4 * i + j) * stride + c, s[j]);
      }
    }
  }
}

// A dY A' of `count` tiles: z [16, tiles, padded channels]; dy [S, H, W, channels]
template <class T>
void transform_gradient(const Shape& shape, const T* dy, int64_t channels, int64_t first, int64_t count, T* z,
                        int64_t stride) {
  constexpr int W = kWidth<T>;
  const int64_t row_size = padded<T>(channels);
  for (int64_t t = 0; t < count; ++t) {
    const Tile tile = tile_at(shape, first + t);
    const T* corner = dy + ((tile.image * shape.height + tile.row) * shape.width + tile.column) * channels;
    const bool right = tile.column + 1 < shape.width, below = tile.row + 1 < shape.height;
    const int64_t down = shape.width * channels;
    T* out = z + t * row_size;
    for (int64_t c = 0; c < channels; c += W) {
      const int lanes = int(std::min<int64_t>(W, channels - c));
      const Vec<T> none{};
      const Vec<T> a = load(corner + c, lanes), b = right ? load(corner + channels + c, lanes) : none;
      const Vec<T> e = below ? load(corner + down + c, lanes) : none;
      const Vec<T> g = right && below ? load(corner + down + channels + c, lanes) : none;
      const Vec<T> rows[4][2] = {{a, b}, {a + e, b + g}, {a - e, b - g}, {-e, -g}};
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        T* p = out + 4 * i * stride + c;
        store(p, rows[i][0]);
        store(p + stride, rows[i][0] + rows[i][1]);
        store(p + 2 * stride, rows[i][0] - rows[i][1]);
        store(p + 3 * stride, -rows[i][1]);
      }
    }
  }
}

// A' m A of `count` tiles: m [16, tiles, padded channels] -> y [S, H, W, channels]
template <class T>
void transform_output(const Shape& shape, const T* m, int64_t stride, int64_t channels, int64_t first, int64_t count,
                      T* y) {
  constexpr int W = kWidth<T>;
  const int64_t row_size = padded<T>(channels);
  for (int64_t t = 0; t < count; ++t) {
    const Tile tile = tile_at(shape, first + t);
    T* corner = y + ((tile.image * shape.height + tile.row) * shape.width + tile.column) * channels;
    const bool right = tile.column + 1 < shape.width, below = tile.row + 1 < shape.height;
    const int64_t down = shape.width * channels;
    const T* in = m + t * row_size;
    for (int64_t c = 0; c < channels; c += W) {
      const int lanes = int(std::min<int64_t>(W, channels - c));
      Vec<T> r[2][4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const Vec<T> m0 = load(in + j * stride + c), m1 = load(in + (4 + j) * stride + c);
        const Vec<T> m2 = load(in + (8 + j) * stride + c), m3 = load(in + (12 + j) * stride + c);
        r[0][j] = m0 + m1 + m2;
        r[1][j] = m1 - m2 - m3;
      }
      store(corner + c, r[0][0] + r[0][1] + r[0][2], lanes);
      if (right) store(corner + channels + c, r[0][1] - r[0][2] - r[0][3], lanes);
      if (below) store(corner + down + c, r[1][0] + r[1][1] + r[1][2], lanes);
      if (right && below) store(corner + down + channels + c, r[1][1] - r[1][2] - r[1][3], lanes);
    }
  }
}

// --- the convolution of one block of tiles ---

template <class T>
struct Source {
  const T* x;  // [S, H, W, channels]
  const T* u;  // its transformed weight
  int64_t channels;
};

// y = sum over sources of conv(x, w), tiles `first` to `first + count`
template <class T>
void convolve_block(const Shape& shape, const Source<T>* sources, int source_count, int64_t outputs, int64_t first,
                    int64_t count, int64_t capacity, T* y) {
  constexpr int W = kWidth<T>;
  const int64_t out_row = padded<T>(outputs);
  const int64_t out_stride = frequency_stride<T>(capacity + kMaxRows, out_row);
  T* m = scratch<T>(Slot::kProducts, kFrequencies * out_stride);
  for (int s = 0; s < source_count; ++s) {
    const Source<T>& source = sources[s];
    const int64_t in_row = padded<T>(source.channels);
    const int64_t in_stride = frequency_stride<T>(capacity + kMaxRows, in_row);
    T* v = scratch<T>(Slot::kTransformedA, kFrequencies * in_stride);
    transform_input(shape, source.x, source.channels, first, count, v, in_stride);
    const int vectors = int(out_row / W);
    for (int f = 0; f < kFrequencies; ++f)
      for (int at = 0, width; at < vectors; at += width) {
        width = block_vectors(vectors, at);
        const T* b = source.u + f * source.channels * out_row + source.channels * at * W;
        T* c = m + f * out_stride + at * W;
        if (s == 0)
          column_block<T, false>(width, count, v + f * in_stride, in_row, 1, b, width * W, c, out_row, source.channels);
        else
          column_block<T, true>(width, count, v + f * in_stride, in_row, 1, b, width * W, c, out_row, source.channels);
      }
  }
  transform_output(shape, m, out_stride, outputs, first, count, y);
}

// --- the weight gradient ---

// elements of a sum in the transformed space, rows rounded up to a register block
template <class T>
inline int64_t gradient_size(int64_t inputs, int64_t outputs) {
  return kFrequencies * round_up(inputs + kMaxRows, kMaxRows) * padded<T>(outputs);
}

// sum [16, inputs, padded outputs] (+)= (B' d B)' (A dY A') over the tiles `first` to `first + count`
template <class T>
void weight_gradient_block(const Shape& shape, const T* x, int64_t inputs, const T* dy, int64_t outputs, int64_t first,
                           int64_t count, int64_t capacity, bool accumulate, T* sum) {
  constexpr int W = kWidth<T>;
  const int64_t in_row = padded<T>(inputs), out_row = padded<T>(outputs);
  const int64_t in_stride = frequency_stride<T>(capacity + kMaxRows, in_row);
  const int64_t out_stride = frequency_stride<T>(capacity + kMaxRows, out_row);
  T* v = scratch<T>(Slot::kTransformedA, kFrequencies * in_stride);
  T* z = scratch<T>(Slot::kTransformedB, kFrequencies * out_stride);
  transform_input(shape, x, inputs, first, count, v, in_stride);
  transform_gradient(shape, dy, outputs, first, count, z, out_stride);
  const int vectors = int(out_row / W);
  const int64_t frequency = gradient_size<T>(inputs, outputs) / kFrequencies;
  for (int f = 0; f < kFrequencies; ++f)
    for (int at = 0, width; at < vectors; at += width) {
      width = block_vectors(vectors, at);
      T* c = sum + f * frequency + at * W;
      if (accumulate)
        column_block<T, true>(width, inputs, v + f * in_stride, 1, in_row, z + f * out_stride + at * W, out_row, c,
                              out_row, count);
      else
        column_block<T, false>(width, inputs, v + f * in_stride, 1, in_row, z + f * out_stride + at * W, out_row, c,
                               out_row, count);
    }
}

// dw [outputs, inputs, 3, 3] = G' sum G, of the input channels `first` to `last`
template <class T>
void unpack_gradient(const T* sum, int64_t inputs, int64_t outputs, int64_t first, int64_t last, T* dw) {
  constexpr int W = kWidth<T>;
  const int64_t out_row = padded<T>(outputs);
  const int64_t frequency = gradient_size<T>(inputs, outputs) / kFrequencies;
  const T half = T(0.5);
  for (int64_t ci = first; ci < last; ++ci)
    for (int64_t co = 0; co < outputs; co += W) {
      Vec<T> r[3][4], g[9];
      const T* in = sum + ci * out_row + co;
      for (int j = 0; j < 4; ++j) {
        const Vec<T> m0 = load(in + j * frequency), m1 = load(in + (4 + j) * frequency);
        const Vec<T> m2 = load(in + (8 + j) * frequency), m3 = load(in + (12 + j) * frequency);
        r[0][j] = m0 + half * (m1 + m2);
        r[1][j] = half * (m1 - m2);
        r[2][j] = half * (m1 + m2) + m3;
      }
      for (int i = 0; i < 3; ++i) {
        g[3 * i] = r[i][0] + half * (r[i][1] + r[i][2]);
        g[3 * i + 1] = half * (r[i][1] - r[i][2]);
        g[3 * i + 2] = half * (r[i][1] + r[i][2]) + r[i][3];
      }
      const int lanes = int(std::min<int64_t>(W, outputs - co));
      for (int lane = 0; lane < lanes; ++lane)
        for (int k = 0; k < 9; ++k) dw[((co + lane) * inputs + ci) * 9 + k] = g[k][lane];
    }
}

}  // namespace cxgrad
