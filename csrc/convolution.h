// The convolutions of a block, stride 1 and same padding, a few images at a time: their callers fuse what comes before
// and after while the images are in the cache. How the work is cut depends on the shape alone, so that every sum has
// one order, whatever the number of threads.
#pragma once

#include <ATen/Parallel.h>

#include <atomic>
#include <vector>

#include "pointwise.h"
#include "rounding.h"
#include "tile_convolution.h"
#include "winograd.h"

namespace cxgrad {

extern std::atomic<int64_t> convolution_count;  // multiply-adds of the direct form, see take_convolution_count

struct ConvolutionShape {
  int64_t tasks, images, height, width, kernel;
  Precision precision;
  int64_t positions() const { return height * width; }  // of an image
  int64_t taps() const { return kernel * kernel; }
  bool wide() const { return kernel == 3; }
  // images that fill a block of tiles together
  int64_t group() const { return std::max<int64_t>(1, 96 / std::max<int64_t>(1, Shape{1, height, width}.tiles())); }
  int64_t groups() const { return blocks_of(images, group()); }
  // whether products of T are made on tile registers
  template <class T>
  bool tiled() const {
    return std::is_same_v<T, float> && precision == Precision::kBfloat16 && has_tiles();
  }
  Strip strip(int64_t count) const { return {count, height, width, kernel}; }
  // values that are to be multiplied: themselves, or rounded in scratch memory
  template <class T>
  const T* factors(Slot slot, const T* values, int64_t count) const {
    if (!dropped_bits<T>(precision)) return values;
    T* out = scratch<T>(slot, count);
    round_values<T>(precision, values, count, out);
    return out;
  }
  void count(int64_t inputs, int64_t outputs) const {
    convolution_count += tasks * images * positions() * inputs * outputs * taps();
  }
};

// memory of T where T is float, for what is never called where it is not
template <class T>
auto as_float(T* memory) {
  return reinterpret_cast<std::conditional_t<std::is_const_v<T>, const float*, float*>>(memory);
}
template <class T>
auto as_pairs(T* memory) {
  return reinterpret_cast<std::conditional_t<std::is_const_v<T>, const uint32_t*, uint32_t*>>(memory);
}

// a sum of convolutions, conv(x_0, w_0) + conv(x_1, w_1) + ...: their weights, made ready
template <class T>
class Convolution {
 public:
  struct Term {
    const T* w;  // [T, outputs, inputs, k, k], turned: [T, inputs, outputs, k, k] of the input gradient
    int64_t inputs;
    bool turned;
  };

  // in scratch memory: valid until the next one is made on this thread
  Convolution(const ConvolutionShape& shape, std::vector<Term> terms, int64_t outputs)
      : shape_(shape), terms_(std::move(terms)), outputs_(outputs), tiled_(shape.tiled<T>()) {
    for (const Term& term : terms_) {
      shape.count(term.inputs, outputs);
      starts_.push_back(packed_);
      packed_ += round_up(tiled_         ? tile_weight_size(shape.kernel, term.inputs, outputs)
                          : shape.wide() ? weight_size<T>(term.inputs, outputs)
                                         : term.inputs * padded<T>(outputs),
                          kWidth<T>);
      most_inputs_ = std::max(most_inputs_, term.inputs);
    }
    weights_ = scratch<T>(Slot::kWeights, shape.tasks * packed_);
    const int64_t count = int64_t(terms_.size());
    at::parallel_for(0, shape.tasks * count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t task = unit / count;
        const Term& term = terms_[unit % count];
        const int64_t size = term.inputs * outputs * shape.taps();
        const T* w = term.w + task * size;
        T* u = weights_ + task * packed_ + starts_[unit % count];
        if (tiled_) {
          pack_tile_weight(as_float(w), shape.kernel, term.inputs, outputs, term.turned, as_pairs(u));
          continue;
        }
        w = shape.factors(Slot::kFactorsA, w, size);
        if (shape.wide())
          pack_weight(w, term.inputs, outputs, term.turned, u);
        else
          pack_matrix(w, term.inputs, outputs, term.turned, u);
      }
    });
  }

  // y [images, H, W, outputs] from x[term] [images, H, W, inputs]
  void run(int64_t task, int64_t images, const T* const* x, T* y) const {
    const int count = int(terms_.size());
    const T* u = weights_ + task * packed_;
    if (tiled_) {
      const Strip strip = shape_.strip(images);
      float* sums = scratch<float>(Slot::kProducts, 16 * strip.row_tiles() * tile_columns(outputs_));
      for (int s = 0; s < count; ++s)
        convolve_tiles(strip, as_float(x[s]), terms_[s].inputs, as_pairs(u + starts_[s]), outputs_, s > 0, sums);
      return unpack_strip(strip, sums, outputs_, as_float(y));
    }
    const T* from[kMostTerms];
    for (int s = 0; s < count; ++s)
      from[s] = shape_.factors(s ? Slot::kFactorsB : Slot::kFactorsA, x[s],
                               images * shape_.positions() * terms_[s].inputs);
    if (shape_.wide()) {
      const Shape shape{images, shape_.height, shape_.width};
      Source<T> sources[kMostTerms];
      for (int s = 0; s < count; ++s) sources[s] = {from[s], u + starts_[s], terms_[s].inputs};
      const int64_t size = tiles_at_once<T>(most_inputs_, outputs_);
      for (int64_t first = 0; first < shape.tiles(); first += size)
        convolve_block(shape, sources, count, outputs_, first, std::min(size, shape.tiles() - first), size, y);
    } else {
      MatrixSource<T> sources[kMostTerms];
      for (int s = 0; s < count; ++s) sources[s] = {from[s], u + starts_[s], terms_[s].inputs};
      const int64_t rows = images * shape_.positions();
      multiply_block(sources, count, outputs_, 0, rows, rows, y);
    }
  }

 private:
  static constexpr int kMostTerms = 2;
  ConvolutionShape shape_;
  std::vector<Term> terms_;
  std::vector<int64_t> starts_;  // of every term's weight within a task's
  int64_t outputs_, packed_ = 0, most_inputs_ = 0;
  bool tiled_;
  T* weights_ = nullptr;
};

// the correlation of x and dy over the images of each task, collected in parts
template <class T>
class WeightGradient {
 public:
  // in scratch memory: valid until the next one is made on this thread
  WeightGradient(const ConvolutionShape& shape, int64_t inputs, int64_t outputs)
      : shape_(shape), inputs_(inputs), outputs_(outputs), tiled_(shape.tiled<T>()) {
    shape.count(inputs, outputs);
    size_ = round_up(tiled_         ? tile_gradient_size(shape.kernel, inputs, outputs)
                     : shape.wide() ? gradient_size<T>(inputs, outputs)
                                    : matrix_gradient_size<T>(inputs, outputs),
                     kWidth<T>);
    parts_ = parts(shape, inputs, outputs);
    sums_ = scratch<T>(Slot::kPartials, shape.tasks * parts_ * size_);
  }

  // enough for many threads, few enough to stay small beside the images
  static int64_t parts(const ConvolutionShape& shape, int64_t inputs, int64_t outputs) {
    const int64_t size = gradient_size<T>(inputs, outputs) * int64_t(sizeof(T)) * std::max<int64_t>(1, shape.tasks);
    return std::min<int64_t>({shape.groups(), 8, std::max<int64_t>(1, (int64_t(32) << 20) / size)});
  }

  // x [images, H, W, inputs], dy [images, H, W, outputs]; `begin`: the first of a part
  void add(int64_t task, int64_t part, int64_t images, const T* x, const T* dy, bool begin) {
    T* sum = sums_ + (task * parts_ + part) * size_;
    if (tiled_)
      return correlate_tiles(shape_.strip(images), as_float(x), inputs_, as_float(dy), outputs_, !begin, as_float(sum));
    x = shape_.factors(Slot::kFactorsA, x, images * shape_.positions() * inputs_);
    dy = shape_.factors(Slot::kFactorsB, dy, images * shape_.positions() * outputs_);
    if (shape_.wide()) {
      const Shape shape{images, shape_.height, shape_.width};
      const int64_t size = tiles_at_once<T>(inputs_, outputs_);
      for (int64_t first = 0; first < shape.tiles(); first += size)
        weight_gradient_block(shape, x, inputs_, dy, outputs_, first, std::min(size, shape.tiles() - first), size,
                              !begin || first > 0, sum);
    } else {
      matrix_gradient_block(x, inputs_, dy, outputs_, images * shape_.positions(), begin, sum);
    }
  }

  // dw [T, outputs, inputs, k, k] of the tasks `first` to `last`
  void finish(int64_t first, int64_t last, T* dw) {
    const int64_t slices = blocks_of(inputs_, 16), row = tiled_ ? tile_columns(outputs_) : padded<T>(outputs_);
    // a part is as many matrices [inputs, outputs] as there are frequencies, or taps
    const int64_t matrices = tiled_ ? shape_.taps() : shape_.wide() ? kFrequencies : 1;
    const int64_t matrix = tiled_          ? tile_columns(inputs_) * row
                           : shape_.wide() ? gradient_size<T>(inputs_, outputs_) / kFrequencies
                                           : 0;
    at::parallel_for(first * slices, last * slices, 1, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t task = unit / slices, from = unit % slices * 16, to = std::min(inputs_, from + 16);
        T* sum = sums_ + task * parts_ * size_;
        for (int64_t part = 1; part < parts_; ++part)
          for (int64_t m = 0; m < matrices; ++m) {
            T* total = sum + m * matrix;
            const T* more = total + part * size_;
            for (int64_t i = from * row; i < to * row; i += kWidth<T>) store(total + i, load(total + i) + load(more + i));
          }
        T* out = dw + task * outputs_ * inputs_ * shape_.taps();
        if (shape_.wide() && !tiled_) {
          unpack_gradient(sum, inputs_, outputs_, from, to, out);
          continue;
        }
        for (int64_t ci = from; ci < to; ++ci)
          for (int64_t co = 0; co < outputs_; ++co)
            for (int64_t m = 0; m < matrices; ++m)
              out[(co * inputs_ + ci) * matrices + m] = sum[m * matrix + ci * row + co];
      }
    });
  }

 private:
  ConvolutionShape shape_;
  int64_t inputs_, outputs_, size_ = 0, parts_ = 0;
  bool tiled_;
  T* sums_ = nullptr;
};

// Calls f(task, part, first image, images, whether it is the part's first) for all groups of images of the tasks `first`
// to `last`, a part after the other on one thread.
template <class F>
void for_groups(const ConvolutionShape& shape, int64_t parts, int64_t first, int64_t last, const F& f) {
  const int64_t groups = shape.groups(), size = shape.group();
  at::parallel_for(first * parts, last * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t part = unit % parts, from = groups * part / parts, to = groups * (part + 1) / parts;
      for (int64_t group = from; group < to; ++group)
        f(unit / parts, part, group * size, std::min(size, shape.images - group * size), group == from);
    }
  });
}

}  // namespace cxgrad
