// The elementwise half of a block, image by image: BatchNorm, LeakyReLU, 2x2 max-pool, and their two derivatives
// (MATH.md 1; names as there). Everything lies [H, W, C]; vectors run along channels.
//
// A pooling window keeps its arg-max as one byte an element: bits 0 and 1 the corner, 2 * column + row (so that corners
// index the interleaved rows of first_layer.h), bit 2 whether the activation's slope applies.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "simd.h"

namespace cxgrad {

inline constexpr uint8_t kNegative = 4;

template <class T>
struct Wide {  // a vector's elements in double
  typedef double type __attribute__((vector_size(kWidth<T> * sizeof(double))));
};
template <class T>
using WideVec = typename Wide<T>::type;

template <class T>
inline WideVec<T> widen(Vec<T> v) {
  return __builtin_convertvector(v, WideVec<T>);
}

// double sums of one image, a row of `count` quantities for each channel: [count, padded channels]
template <class T>
inline void add_to(double* sum, Vec<T> v) {
  WideVec<T> total;
  std::memcpy(&total, sum, sizeof total);
  total += widen<T>(v);
  std::memcpy(sum, &total, sizeof total);
}

template <class T>
struct Corners {
  typedef uint8_t Bytes __attribute__((vector_size(kWidth<T>)));
  using Whole = Vec<Integer<T>>;

  static inline Whole read(const uint8_t* p, int lanes) {
    Bytes bytes{};
    std::memcpy(&bytes, p, size_t(lanes));
    return __builtin_convertvector(bytes, Whole);
  }
  static inline void write(uint8_t* p, Whole v, int lanes) {
    const Bytes bytes = __builtin_convertvector(v, Bytes);
    std::memcpy(p, &bytes, size_t(lanes));
  }
  static inline Whole at(Whole v) { return v & Integer<T>(3); }
  // the activation's derivative
  static inline Vec<T> factor(Whole v, T slope) {
    return (v & Integer<T>(kNegative)) != 0 ? broadcast(slope) : broadcast(T(1));
  }
};

// what a channel of one task is normalised by, a padded row each
template <class T>
struct Affine {
  const T* mean;
  const T* inverse;  // r
  const T* scale;    // g
  const T* bias;     // b
};

struct Plane {
  int64_t height, width, channels;
  int64_t pooled_height() const { return height / 2; }
  int64_t pooled_width() const { return width / 2; }
};

template <class T>
inline int lanes_from(int64_t channel, int64_t channels) {
  const int64_t left = channels - channel;
  return left < kWidth<T> ? int(left) : kWidth<T>;
}

// calls f(channel, lanes) for every vector of channels
template <class T, class F>
inline void for_channels(int64_t channels, const F& f) {
  int64_t c = 0;
  for (; c + kWidth<T> <= channels; c += kWidth<T>) f(c, std::integral_constant<int, kWidth<T>>());
  if (c < channels) f(c, int(channels - c));
}

// mean [C] and sum of squared deviations [C] of one image; `work` holds 3 padded rows of double
template <class T>
void image_moments(const Plane& plane, const T* y, double* mean, double* square, double* work) {
  const int64_t padded = round_up(plane.channels, kWidth<T>), row_size = plane.width * plane.channels;
  double *shift = work, *first = work + padded, *second = work + 2 * padded;
  std::memset(work, 0, size_t(3 * padded) * sizeof(double));
  for_channels<T>(plane.channels, [&](int64_t c, auto lanes) {
    Vec<T> sum{};
    for (int64_t j = 0; j < plane.width; ++j) sum += load(y + j * plane.channels + c, lanes);
    add_to<T>(shift + c, sum / T(plane.width));
  });
  for (int64_t i = 0; i < plane.height; ++i)
    for_channels<T>(plane.channels, [&](int64_t c, auto lanes) {
      WideVec<T> wide;
      std::memcpy(&wide, shift + c, sizeof wide);
      const Vec<T> about = __builtin_convertvector(wide, Vec<T>);  // near the mean: nothing cancels
      Vec<T> sum{}, squares{};
      for (int64_t j = 0; j < plane.width; ++j) {
        const Vec<T> d = load(y + i * row_size + j * plane.channels + c, lanes) - about;
        sum += d;
        squares += d * d;
      }
      add_to<T>(first + c, sum);
      add_to<T>(second + c, squares);
    });
  const double n = double(plane.height * plane.width);
  for (int64_t c = 0; c < plane.channels; ++c) {
    mean[c] = double(T(shift[c])) + first[c] / n;
    square[c] = second[c] - first[c] * first[c] / n;
  }
}

template <class T>
inline Vec<T> activate(Vec<T> z, T slope) {
  return z > T(0) ? z : slope * z;
}

// out = leaky(z), without pooling
template <class T>
void normalize(const Plane& plane, const T* y, const Affine<T>& affine, T slope, T* out) {
  for (int64_t p = 0; p < plane.height * plane.width; ++p)
    for_channels<T>(plane.channels, [&](int64_t c, auto lanes) {
      const Vec<T> centred = load(y + p * plane.channels + c, lanes) - load(affine.mean + c);
      const Vec<T> z = centred * load(affine.inverse + c) * load(affine.scale + c) + load(affine.bias + c);
      store(out + p * plane.channels + c, activate(z, slope), lanes);
    });
}

// keeps the larger of two candidates for the maximum; the earlier one where they are equal
template <class T>
inline void keep_larger(Vec<T> z, Vec<T> unit, int corner, Vec<T>& best, Vec<T>& best_unit,
                        Vec<Integer<T>>& best_corner) {
  const auto larger = z > best;
  best = larger ? z : best;
  best_unit = larger ? unit : best_unit;
  best_corner = larger ? Vec<Integer<T>>{} + Integer<T>(corner) : best_corner;
}

template <class T>
inline void store_pooled(Vec<T> z, Vec<T> unit, Vec<Integer<T>> corner, T slope, int64_t at, int lanes, T* out,
                         T* selected, uint8_t* corners) {
  corner = z > T(0) ? corner : (corner | Integer<T>(kNegative));
  store(out + at, activate(z, slope), lanes);
  store(selected + at, unit, lanes);
  Corners<T>::write(corners + at, corner, lanes);
}

// out = maxpool(leaky(z)), selected = the normalised convolution there
template <class T>
void normalize_pool(const Plane& plane, const T* y, const Affine<T>& affine, T slope, T* out, T* selected,
                    uint8_t* corners) {
  const int64_t down = plane.width * plane.channels, right = plane.channels;
  for (int64_t i = 0; i < plane.pooled_height(); ++i)
    for (int64_t j = 0; j < plane.pooled_width(); ++j) {
      const T* corner = y + 2 * i * down + 2 * j * right;
      const int64_t at = (i * plane.pooled_width() + j) * plane.channels;
      for_channels<T>(plane.channels, [&](int64_t c, auto lanes) {
        const Vec<T> mean = load(affine.mean + c), inverse = load(affine.inverse + c);
        const Vec<T> scale = load(affine.scale + c), bias = load(affine.bias + c);
        auto unit = [&](int64_t offset) { return (load(corner + offset + c, lanes) - mean) * inverse; };
        Vec<T> best_unit = unit(0), best = best_unit * scale + bias;
        Vec<Integer<T>> best_corner{};
        // row-major order decides ties
        for (const auto& [offset, name] : {std::pair{right, 2}, std::pair{down, 1}, std::pair{down + right, 3}}) {
          const Vec<T> other = unit(offset);
          keep_larger<T>(other * scale + bias, other, name, best, best_unit, best_corner);
        }
        store_pooled<T>(best, best_unit, best_corner, slope, at + c, lanes, out, selected, corners);
      });
    }
}

// --- first derivative ---

// sums [2, padded]: db and dg, from pooled elements alone
template <class T>
void reduce_pooled(const Plane& plane, const T* q, const T* selected, const uint8_t* corners, T slope, double* sums) {
  const int64_t padded = round_up(plane.channels, kWidth<T>), row_size = plane.pooled_width() * plane.channels;
  for (int64_t i = 0; i < plane.pooled_height(); ++i)
    for_channels<T>(plane.channels, [&](int64_t c, auto lanes) {
      Vec<T> db{}, dg{};
      for (int64_t at = i * row_size + c; at < (i + 1) * row_size; at += plane.channels) {
        const Vec<T> dz = load(q + at, lanes) * Corners<T>::factor(Corners<T>::read(corners + at, lanes), slope);
        db += dz;
        dg += dz * load(selected + at, lanes);
      }
      add_to<T>(sums + c, db);
      add_to<T>(sums + padded + c, dg);
    });
}

// a position's normalised value, and the gradient that reaches z there, without pooling
template <class T>
struct Position {
  Vec<T> unit, dz, factor;
};

template <class T>
inline Position<T> position(const T* y, const T* q, const Affine<T>& affine, T slope, int64_t at, int64_t c,
                            int lanes) {
  const Vec<T> unit = (load(y + at, lanes) - load(affine.mean + c)) * load(affine.inverse + c);
  const Vec<T> z = unit * load(affine.scale + c) + load(affine.bias + c);
  const Vec<T> factor = z > T(0) ? broadcast(T(1)) : broadcast(slope);
  return {unit, load(q + at, lanes) * factor, factor};
}

template <class T>
void reduce_full(const Plane& plane, const T* q, const T* y, const Affine<T>& affine, T slope, double* sums) {
  const int64_t padded = round_up(plane.channels, kWidth<T>), row_size = plane.width * plane.channels;
  for (int64_t i = 0; i < plane.height; ++i)
    for_channels<T>(plane.channels, [&](int64_t c, auto lanes) {
      Vec<T> db{}, dg{};
      for (int64_t at = i * row_size + c; at < (i + 1) * row_size; at += plane.channels) {
        const Position<T> here = position(y, q, affine, slope, at, c, lanes);
        db += here.dz;
        dg += here.dz * here.unit;
      }
      add_to<T>(sums + c, db);
      add_to<T>(sums + padded + c, dg);
    });
}

// coefficients of dy = k dz - shift - unit * slant, a padded row each
template <class T>
struct Linear {
  const T* gain;   // k
  const T* shift;  // k db / n
  const T* slant;  // k dg / n
};

// calls f(first position, pooled position or -1, how many columns, how many rows) for every window, those that hang over
// the border too: they are not pooled
template <class F>
inline void for_windows(const Plane& plane, const F& f) {
  for (int64_t i = 0; i < plane.height; i += 2)
    for (int64_t j = 0; j < plane.width; j += 2) {
      const bool down = i + 1 < plane.height, right = j + 1 < plane.width;
      f(i * plane.width + j, right && down ? i / 2 * plane.pooled_width() + j / 2 : int64_t(-1), right ? 2 : 1,
        down ? 2 : 1);
    }
}

// dy (+ `more`, the gradient that reached the convolution's output by another way)
template <class T, bool More>
void gradient_pooled(const Plane& plane, const T* q, const uint8_t* corners, const T* y, const Affine<T>& affine,
                     const Linear<T>& linear, T slope, const T* more, T* dy) {
  const int64_t channels = plane.channels;
  for_windows(plane, [&](int64_t first, int64_t pooled, int columns, int rows) {
    for_channels<T>(channels, [&](int64_t c, auto lanes) {
      const Vec<T> mean = load(affine.mean + c), inverse = load(affine.inverse + c);
      const Vec<T> shift = load(linear.shift + c), slant = load(linear.slant + c);
      Vec<T> dz{};
      Vec<Integer<T>> corner{};
      if (pooled >= 0) {
        corner = Corners<T>::read(corners + pooled * channels + c, lanes);
        dz = load(q + pooled * channels + c, lanes) * Corners<T>::factor(corner, slope) * load(linear.gain + c);
        corner = Corners<T>::at(corner);
      }
      auto write = [&](int name, int64_t offset) {
        const int64_t at = (first + offset) * channels + c;
        const Vec<T> unit = (load(y + at, lanes) - mean) * inverse;
        Vec<T> value = (corner == Integer<T>(name) ? dz : Vec<T>{}) - shift - unit * slant;
        if constexpr (More) value += load(more + at, lanes);
        store(dy + at, value, lanes);
      };
      write(0, 0);
      if (columns == 2) write(2, 1);
      if (rows == 2) write(1, plane.width);
      if (columns == 2 && rows == 2) write(3, plane.width + 1);
    });
  });
}

template <class T, bool More>
void gradient_full(const Plane& plane, const T* q, const T* y, const Affine<T>& affine, const Linear<T>& linear,
                   T slope, const T* more, T* dy) {
  for (int64_t p = 0; p < plane.height * plane.width; ++p)
    for_channels<T>(plane.channels, [&](int64_t c, auto lanes) {
      const int64_t at = p * plane.channels + c;
      const Position<T> here = position(y, q, affine, slope, at, c, lanes);
      Vec<T> value = here.dz * load(linear.gain + c) - load(linear.shift + c) - here.unit * load(linear.slant + c);
      if constexpr (More) value += load(more + at, lanes);
      store(dy + at, value, lanes);
    });
}

// --- second derivative ---

template <class T>
inline Vec<T> pick(Vec<Integer<T>> corner, Vec<T> v0, Vec<T> v1, Vec<T> v2, Vec<T> v3) {
  const Vec<T> left = (corner & Integer<T>(1)) != 0 ? v1 : v0, right = (corner & Integer<T>(1)) != 0 ? v3 : v2;
  return (corner & Integer<T>(2)) != 0 ? right : left;
}

// sums [3, padded]: Su, Su.unit, Su.dz
template <class T>
void second_reduce_pooled(const Plane& plane, const T* u, const T* y, const T* q, const uint8_t* corners,
                          const Affine<T>& affine, T slope, double* sums) {
  const int64_t channels = plane.channels, padded = round_up(channels, kWidth<T>);
  for (int64_t i = 0; i < plane.height; i += 2)
    for_channels<T>(channels, [&](int64_t c, auto lanes) {
      const Vec<T> mean = load(affine.mean + c), inverse = load(affine.inverse + c);
      Vec<T> total{}, slanted{}, weighted{};
      const bool down = i + 1 < plane.height;
      for (int64_t j = 0; j < plane.width; j += 2) {
        const bool right = j + 1 < plane.width;
        const int64_t at = (i * plane.width + j) * channels + c;
        auto add = [&](int64_t offset) {
          const Vec<T> value = load(u + at + offset * channels, lanes);
          total += value;
          slanted += value * ((load(y + at + offset * channels, lanes) - mean) * inverse);
          return value;
        };
        const Vec<T> u0 = add(0), u2 = right ? add(1) : Vec<T>{}, u1 = down ? add(plane.width) : Vec<T>{};
        const Vec<T> u3 = right && down ? add(plane.width + 1) : Vec<T>{};
        if (right && down) {
          const int64_t pooled = (i / 2 * plane.pooled_width() + j / 2) * channels + c;
          const auto corner = Corners<T>::read(corners + pooled, lanes);
          const Vec<T> dz = load(q + pooled, lanes) * Corners<T>::factor(corner, slope);
          weighted += dz * pick<T>(Corners<T>::at(corner), u0, u1, u2, u3);
        }
      }
      add_to<T>(sums + c, total);
      add_to<T>(sums + padded + c, slanted);
      add_to<T>(sums + 2 * padded + c, weighted);
    });
}

template <class T>
void second_reduce_full(const Plane& plane, const T* u, const T* y, const T* q, const Affine<T>& affine, T slope,
                        double* sums) {
  const int64_t padded = round_up(plane.channels, kWidth<T>), row_size = plane.width * plane.channels;
  for (int64_t i = 0; i < plane.height; ++i)
    for_channels<T>(plane.channels, [&](int64_t c, auto lanes) {
      Vec<T> total{}, slanted{}, weighted{};
      for (int64_t at = i * row_size + c; at < (i + 1) * row_size; at += plane.channels) {
        const Position<T> here = position(y, q, affine, slope, at, c, lanes);
        const Vec<T> value = load(u + at, lanes);
        total += value;
        slanted += value * here.unit;
        weighted += value * here.dz;
      }
      add_to<T>(sums + c, total);
      add_to<T>(sums + padded + c, slanted);
      add_to<T>(sums + 2 * padded + c, weighted);
    });
}

// coefficients of the second derivative, a padded row each
template <class T>
struct Second {
  Linear<T> first;    // dy again
  const T* mean_u;    // Su / n
  const T* slant_u;   // Su.unit / n
  const T* of_unit;   // Ge
  const T* constant;  // B
  const T* of_u;      // r a
  const T* of_dz;     // r d
  const T* offset;    // r S0 / n
  const T* slant;     // r R / n
};

// the gradient for q from u at the arg-max (or at the position, without pooling)
template <class T>
inline Vec<T> second_q(const Second<T>& s, Vec<T> u, Vec<T> unit, int64_t c) {
  return load(s.first.gain + c) * (u - load(s.mean_u + c) - unit * load(s.slant_u + c)) + load(s.of_unit + c) * unit +
         load(s.constant + c);
}

// q_ (gradient for q), y_ (for the convolution's output) and dy; U: whether there is a u, Dy: whether dy is wanted
template <class T, bool U, bool Dy>
void second_pooled(const Plane& plane, const T* u, const T* y, const T* q, const T* selected, const uint8_t* corners,
                   const Affine<T>& affine, const Second<T>& s, T slope, T* q_, T* y_, T* dy) {
  const int64_t channels = plane.channels;
  for_windows(plane, [&](int64_t first, int64_t pooled, int columns, int rows) {
    for_channels<T>(channels, [&](int64_t c, auto lanes) {
      const Vec<T> mean = load(affine.mean + c), inverse = load(affine.inverse + c);
      const Vec<T> offset = load(s.offset + c), slant = load(s.slant + c), of_u = load(s.of_u + c);
      Vec<T> dz{}, dz_y{}, dz_gain{}, factor{};
      Vec<Integer<T>> corner{};
      const int64_t at_pooled = pooled * channels + c;
      if (pooled >= 0) {
        corner = Corners<T>::read(corners + at_pooled, lanes);
        factor = Corners<T>::factor(corner, slope);
        dz = load(q + at_pooled, lanes) * factor;
        dz_y = dz * load(s.of_dz + c);
        if constexpr (Dy) dz_gain = dz * load(s.first.gain + c);
        corner = Corners<T>::at(corner);
      }
      Vec<T> at_corner{};
      auto write = [&](int name, int64_t step) {
        const int64_t at = (first + step) * channels + c;
        const Vec<T> unit = (load(y + at, lanes) - mean) * inverse;
        const auto here = corner == Integer<T>(name);
        Vec<T> value = (here ? dz_y : Vec<T>{}) - offset - unit * slant;
        if constexpr (U) {
          const Vec<T> other = load(u + at, lanes);
          value += of_u * other;
          at_corner = here ? other : at_corner;
        }
        store(y_ + at, value, lanes);
        if constexpr (Dy)
          store(dy + at, (here ? dz_gain : Vec<T>{}) - load(s.first.shift + c) - unit * load(s.first.slant + c), lanes);
      };
      write(0, 0);
      if (columns == 2) write(2, 1);
      if (rows == 2) write(1, plane.width);
      if (columns == 2 && rows == 2) write(3, plane.width + 1);
      if (pooled >= 0)
        store(q_ + at_pooled, second_q(s, at_corner, load(selected + at_pooled, lanes), c) * factor, lanes);
    });
  });
}

template <class T, bool U, bool Dy>
void second_full(const Plane& plane, const T* u, const T* y, const T* q, const Affine<T>& affine, const Second<T>& s,
                 T slope, T* q_, T* y_, T* dy) {
  for (int64_t p = 0; p < plane.height * plane.width; ++p)
    for_channels<T>(plane.channels, [&](int64_t c, auto lanes) {
      const int64_t at = p * plane.channels + c;
      const Position<T> here = position(y, q, affine, slope, at, c, lanes);
      Vec<T> other{};
      if constexpr (U) other = load(u + at, lanes);
      store(q_ + at, second_q(s, other, here.unit, c) * here.factor, lanes);
      store(y_ + at,
            load(s.of_u + c) * other + load(s.of_dz + c) * here.dz - load(s.offset + c) - here.unit * load(s.slant + c),
            lanes);
      if constexpr (Dy)
        store(dy + at,
              here.dz * load(s.first.gain + c) - load(s.first.shift + c) - here.unit * load(s.first.slant + c), lanes);
    });
}

}  // namespace cxgrad
