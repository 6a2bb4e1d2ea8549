#include "residual_end.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include "buffers.h"
#include "norm.h"

namespace cxgrad {

using at::Tensor;

namespace {

Tensor channels_last(const Tensor& images) { return images.permute({0, 1, 3, 4, 2}).contiguous(); }

// sizes of the images before the pool, and the windows over them
struct Windows {
  int64_t units, channels, height, width;
  bool pool;
  int64_t padding;

  Windows(const Tensor& images, bool pool, int64_t padding)
      : units(images.size(0) * images.size(1)),
        channels(images.size(2)),
        height(images.size(3)),
        width(images.size(4)),
        pool(pool),
        padding(padding) {}

  int64_t out_height() const { return pool ? (height + 2 * padding) / 2 : height; }
  int64_t out_width() const { return pool ? (width + 2 * padding) / 2 : width; }
  int64_t in_size() const { return height * width * channels; }
  int64_t out_size() const { return out_height() * out_width() * channels; }
  // whether every position is in a window
  bool complete() const { return !pool || (2 * out_height() - padding >= height && 2 * out_width() - padding >= width); }

  // calls f(window, corner, position) for every position of every window of an image, in row-major order
  template <class Begin, class F, class End>
  void each(const Begin& begin, const F& f, const End& end) const {
    for (int64_t i = 0; i < out_height(); ++i)
      for (int64_t j = 0; j < out_width(); ++j) {
        const int64_t at = (i * out_width() + j) * channels;
        begin(at);
        if (!pool) {
          f(at, 0, at);
        } else {
          for (int row = 0; row < 2; ++row)
            for (int column = 0; column < 2; ++column) {
              const int64_t y = 2 * i - padding + row, x = 2 * j - padding + column;
              if (y >= 0 && y < height && x >= 0 && x < width)
                f(at, 2 * column + row, (y * width + x) * channels);
            }
        }
        end(at);
      }
  }

  Tensor empty(const Tensor& like, int64_t rows, int64_t columns, at::ScalarType type) const {
    return empty_buffer({like.size(0), like.size(1), rows, columns, like.size(2)}, like.options().dtype(type));
  }
};

template <class F>
void for_images(const Windows& w, const F& f) {
  at::parallel_for(0, w.units, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) f(unit);
  });
}

// out and codes of one image
template <class T>
void forward(const Windows& w, const T* x, const T* shortcut, T slope, T* out, uint8_t* codes) {
  for_channels<T>(w.channels, [&](int64_t c, auto lanes) {
    Vec<T> best{};
    Vec<Integer<T>> code{};
    bool first = true;
    w.each([&](int64_t) { first = true; },
           [&](int64_t, int corner, int64_t position) {
             const Vec<T> z = load(x + position + c, lanes) + load(shortcut + position + c, lanes);
             const Vec<Integer<T>> name = Vec<Integer<T>>{} + Integer<T>(corner);
             if (first) {
               best = z;
               code = name;
               first = false;
               return;
             }
             const auto larger = (z > best) | (z != z);  // the framework's: what is not a number wins
             best = larger ? z : best;
             code = larger ? name : code;
           },
           [&](int64_t at) {
             code = best > T(0) ? code : (code | Integer<T>(kNegative));
             store(out + at + c, activate(best, slope), lanes);
             Corners<T>::write(codes + at + c, code, lanes);
           });
  });
}

// gradient of one image's sum
template <class T>
void backward(const Windows& w, const T* q, const uint8_t* codes, T slope, T* gradient) {
  for_channels<T>(w.channels, [&](int64_t c, auto lanes) {
    Vec<T> value{};
    Vec<Integer<T>> corner{};
    w.each(
        [&](int64_t at) {
          corner = Corners<T>::read(codes + at + c, lanes);
          value = load(q + at + c, lanes) * Corners<T>::factor(corner, slope);
          corner = Corners<T>::at(corner);
        },
        [&](int64_t, int name, int64_t position) {
          store(gradient + position + c, corner == Integer<T>(name) ? value : Vec<T>{}, lanes);
        },
        [](int64_t) {});
  });
}

// the transpose of backward
template <class T>
void gather(const Windows& w, const T* cotangent, const uint8_t* codes, T slope, T* out) {
  for_channels<T>(w.channels, [&](int64_t c, auto lanes) {
    Vec<T> value{};
    Vec<Integer<T>> code{}, corner{};
    w.each(
        [&](int64_t at) {
          code = Corners<T>::read(codes + at + c, lanes);
          corner = Corners<T>::at(code);
          value = Vec<T>{};
        },
        [&](int64_t, int name, int64_t position) {
          value = corner == Integer<T>(name) ? load(cotangent + position + c, lanes) : value;
        },
        [&](int64_t at) { store(out + at + c, value * Corners<T>::factor(code, slope), lanes); });
  });
}

}  // namespace

std::tuple<Tensor, Tensor> residual_end(const Tensor& x_, const Tensor& shortcut_, double slope, bool pool,
                                        int64_t padding) {
  const Windows w(x_, pool, padding);
  const Tensor x = channels_last(x_), shortcut = channels_last(shortcut_);
  Tensor out = w.empty(x_, w.out_height(), w.out_width(), x_.scalar_type());
  Tensor codes = w.empty(x_, w.out_height(), w.out_width(), at::kByte);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "residual_end", [&] {
    for_images(w, [&](int64_t unit) {
      forward(w, x.const_data_ptr<scalar_t>() + unit * w.in_size(),
              shortcut.const_data_ptr<scalar_t>() + unit * w.in_size(), scalar_t(slope),
              out.mutable_data_ptr<scalar_t>() + unit * w.out_size(),
              codes.mutable_data_ptr<uint8_t>() + unit * w.out_size());
    });
  });
  return {out.permute({0, 1, 4, 2, 3}), codes.permute({0, 1, 4, 2, 3})};
}

Tensor residual_end_backward(const Tensor& q_, const Tensor& codes_, int64_t height, int64_t width, double slope,
                             bool pool, int64_t padding) {
  const Tensor q = channels_last(q_), codes = channels_last(codes_);
  Windows w(q_, pool, padding);
  w.height = height;
  w.width = width;
  Tensor gradient = w.empty(q_, height, width, q.scalar_type());
  AT_DISPATCH_FLOATING_TYPES(q.scalar_type(), "residual_end_backward", [&] {
    for_images(w, [&](int64_t unit) {
      scalar_t* to = gradient.mutable_data_ptr<scalar_t>() + unit * w.in_size();
      if (!w.complete()) std::fill(to, to + w.in_size(), scalar_t(0));
      backward(w, q.const_data_ptr<scalar_t>() + unit * w.out_size(),
               codes.const_data_ptr<uint8_t>() + unit * w.out_size(), scalar_t(slope), to);
    });
  });
  return gradient.permute({0, 1, 4, 2, 3});
}

Tensor residual_end_double_backward(const Tensor& cotangent_, const Tensor& codes_, double slope, bool pool,
                                    int64_t padding) {
  const Tensor cotangent = channels_last(cotangent_), codes = channels_last(codes_);
  const Windows w(cotangent_, pool, padding);
  Tensor out = w.empty(cotangent_, w.out_height(), w.out_width(), cotangent.scalar_type());
  AT_DISPATCH_FLOATING_TYPES(cotangent.scalar_type(), "residual_end_double_backward", [&] {
    for_images(w, [&](int64_t unit) {
      gather(w, cotangent.const_data_ptr<scalar_t>() + unit * w.in_size(),
             codes.const_data_ptr<uint8_t>() + unit * w.out_size(), scalar_t(slope),
             out.mutable_data_ptr<scalar_t>() + unit * w.out_size());
    });
  });
  return out.permute({0, 1, 4, 2, 3});
}

}  // namespace cxgrad
