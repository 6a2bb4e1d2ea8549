// The convolutions of convolution.h as products of bfloat16 matrices on tile registers, without im2col.
//
// The images lie in a strip of positions, one behind the other, a column of zeros behind every row and a row of zeros
// behind every image: pixel (r, c) of image i is position (i (H + 1) + r) (W + 1) + c, so that a tap of the filter is a
// distance between positions, the same for all (1x1: without the zeros).
//
//   convolution      the factors of a position, one row of the filter: 3 Cin values that lie together. 16 positions by
//                    16 channels a tile; what comes out between the images is not read.
//   weight gradient  positions are what is summed: x' [Cin, positions], shifted by a tap, times dy [positions, Cout]
#pragma once

#include <algorithm>
#include <cstring>

#include "rounding.h"
#include "simd.h"
#include "tiles.h"
#include "workspace.h"

namespace cxgrad {

struct Strip {
  int64_t images, height, width, kernel;
  int64_t pad() const { return kernel / 2; }
  int64_t pitch() const { return width + pad(); }
  int64_t image() const { return (height + pad()) * pitch(); }
  int64_t positions() const { return images * image(); }
  int64_t margin() const { return pad() * (pitch() + 1); }  // zeros before the first position and behind the last
  int64_t row_tiles() const { return blocks_of(positions(), 16); }
  int64_t steps() const { return blocks_of(positions(), 32); }
};

inline int64_t tile_columns(int64_t channels) { return round_up(channels, 16); }

// --- bfloat16 values ---

// the 32 bits of float32 values rounded to bfloat16, whose last 16 are zero
inline Vec<int32_t> bfloat16_bits(Vec<float> value) {
  const Vec<float> out = rounded<16, float>(value);
  Vec<int32_t> bits;
  std::memcpy(&bits, &out, sizeof bits);
  return bits | ((value != value) & (1 << 22));  // a NaN may have no other bit among the first 16
}

inline void to_bfloat16(const float* in, int64_t count, uint16_t* out) {
  typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
  constexpr int W = kWidth<float>;
  for (int64_t i = 0; i < count; i += W) {
    const int lanes = int(std::min<int64_t>(W, count - i));
    const Halves halves = __builtin_convertvector((bfloat16_bits(load(in + i, lanes)) >> 16) & 0xffff, Halves);
    if (lanes == W)
      std::memcpy(out + i, &halves, sizeof halves);
    else
      std::memcpy(out + i, &halves, size_t(lanes) * sizeof(uint16_t));
  }
}

// x [images, H, W, channels] as a strip of rows of channels, from its margin on; returns position 0
inline const uint16_t* pack_strip(const Strip& strip, const float* x, int64_t channels) {
  // surplus positions of the last tiles, and what a step reads behind a filter's row, are zero too
  const int64_t behind = strip.margin() + 32, size = (strip.margin() + strip.positions() + behind) * channels + 32;
  uint16_t* out = scratch<uint16_t>(Slot::kFactorsA, size);
  auto clear = [&](uint16_t* from, const uint16_t* to) { std::memset(from, 0, size_t(to - from) * sizeof(uint16_t)); };
  uint16_t* first = out + strip.margin() * channels;
  uint16_t* at = first;
  clear(out, at);
  const int64_t row = strip.width * channels, gap = strip.pad() * channels;
  for (int64_t i = 0; i < strip.images; ++i) {
    for (int64_t r = 0; r < strip.height; ++r, at += row + gap, x += row) {
      to_bfloat16(x, row, at);
      clear(at + row, at + row + gap);
    }
    clear(at, at + strip.pad() * strip.pitch() * channels);
    at += strip.pad() * strip.pitch() * channels;
  }
  clear(at, out + size);
  return first;
}

// pairs of the strip's positions, `lead` before the first (an even number) and `count` in all, a row of
// tile_columns(channels) for two positions
inline void pack_pairs(const Strip& strip, const float* x, int64_t channels, int64_t lead, int64_t count,
                       uint32_t* out) {
  constexpr int W = kWidth<float>;
  const int64_t columns = tile_columns(channels);
  int64_t image = 0, row = 0, column = 0;
  auto next = [&]() -> const float* {  // of the next position, null where it is zero
    const bool inside = image < strip.images && row < strip.height && column < strip.width;
    const float* from = inside ? x + ((image * strip.height + row) * strip.width + column) * channels : nullptr;
    if (++column == strip.pitch()) {
      column = 0;
      if (++row == strip.height + strip.pad()) {
        row = 0;
        ++image;
      }
    }
    return from;
  };
  std::memset(out, 0, size_t(lead / 2 * columns) * sizeof(uint32_t));
  out += lead / 2 * columns;
  for (int64_t position = lead; position < count; position += 2, out += columns) {
    const float* even = next();
    const float* odd = next();
    for (int64_t c = 0; c < columns; c += W) {
      const int lanes = int(std::clamp<int64_t>(channels - c, 0, W));
      const Vec<int32_t> low = even ? bfloat16_bits(load(even + c, lanes)) : Vec<int32_t>{};
      const Vec<int32_t> high = odd ? bfloat16_bits(load(odd + c, lanes)) : Vec<int32_t>{};
      const Vec<int32_t> pair = high | ((low >> 16) & 0xffff);
      std::memcpy(out + c, &pair, sizeof pair);
    }
  }
}

// a square block of 32-bit values, rows every `in_row` and `out_row`, turned over
inline void transpose_block(const uint32_t* in, int64_t in_row, uint32_t* out, int64_t out_row) {
  constexpr int W = kWidth<int32_t>;
  Vec<int32_t> rows[W];
  unrolled<W>([&](auto i) CXGRAD_INLINE { std::memcpy(&rows[i], in + i * in_row, sizeof rows[i]); });
  // exchange the off-diagonal halves of blocks of 2, 4, ... rows
  auto exchange = [&](auto step) CXGRAD_INLINE {
    constexpr int kStep = step;
    constexpr auto above = [](int lane) { return lane & kStep ? W + lane - kStep : lane; };
    constexpr auto below = [](int lane) { return lane & kStep ? W + lane : lane + kStep; };
    unrolled<W>([&](auto i) CXGRAD_INLINE {
      if constexpr ((i & kStep) == 0 && i + kStep < W) {
        const Vec<int32_t> first = rows[i], second = rows[i + step];
        rows[i] = shuffled(first, second, above);
        rows[i + step] = shuffled(first, second, below);
      }
    });
  };
  exchange(std::integral_constant<int, 1>());
  exchange(std::integral_constant<int, 2>());
  if constexpr (W > 4) exchange(std::integral_constant<int, 4>());
  if constexpr (W > 8) exchange(std::integral_constant<int, 8>());
  unrolled<W>([&](auto i) CXGRAD_INLINE { std::memcpy(out + i * out_row, &rows[i], sizeof rows[i]); });
}

// --- convolution ---

// 32-bit values of a packed weight
inline int64_t tile_weight_size(int64_t kernel, int64_t inputs, int64_t outputs) {
  return kernel * blocks_of(kernel * inputs, 32) * 16 * tile_columns(outputs);
}

// w [outputs, inputs, k, k] -> pairs of [row of the filter, column of the filter and input, outputs]; `turned` as in
// winograd.h: then w is [inputs, outputs, k, k]
inline void pack_tile_weight(const float* w, int64_t kernel, int64_t inputs, int64_t outputs, bool turned,
                             uint32_t* out) {
  const int64_t taps = kernel * kernel, columns = tile_columns(outputs), rows = blocks_of(kernel * inputs, 32) * 16;
  std::memset(out, 0, size_t(tile_weight_size(kernel, inputs, outputs)) * sizeof(uint32_t));
  uint16_t* digits = scratch<uint16_t>(Slot::kFactorsA, taps * inputs * outputs);
  to_bfloat16(w, taps * inputs * outputs, digits);
  uint16_t* halves = reinterpret_cast<uint16_t*>(out);
  const int64_t output_step = turned ? taps : taps * inputs, input_step = turned ? taps * outputs : taps;
  for (int64_t k = 0; k < taps; ++k)
    for (int64_t ci = 0; ci < inputs; ++ci) {
      const int64_t product = k % kernel * inputs + ci;
      const uint16_t* from = digits + ci * input_step + (turned ? taps - 1 - k : k);
      uint16_t* to = halves + (k / kernel * rows + product / 2) * columns * 2 + product % 2;
      for (int64_t co = 0; co < outputs; ++co) to[2 * co] = from[co * output_step];
    }
}

// c [positions, tile_columns(outputs)] (+)= conv(x, w), x [images, H, W, inputs]
inline void convolve_tiles(const Strip& strip, const float* x, int64_t inputs, const uint32_t* weight, int64_t outputs,
                           bool accumulate, float* c) {
  const uint16_t* a = pack_strip(strip, x, inputs) - strip.margin() * inputs;
  const int64_t columns = tile_columns(outputs), steps = blocks_of(strip.kernel * inputs, 32);
  multiply_tiles({strip.row_tiles(), columns / 16, strip.kernel, steps, a, inputs, strip.pitch() * inputs, weight,
                  columns, c, columns, accumulate});
}

// the positions that are pixels: y [images, H, W, outputs]
inline void unpack_strip(const Strip& strip, const float* c, int64_t outputs, float* y) {
  const int64_t columns = tile_columns(outputs);
  for (int64_t i = 0; i < strip.images; ++i)
    for (int64_t r = 0; r < strip.height; ++r) {
      const float* from = c + (i * strip.image() + r * strip.pitch()) * columns;
      if (columns == outputs) {
        std::copy(from, from + strip.width * outputs, y);
        y += strip.width * outputs;
      } else {
        for (int64_t at = 0; at < strip.width; ++at, from += columns, y += outputs) std::copy(from, from + outputs, y);
      }
    }
}

// --- weight gradient ---

inline int64_t tile_gradient_size(int64_t kernel, int64_t inputs, int64_t outputs) {
  return kernel * kernel * tile_columns(inputs) * tile_columns(outputs);
}

// sum [taps, tile_columns(inputs), tile_columns(outputs)] (+)= the correlation of x and dy
inline void correlate_tiles(const Strip& strip, const float* x, int64_t inputs, const float* dy, int64_t outputs,
                            bool accumulate, float* sum) {
  const int64_t rows = tile_columns(inputs), columns = tile_columns(outputs), summed = 32 * strip.steps();
  uint32_t* b = scratch<uint32_t>(Slot::kFactorsB, summed / 2 * columns);
  pack_pairs(strip, dy, outputs, 0, summed, b);

  const int64_t lead = round_up(strip.margin(), 2), length = round_up(lead + summed + strip.margin(), 32);
  uint32_t* pairs = scratch<uint32_t>(Slot::kProducts, length / 2 * rows);
  pack_pairs(strip, x, inputs, lead, length, pairs);
  // rows an odd number of cache lines apart, so that those of a tile do not fall into the same set
  constexpr int W = kWidth<int32_t>;
  const int64_t turned_row = (length / 32 | 1) * 16;
  uint32_t* turned = scratch<uint32_t>(Slot::kFactorsA, rows * turned_row);
  for (int64_t pair = 0; pair < length / 2; pair += W)
    for (int64_t c = 0; c < rows; c += W)
      transpose_block(pairs + pair * rows + c, rows, turned + c * turned_row + pair, turned_row);

  const uint16_t* first = reinterpret_cast<const uint16_t*>(turned) + lead;
  for (int64_t tap = 0; tap < strip.kernel * strip.kernel; ++tap) {
    const int64_t distance = (tap / strip.kernel - strip.pad()) * strip.pitch() + tap % strip.kernel - strip.pad();
    multiply_tiles({rows / 16, columns / 16, 1, strip.steps(), first + distance, 2 * turned_row, 0, b, columns,
                    sum + tap * rows * columns, columns, accumulate});
  }
}

}  // namespace cxgrad
