#include "residual_end.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>

#include "buffers.h"
#include "norm.h"

namespace cxgrad {

using at::Tensor;

namespace {

Tensor channels_last(const Tensor& images) { return images.permute({0, 1, 3, 4, 2}).contiguous(); }

Tensor channels_second(const Tensor& images) { return images.permute({0, 1, 4, 2, 3}); }

// one image and the windows over it
struct Windows {
  int64_t rows, columns;  // of windows
  int64_t height, width, channels, padding;

  int64_t in_size() const { return height * width * channels; }
  int64_t out_size() const { return rows * columns * channels; }

  // calls f(element of the window's first channel in out, in the image at its corner 0, which corners are inside): the
  // corners in row-major order, of which only those that are inside may be touched
  template <class F>
  void each(const F& f) const {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t row = 2 * i - padding, column = 2 * j - padding;
        const bool up = row >= 0, down = row + 1 < height, left = column >= 0, right = column + 1 < width;
        const bool inside[] = {up && left, up && right, down && left, down && right};
        f((i * columns + j) * channels, (row * width + column) * channels, inside);
      }
  }

  // corners in row-major order: norm.h's name, elements from corner 0
  static constexpr int name(int corner) { return 2 * (corner % 2) + corner / 2; }
  int64_t offset(int corner) const { return (corner / 2 * width + corner % 2) * channels; }

  // calls f(from, to) for what no window covers: a last row or column of odd sizes without padding
  template <class F>
  void rest(const F& f) const {
    const int64_t below = std::min(height, 2 * rows - padding), beside = std::min(width, 2 * columns - padding);
    for (int64_t i = 0; i < height; ++i)
      f((i * width + (i < below ? beside : 0)) * channels, (i + 1) * width * channels);
  }
};

// the number of windows along a side
int64_t pooled(int64_t size, bool pool, int64_t padding) { return pool ? (size + 2 * padding) / 2 : size; }

// without pooling an image is one position of many channels, and in one window
Windows windows_of(int64_t channels, int64_t height, int64_t width, bool pool, int64_t padding) {
  if (!pool) return {1, 1, 1, 1, height * width * channels, 0};
  return {pooled(height, pool, padding), pooled(width, pool, padding), height, width, channels, padding};
}

// where the activation's slope applies, as the framework has it: LeakyReLU's at 0 and to NaN, ReLU's at 0 alone
template <class T>
inline Vec<Integer<T>> sloped(Vec<T> z, T slope) {
  return slope == 0 ? z <= T(0) : ~(z > T(0));
}

template <class T>
inline Vec<T> times(Vec<T> value, T slope) {  // ReLU takes infinity to 0 too
  return slope == 0 ? Vec<T>{} : value * slope;
}

// of one image
template <class T>
void forward(const Windows& w, const T* x, const T* shortcut, T slope, T* out, uint8_t* codes) {
  using Whole = Vec<Integer<T>>;
  w.each([&](int64_t at, int64_t first, const bool* inside) {
    const int start = inside[0] ? 0 : inside[1] ? 1 : inside[2] ? 2 : 3;
    for_channels<T>(w.channels, [&](int64_t c, auto lanes) {
      Vec<T> best = broadcast(-std::numeric_limits<T>::infinity());
      Whole code = Whole{} + Integer<T>(Windows::name(start));
      unrolled<4>([&](auto corner) CXGRAD_INLINE {
        if (!inside[corner]) return;
        const int64_t here = first + w.offset(corner) + c;
        const Vec<T> z = load(x + here, lanes) + load(shortcut + here, lanes);
        const Whole wins = (z > best) | (z != z);  // the framework's: the first of equals, the last NaN
        best = wins ? z : best;
        code = wins ? Whole{} + Integer<T>(Windows::name(corner)) : code;
      });
      const Whole negative = sloped<T>(best, slope);
      store(out + at + c, negative ? times<T>(best, slope) : best, lanes);
      Corners<T>::write(codes + at + c, negative ? code | Integer<T>(kNegative) : code, lanes);
    });
  });
}

// the gradient for one image's sum
template <class T>
void backward(const Windows& w, const T* q, const uint8_t* codes, T slope, T* gradient) {
  w.each([&](int64_t at, int64_t first, const bool* inside) {
    for_channels<T>(w.channels, [&](int64_t c, auto lanes) {
      const auto code = Corners<T>::read(codes + at + c, lanes), best = Corners<T>::at(code);
      Vec<T> value = load(q + at + c, lanes);
      value = (code & Integer<T>(kNegative)) != 0 ? times<T>(value, slope) : value;
      unrolled<4>([&](auto corner) CXGRAD_INLINE {
        if (inside[corner])
          store(gradient + first + w.offset(corner) + c,
                best == Integer<T>(Windows::name(corner)) ? value : Vec<T>{}, lanes);
      });
    });
  });
  w.rest([&](int64_t from, int64_t to) { std::fill(gradient + from, gradient + to, T(0)); });
}

// its transpose
template <class T>
void gather(const Windows& w, const T* cotangent, const uint8_t* codes, T slope, T* out) {
  w.each([&](int64_t at, int64_t first, const bool* inside) {
    for_channels<T>(w.channels, [&](int64_t c, auto lanes) {
      const auto code = Corners<T>::read(codes + at + c, lanes), best = Corners<T>::at(code);
      Vec<T> value{};
      unrolled<4>([&](auto corner) CXGRAD_INLINE {
        if (inside[corner])
          value = best == Integer<T>(Windows::name(corner)) ? load(cotangent + first + w.offset(corner) + c, lanes)
                                                            : value;
      });
      store(out + at + c, (code & Integer<T>(kNegative)) != 0 ? times<T>(value, slope) : value, lanes);
    });
  });
}

// calls f(image's first element, that of its windows) for all images of all tasks
template <class F>
void for_images(int64_t images, const Windows& w, const F& f) {
  at::parallel_for(0, images, 1, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) f(image * w.in_size(), image * w.out_size());
  });
}

}  // namespace

std::tuple<Tensor, Tensor> residual_end(const Tensor& x_, const Tensor& shortcut_, double slope, bool pool,
                                        int64_t padding) {
  const Tensor x = channels_last(x_), shortcut = channels_last(shortcut_);
  const int64_t height = x.size(2), width = x.size(3), channels = x.size(4);
  const Windows w = windows_of(channels, height, width, pool, padding);
  const std::vector<int64_t> sizes{x.size(0), x.size(1), pooled(height, pool, padding), pooled(width, pool, padding),
                                   channels};
  Tensor out = empty_buffer(sizes, x.options()), codes = empty_buffer(sizes, x.options().dtype(at::kByte));
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "residual_end", [&] {
    for_images(x.size(0) * x.size(1), w, [&](int64_t in, int64_t at) {
      forward(w, x.const_data_ptr<scalar_t>() + in, shortcut.const_data_ptr<scalar_t>() + in, scalar_t(slope),
              out.mutable_data_ptr<scalar_t>() + at, codes.mutable_data_ptr<uint8_t>() + at);
    });
  });
  return {channels_second(out), channels_second(codes)};
}

Tensor residual_end_backward(const Tensor& q_, const Tensor& codes_, int64_t height, int64_t width, double slope,
                             bool pool, int64_t padding) {
  const Tensor q = channels_last(q_), codes = channels_last(codes_);
  const Windows w = windows_of(q.size(4), height, width, pool, padding);
  Tensor gradient = empty_buffer({q.size(0), q.size(1), height, width, q.size(4)}, q.options());
  AT_DISPATCH_FLOATING_TYPES(q.scalar_type(), "residual_end_backward", [&] {
    for_images(q.size(0) * q.size(1), w, [&](int64_t in, int64_t at) {
      backward(w, q.const_data_ptr<scalar_t>() + at, codes.const_data_ptr<uint8_t>() + at, scalar_t(slope),
               gradient.mutable_data_ptr<scalar_t>() + in);
    });
  });
  return channels_second(gradient);
}

Tensor residual_end_double_backward(const Tensor& cotangent_, const Tensor& codes_, double slope, bool pool,
                                    int64_t padding) {
  const Tensor cotangent = channels_last(cotangent_), codes = channels_last(codes_);
  const Windows w = windows_of(cotangent.size(4), cotangent.size(2), cotangent.size(3), pool, padding);
  Tensor out = empty_buffer(codes.sizes(), cotangent.options());
  AT_DISPATCH_FLOATING_TYPES(cotangent.scalar_type(), "residual_end_double_backward", [&] {
    for_images(codes.size(0) * codes.size(1), w, [&](int64_t in, int64_t at) {
      gather(w, cotangent.const_data_ptr<scalar_t>() + in, codes.const_data_ptr<uint8_t>() + at, scalar_t(slope),
             out.mutable_data_ptr<scalar_t>() + at);
    });
  });
  return channels_second(out);
}

}  // namespace cxgrad
