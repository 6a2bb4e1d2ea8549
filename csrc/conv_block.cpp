#include "conv_block.h"

#include <ATen/Dispatch.h>

#include "buffers.h"
#include "convolution.h"
#include "first_layer.h"
#include "norm.h"

namespace cxgrad {

std::atomic<int64_t> convolution_count{0};

int64_t take_convolution_count() { return convolution_count.exchange(0); }

namespace {

// [T, S, C, H, W] -> the same values, channels last in memory, which is what the kernels read
Tensor channels_last(const Tensor& images) {
  if (images.dim() != 5) return images;
  return images.permute({0, 1, 3, 4, 2}).contiguous();
}

Tensor nothing(const Tensor& like) { return at::empty({0}, like.options()); }

bool given(const OptionalTensor& tensor) { return tensor.has_value() && tensor->defined(); }

// everything about a call but the tensors
struct Geometry {
  int64_t tasks, images, inputs, outputs, height, width, kernel;
  bool pool, first_layer;
  Precision precision = Precision::kFloat32;

  Geometry(const Tensor& x, const Tensor& weight, bool pool, bool first_layer, Precision precision)
      : tasks(x.size(0)),
        images(x.size(1)),
        inputs(x.size(2)),
        outputs(weight.size(1)),
        height(x.size(3)),
        width(x.size(4)),
        kernel(weight.size(3)),
        pool(pool),
        first_layer(first_layer),
        precision(precision) {}

  // of images that are a convolution's output, without the rest
  Geometry(const Tensor& y, int64_t channels)
      : tasks(y.size(0)),
        images(y.size(1)),
        inputs(channels),
        outputs(channels),
        height(y.size(3)),
        width(y.size(4)),
        kernel(1),
        pool(false),
        first_layer(false) {}

  Plane plane() const { return {height, width, outputs}; }
  ConvolutionShape convolution() const { return {tasks, images, height, width, kernel, precision}; }
  FirstLayer layer() const { return {inputs, height, width, outputs}; }
  int64_t count() const { return images * height * width; }  // n
  int64_t image_size() const { return height * width * outputs; }
  int64_t out_height() const { return pool ? height / 2 : height; }
  int64_t out_width() const { return pool ? width / 2 : width; }
  int64_t out_size() const { return out_height() * out_width() * outputs; }
  int64_t taps() const { return inputs * kernel * kernel; }
};

// Calls f(first, last) for slices of the tasks whose images, several tensors of them, stay in the last-level cache
// between the passes of a kernel.
template <class T, class F>
void for_slices(const Geometry& g, const F& f) {
  const int64_t bytes = std::max<int64_t>(1, g.images * g.image_size() * int64_t(sizeof(T)));
  const int64_t size = std::max<int64_t>(1, (int64_t(16) << 20) / bytes);
  for (int64_t first = 0; first < g.tasks; first += size) f(first, std::min(g.tasks, first + size));
}

// rows of padded channels, [T, rows, padded], in double and in T
template <class T>
class ChannelTable {
 public:
  ChannelTable(int64_t tasks, int64_t rows, int64_t channels)
      : rows_(rows), padded_(round_up(channels, kWidth<T>)), values_(size_t(tasks * rows * padded_)) {}
  T* row(int64_t task, int64_t index) { return values_.data() + (task * rows_ + index) * padded_; }

 private:
  int64_t rows_, padded_;
  std::vector<T> values_;
};

// per-task, per-channel numbers that the elementwise passes need, and what they are made of
template <class T>
struct Channels {
  Geometry g;
  std::vector<double> mean, inverse, scale, bias, eps;  // [T, C]; [T]
  ChannelTable<T> table;

  Channels(const Geometry& g, const Tensor& scale_, const Tensor& bias_, const Tensor& eps_)
      : g(g), table(g.tasks, 4, g.outputs) {
    const Tensor s = scale_.contiguous(), b = bias_.contiguous(), e = eps_.contiguous();
    const int64_t size = g.tasks * g.outputs;
    mean.resize(size_t(size));
    inverse.resize(size_t(size));
    scale.assign(s.const_data_ptr<T>(), s.const_data_ptr<T>() + size);
    bias.assign(b.const_data_ptr<T>(), b.const_data_ptr<T>() + size);
    eps.assign(e.const_data_ptr<T>(), e.const_data_ptr<T>() + g.tasks);
  }

  Channels(const Geometry& g, const Tensor& scale_, const Tensor& bias_, const Tensor& eps_, const Tensor& moments)
      : Channels(g, scale_, bias_, eps_) {
    const Tensor m = moments.contiguous();
    for (int64_t task = 0; task < g.tasks; ++task) set(task, m.const_data_ptr<double>() + 2 * task * g.outputs);
  }

  // moments [2, C] of one task
  void set(int64_t task, const double* moments) {
    for (int64_t c = 0; c < g.outputs; ++c) {
      const int64_t i = task * g.outputs + c;
      mean[i] = moments[c];
      inverse[i] = 1 / std::sqrt(moments[g.outputs + c] + eps[task]);
      table.row(task, 0)[c] = T(mean[i]);
      table.row(task, 1)[c] = T(inverse[i]);
      table.row(task, 2)[c] = T(scale[i]);
      table.row(task, 3)[c] = T(bias[i]);
    }
  }

  Affine<T> affine(int64_t task) {
    return {table.row(task, 0), table.row(task, 1), table.row(task, 2), table.row(task, 3)};
  }
};

// [T, quantities, C] sums over the images of each task; those of a slice of tasks are found at a time
template <class T>
class Sums {
 public:
  Sums(const Geometry& g, int64_t quantities, int64_t channels)
      : g_(g),
        quantities_(quantities),
        channels_(channels),
        padded_(round_up(channels, kWidth<T>)),
        total_(size_t(g.tasks * quantities * channels), 0.0) {}

  // the sum of `quantity` over channels of one task
  double* row(int64_t task, int64_t quantity) { return total_.data() + (task * quantities_ + quantity) * channels_; }

  // memory for the parts of the tasks' images, [quantities, padded channels] each, all zero
  void start(int64_t first, int64_t last) {
    first_ = first;
    const int64_t size = (last - first) * g_.images * quantities_ * padded_;
    parts_ = scratch<double>(Slot::kSums, size);
    std::fill(parts_, parts_ + size, 0.0);
  }
  double* part(int64_t task, int64_t image) {
    return parts_ + ((task - first_) * g_.images + image) * quantities_ * padded_;
  }

  // add the parts, in the images' order
  void finish(int64_t last) {
    at::parallel_for(first_ * quantities_, last * quantities_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index)
        for (int64_t image = 0; image < g_.images; ++image) {
          const double* from = part(index / quantities_, image) + index % quantities_ * padded_;
          double* to = total_.data() + index * channels_;
          for (int64_t c = 0; c < channels_; ++c) to[c] += from[c];
        }
    });
  }

 private:
  Geometry g_;
  int64_t quantities_, channels_, padded_, first_ = 0;
  std::vector<double> total_;
  double* parts_ = nullptr;
};

// calls f(task, task * images + image) for the images of the tasks `first` to `last`
template <class F>
void for_images(const Geometry& g, int64_t first, int64_t last, const F& f) {
  at::parallel_for(first * g.images, last * g.images, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) f(unit / g.images, unit);
  });
}

// the moments [2, C] of a task from those of its images, [2, padded channels] each (Chan et al. 1979)
inline void join_moments(const Geometry& g, const double* parts, int64_t padded, double* out) {
  const double n = double(g.height * g.width);
  for (int64_t c = 0; c < g.outputs; ++c) {
    double mean = 0, square = 0;
    for (int64_t image = 0; image < g.images; ++image) {
      const double* part = parts + image * 2 * padded + c;
      const double apart = part[0] - mean;
      mean += apart / double(image + 1);
      square += part[padded] + apart * apart * n * double(image) / double(image + 1);
    }
    out[c] = mean;
    out[g.outputs + c] = square / (n * double(g.images));
  }
}

// --- the first layer's closed forms ---

// w mean and w' covariance w of every filter, and the products they are made of
struct PatchProducts {
  std::vector<double> mean, variance;  // [T, C]: w . mu, w' Sigma w
  std::vector<double> turned;          // [T, C, K]: Sigma w
};

template <class T>
PatchProducts patch_products(const Geometry& g, const T* weight, const double* patch_mean, const double* covariance) {
  const int64_t taps = g.taps();
  PatchProducts p;
  p.mean.resize(size_t(g.tasks * g.outputs));
  p.variance.resize(p.mean.size());
  p.turned.resize(p.mean.size() * size_t(taps));
  at::parallel_for(0, g.tasks * g.outputs, 16, [&](int64_t begin, int64_t end) {
    std::vector<double> w(static_cast<size_t>(taps));
    for (int64_t i = begin; i < end; ++i) {
      const double* mu = patch_mean + i / g.outputs * taps;
      const double* sigma = covariance + i / g.outputs * taps * taps;
      double* turned = p.turned.data() + i * taps;
      std::copy(weight + i * taps, weight + (i + 1) * taps, w.begin());
      std::fill(turned, turned + taps, 0.0);
      double mean = 0, variance = 0;
      for (int64_t k = 0; k < taps; ++k) {
        mean += w[k] * mu[k];
        for (int64_t l = 0; l < taps; ++l) turned[l] += w[k] * sigma[k * taps + l];
      }
      for (int64_t k = 0; k < taps; ++k) variance += w[k] * turned[k];
      p.mean[i] = mean;
      p.variance[i] = variance;
    }
  });
  return p;
}

// all images of all tasks, interleaved as first_layer.h wants them, one at a time in scratch memory
template <class T>
const T* interleaved(const Geometry& g, const Tensor& x, int64_t unit) {
  const FirstLayer layer = g.layer();
  T* out = scratch<T>(Slot::kTransformedA, layer.image_size<T>());
  const T* image = x.const_data_ptr<T>() + unit / g.images * x.stride(0) + unit % g.images * x.stride(1);
  const int64_t strides[3] = {x.stride(2), x.stride(3), x.stride(4)};
  interleave(layer, image, strides, out);
  if (dropped_bits<T>(g.precision)) round_values(g.precision, out, layer.image_size<T>(), out);
  return out;
}

// weights of all tasks as taps by padded channels
template <class T>
const T* taps_of(const Geometry& g, const T* weight) {
  const int64_t size = g.taps() * round_up(g.outputs, kWidth<T>);
  T* out = scratch<T>(Slot::kWeights, g.tasks * size);
  for (int64_t task = 0; task < g.tasks; ++task)
    pack_taps(g.layer(), weight + task * g.outputs * g.taps(), out + task * size);
  if (dropped_bits<T>(g.precision)) round_values(g.precision, out, g.tasks * size, out);
  return out;
}

struct Patches {
  Tensor mean, covariance;
  Patches(const OptionalTensor& mean_, const OptionalTensor& covariance_)
      : mean(mean_->contiguous()), covariance(covariance_->contiguous()) {}
};

// --- forward ---

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Geometry& g, const Tensor& x_, const Tensor& weight_,
                                                           const Tensor& scale, const Tensor& bias, const Tensor& eps,
                                                           T slope, const std::optional<Patches>& patches) {
  const Tensor weight = weight_.contiguous();
  const auto options = x_.options();
  auto images = [&](int64_t height, int64_t width, const at::TensorOptions& of) {
    return empty_buffer({g.tasks, g.images, height, width, g.outputs}, of);
  };
  Tensor out = images(g.out_height(), g.out_width(), options);
  Tensor selected = g.pool ? images(g.out_height(), g.out_width(), options) : nothing(x_);
  Tensor corners = g.pool ? images(g.out_height(), g.out_width(), options.dtype(at::kByte))
                          : at::empty({0}, options.dtype(at::kByte));
  Tensor y = nothing(x_), moments;
  if (patches) {
    moments = at::empty({g.tasks, 2, g.outputs}, options.dtype(at::kDouble));
    const PatchProducts p = patch_products(g, weight.const_data_ptr<T>(), patches->mean.const_data_ptr<double>(),
                                           patches->covariance.const_data_ptr<double>());
    for (int64_t i = 0; i < g.tasks * g.outputs; ++i) {
      double* row = moments.mutable_data_ptr<double>() + i / g.outputs * 2 * g.outputs + i % g.outputs;
      row[0] = p.mean[i];
      row[g.outputs] = p.variance[i];
    }
    g.convolution().count(g.inputs, g.outputs);
    Channels<T> channels(g, scale, bias, eps, moments);
    const T* taps = taps_of(g, weight.const_data_ptr<T>());
    const int64_t weight_size = g.taps() * round_up(g.outputs, kWidth<T>);
    for_images(g, 0, g.tasks, [&](int64_t task, int64_t unit) {
      const T* image = interleaved<T>(g, x_, unit);
      const int64_t at = unit * g.out_size();
      first_forward(g.layer(), image, taps + task * weight_size, channels.affine(task), slope,
                    out.mutable_data_ptr<T>() + at, selected.mutable_data_ptr<T>() + at,
                    corners.mutable_data_ptr<uint8_t>() + at);
    });
  } else {
    const Tensor x = channels_last(x_);
    y = images(g.height, g.width, options);
    moments = at::empty({g.tasks, 2, g.outputs}, options.dtype(at::kDouble));
    T* values = y.mutable_data_ptr<T>();
    const ConvolutionShape shape = g.convolution();
    const Convolution<T> convolution(shape, {{weight.const_data_ptr<T>(), g.inputs, false}}, g.outputs);
    Channels<T> channels(g, scale, bias, eps);
    const int64_t row = round_up(g.outputs, kWidth<T>), in_size = g.height * g.width * g.inputs;
    for_slices<T>(g, [&](int64_t first, int64_t last) {
      double* parts = scratch<double>(Slot::kSums, (last - first) * g.images * 2 * row);
      for_groups(shape, shape.groups(), first, last, [&](int64_t task, int64_t, int64_t image, int64_t count, bool) {
        const int64_t unit = task * g.images + image;
        const T* in = x.const_data_ptr<T>() + unit * in_size;
        convolution.run(task, count, &in, values + unit * g.image_size());
        double* work = scratch<double>(Slot::kRows, 3 * row);
        for (int64_t i = unit; i < unit + count; ++i) {
          double* part = parts + (i - first * g.images) * 2 * row;
          image_moments(g.plane(), values + i * g.image_size(), part, part + row, work);
        }
      });
      for (int64_t task = first; task < last; ++task) {
        double* joined = moments.mutable_data_ptr<double>() + 2 * task * g.outputs;
        join_moments(g, parts + (task - first) * g.images * 2 * row, row, joined);
        channels.set(task, joined);
      }
      for_images(g, first, last, [&](int64_t task, int64_t unit) {
        const T* image = values + unit * g.image_size();
        const int64_t at = unit * g.out_size();
        if (g.pool)
          normalize_pool(g.plane(), image, channels.affine(task), slope, out.mutable_data_ptr<T>() + at,
                         selected.mutable_data_ptr<T>() + at, corners.mutable_data_ptr<uint8_t>() + at);
        else
          normalize(g.plane(), image, channels.affine(task), slope, out.mutable_data_ptr<T>() + at);
      });
    });
    y = y.permute({0, 1, 4, 2, 3});
  }
  if (g.pool) {
    selected = selected.permute({0, 1, 4, 2, 3});
    corners = corners.permute({0, 1, 4, 2, 3});
  }
  return {out.permute({0, 1, 4, 2, 3}), y, selected, corners, moments};
}

template <class T>
Tensor convolution(const Geometry& g, const Tensor& x_, const Tensor& weight_) {
  const Tensor x = channels_last(x_), weight = weight_.contiguous();
  Tensor y = empty_buffer({g.tasks, g.images, g.height, g.width, g.outputs}, x.options());
  T* values = y.mutable_data_ptr<T>();
  const ConvolutionShape shape = g.convolution();
  const Convolution<T> convolution(shape, {{weight.const_data_ptr<T>(), g.inputs, false}}, g.outputs);
  for_groups(shape, shape.groups(), 0, g.tasks, [&](int64_t task, int64_t, int64_t image, int64_t count, bool) {
    const int64_t unit = task * g.images + image;
    const T* in = x.const_data_ptr<T>() + unit * g.height * g.width * g.inputs;
    convolution.run(task, count, &in, values + unit * g.image_size());
  });
  return y.permute({0, 1, 4, 2, 3});
}

template <class T>
Tensor activation(const Geometry& g, const Tensor& y_, const Tensor& scale, const Tensor& bias, const Tensor& eps,
                  const Tensor& moments, T slope) {
  const Tensor y = channels_last(y_);
  Channels<T> channels(g, scale, bias, eps, moments);
  Tensor out = empty_buffer({g.tasks, g.images, g.height, g.width, g.outputs}, y.options());
  T* values = out.mutable_data_ptr<T>();
  for_images(g, 0, g.tasks, [&](int64_t task, int64_t unit) {
    const int64_t at = unit * g.image_size();
    normalize(g.plane(), y.const_data_ptr<T>() + at, channels.affine(task), slope, values + at);
  });
  return out.permute({0, 1, 4, 2, 3});
}

// --- first derivative ---

// deps = -1/2 sum over channels of r^2 g dg
template <class T>
Tensor epsilon_gradient(const Channels<T>& channels, const double* dscale, const at::TensorOptions& options) {
  const Geometry& g = channels.g;
  Tensor out = at::empty({g.tasks}, options);
  for (int64_t task = 0; task < g.tasks; ++task) {
    double sum = 0;
    for (int64_t i = task * g.outputs; i < (task + 1) * g.outputs; ++i)
      sum += channels.inverse[i] * channels.inverse[i] * channels.scale[i] * dscale[i];
    out.mutable_data_ptr<T>()[task] = T(-0.5 * sum);
  }
  return out;
}

template <class T>
Tensor channel_tensor(const Geometry& g, const std::vector<double>& values, const at::TensorOptions& options) {
  Tensor out = at::empty({g.tasks, g.outputs}, options);
  std::copy(values.begin(), values.end(), out.mutable_data_ptr<T>());
  return out;
}

// db, dg and, where `images` are given, the rows of the first layer's D: [T, 2 + taps, C]. One reading of q serves all.
template <class T>
Sums<T> pooled_sums(const Geometry& g, const T* q, const T* y, const T* selected, const uint8_t* corners,
                    Channels<T>& channels, T slope, const Tensor* images) {
  Sums<T> sums(g, 2 + (images ? g.taps() : 0), g.outputs);
  sums.start(0, g.tasks);
  if (images) convolution_count += g.tasks * g.images * g.out_height() * g.out_width() * g.taps() * g.outputs;
  for_images(g, 0, g.tasks, [&](int64_t task, int64_t unit) {
    const int64_t at = unit * g.out_size();
    double* part = sums.part(task, unit % g.images);
    if (g.pool)
      reduce_pooled(g.plane(), q + at, selected + at, corners + at, slope, part);
    else
      reduce_full(g.plane(), q + at, y + unit * g.image_size(), channels.affine(task), slope, part);
    if (images)
      with_dropped_bits<T>(g.precision, [&](auto dropped) {
        first_weight_gradient<dropped>(g.layer(), interleaved<T>(g, *images, unit), q + at, corners + at, slope,
                                       part + 2 * round_up(g.outputs, kWidth<T>));
      });
  });
  sums.finish(g.tasks);
  return sums;
}

// D [T, K, C] of the first layer
template <class T>
Tensor sparse_of(const Geometry& g, Sums<T>& sums) {
  Tensor out = at::empty({g.tasks, g.taps(), g.outputs}, at::kDouble);
  for (int64_t task = 0; task < g.tasks; ++task)
    std::copy(sums.row(task, 2), sums.row(task, 2) + g.taps() * g.outputs,
              out.mutable_data_ptr<double>() + task * g.taps() * g.outputs);
  return out;
}

// rows 0 to 2 of a table: k, k db / n, k dg / n
template <class T>
void fill_linear(const Channels<T>& channels, const double* dbias, const double* dscale, ChannelTable<T>& table) {
  const Geometry& g = channels.g;
  const double n = double(g.count());
  for (int64_t i = 0; i < g.tasks * g.outputs; ++i) {
    const int64_t task = i / g.outputs, c = i % g.outputs;
    const double k = channels.scale[i] * channels.inverse[i];
    table.row(task, 0)[c] = T(k);
    table.row(task, 1)[c] = T(k * dbias[i] / n);
    table.row(task, 2)[c] = T(k * dscale[i] / n);
  }
}

// The gradients of a convolution's input x [T, S, H, W, inputs] and weight, where they are needed, for a gradient of its
// output that f(task, task * images + image, out) writes: an image of it is used while it is in the cache, and never
// stored.
template <class T, class F>
std::pair<Tensor, Tensor> push(const Geometry& g, const Tensor& x, const Tensor& weight, bool need_x, bool need_weight,
                               const F& f) {
  const ConvolutionShape shape = g.convolution();
  Tensor dx = nothing(x), dweight = nothing(x);
  std::optional<Convolution<T>> convolution;
  std::optional<WeightGradient<T>> correlation;
  const int64_t in_size = g.height * g.width * g.inputs;
  if (need_x) {
    dx = empty_buffer({g.tasks, g.images, g.height, g.width, g.inputs}, x.options());
    convolution.emplace(shape, std::vector<typename Convolution<T>::Term>{{weight.const_data_ptr<T>(), g.outputs, true}},
                        g.inputs);
  }
  if (need_weight) {
    dweight = at::empty({g.tasks, g.outputs, g.inputs, g.kernel, g.kernel}, x.options());
    correlation.emplace(shape, g.inputs, g.outputs);
  }
  const int64_t parts = need_weight ? WeightGradient<T>::parts(shape, g.inputs, g.outputs) : shape.groups();
  for_groups(shape, parts, 0, g.tasks, [&](int64_t task, int64_t part, int64_t image, int64_t count, bool begin) {
    const int64_t unit = task * g.images + image;
    T* dy = scratch<T>(Slot::kGradient, count * g.image_size());
    for (int64_t i = 0; i < count; ++i) f(task, unit + i, dy + i * g.image_size());
    const T* in = dy;
    if (need_x) convolution->run(task, count, &in, dx.mutable_data_ptr<T>() + unit * in_size);
    if (need_weight) correlation->add(task, part, count, x.const_data_ptr<T>() + unit * in_size, dy, begin);
  });
  if (need_x) dx = dx.permute({0, 1, 4, 2, 3});
  if (need_weight) correlation->finish(0, g.tasks, dweight.mutable_data_ptr<T>());
  return {dx, dweight};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Geometry& g, const Tensor& q_, const OptionalTensor& y_gradient, const Tensor& x_, const Tensor& weight_,
    const Tensor& scale, const Tensor& bias, const Tensor& eps, const Tensor& y_, const Tensor& selected_,
    const Tensor& corners_, const Tensor& moments, T slope, const std::optional<Patches>& patches, bool need_x,
    bool need_weight) {
  const auto options = x_.options();
  const Tensor q = channels_last(q_), y = channels_last(y_), selected = channels_last(selected_);
  const Tensor corners = channels_last(corners_), weight = weight_.contiguous();
  Channels<T> channels(g, scale, bias, eps, moments);
  const T* q_data = q.const_data_ptr<T>();
  const uint8_t* corner_data = corners.const_data_ptr<uint8_t>();
  Sums<T> sums = pooled_sums(g, q_data, y.const_data_ptr<T>(), selected.const_data_ptr<T>(), corner_data, channels,
                             slope, patches && need_weight ? &x_ : nullptr);
  std::vector<double> dbias, dscale;  // [T, C]
  for (int64_t task = 0; task < g.tasks; ++task) {
    dbias.insert(dbias.end(), sums.row(task, 0), sums.row(task, 0) + g.outputs);
    dscale.insert(dscale.end(), sums.row(task, 1), sums.row(task, 1) + g.outputs);
  }
  Tensor dx = nothing(x_), dweight = nothing(x_), sparse = at::empty({0}, options.dtype(at::kDouble));
  if (patches && need_weight) {
    sparse = sparse_of(g, sums);
    const PatchProducts p = patch_products(g, weight.const_data_ptr<T>(), patches->mean.const_data_ptr<double>(),
                                           patches->covariance.const_data_ptr<double>());
    dweight = at::empty_like(weight, at::MemoryFormat::Contiguous);
    const int64_t taps = g.taps(), row = sparse.size(2);
    for (int64_t i = 0; i < g.tasks * g.outputs; ++i) {
      const int64_t task = i / g.outputs, c = i % g.outputs;
      const double* mu = patches->mean.const_data_ptr<double>() + task * taps;
      const double* d = sparse.const_data_ptr<double>() + task * taps * row + c;
      const double k = channels.scale[i] * channels.inverse[i];
      for (int64_t t = 0; t < taps; ++t)
        dweight.mutable_data_ptr<T>()[i * taps + t] =
            T(k * (d[t * row] - dbias[i] * mu[t] - dscale[i] * channels.inverse[i] * p.turned[i * taps + t]));
    }
  } else if (!patches && (need_x || need_weight)) {
    ChannelTable<T> table(g.tasks, 3, g.outputs);
    fill_linear(channels, dbias.data(), dscale.data(), table);
    const bool more = given(y_gradient);
    const Tensor other = more ? channels_last(*y_gradient) : y;
    auto image_gradient = [&](int64_t task, int64_t unit, T* out) {
      const Linear<T> linear{table.row(task, 0), table.row(task, 1), table.row(task, 2)};
      const int64_t at = unit * g.out_size(), full = unit * g.image_size();
      const T* image = y.const_data_ptr<T>() + full;
      const T* extra = other.const_data_ptr<T>() + full;
      const Affine<T> affine = channels.affine(task);
      if (g.pool && more)
        gradient_pooled<T, true>(g.plane(), q_data + at, corner_data + at, image, affine, linear, slope, extra, out);
      else if (g.pool)
        gradient_pooled<T, false>(g.plane(), q_data + at, corner_data + at, image, affine, linear, slope, extra, out);
      else if (more)
        gradient_full<T, true>(g.plane(), q_data + at, image, affine, linear, slope, extra, out);
      else
        gradient_full<T, false>(g.plane(), q_data + at, image, affine, linear, slope, extra, out);
    };
    std::tie(dx, dweight) = push<T>(g, channels_last(x_), weight, need_x, need_weight, image_gradient);
  }
  return {dx,
          dweight,
          channel_tensor<T>(g, dscale, options),
          channel_tensor<T>(g, dbias, options),
          epsilon_gradient(channels, dscale.data(), options),
          sparse};
}

// --- second derivative ---

// the numbers of MATH.md 1 that follow from the three reductions, one set a channel
struct SecondChannel {
  double of_unit, q, scale, a, d, s0, s1, r;
};

inline SecondChannel second_channel(double n, double inverse, double scale, double dbias, double dscale, double su,
                                    double su_unit, double su_dz, double on_scale, double on_eps) {
  const double k = scale * inverse, r2 = inverse * inverse;
  SecondChannel s{};
  s.of_unit = on_scale - 0.5 * on_eps * r2 * scale;
  s.q = su_dz - su * dbias / n - su_unit * dscale / n;
  s.scale = inverse * s.q - 0.5 * on_eps * r2 * dscale;
  s.a = -k * dscale / n;
  s.d = -k * su_unit / n + s.of_unit;
  s.s0 = s.a * su + s.d * dbias;
  s.s1 = s.a * su_unit + s.d * dscale;
  s.r = s.s1 + k * s.q - on_eps * r2 * scale * dscale;
  return s;
}

template <class T>
std::vector<double> as_double(const OptionalTensor& tensor, int64_t count) {
  std::vector<double> out(static_cast<size_t>(count), 0.0);
  if (given(tensor)) {
    const Tensor values = tensor->contiguous();
    std::copy(values.const_data_ptr<T>(), values.const_data_ptr<T>() + count, out.begin());
  }
  return out;
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> double_backward(
    const Geometry& g, const OptionalTensor& on_x, const OptionalTensor& on_weight, const OptionalTensor& on_scale,
    const OptionalTensor& on_bias, const OptionalTensor& on_eps, const Tensor& q_, const Tensor& x_,
    const Tensor& weight_, const Tensor& scale, const Tensor& bias, const Tensor& eps, const Tensor& y_,
    const Tensor& selected_, const Tensor& corners_, const Tensor& moments, const Tensor& dscale_,
    const Tensor& dbias_, const Tensor& sparse_, T slope, const std::optional<Patches>& patches, bool need_x,
    bool need_weight) {
  const auto options = x_.options();
  const int64_t channels_in_all = g.tasks * g.outputs;
  const double n = double(g.count());
  const Tensor q = channels_last(q_), y = channels_last(y_), selected = channels_last(selected_);
  const Tensor corners = channels_last(corners_), weight = weight_.contiguous();
  const T* q_data = q.const_data_ptr<T>();
  const T* y_data = y.const_data_ptr<T>();
  const T* selected_data = selected.const_data_ptr<T>();
  const uint8_t* corner_data = corners.const_data_ptr<uint8_t>();
  Channels<T> channels(g, scale, bias, eps, moments);
  const auto dscale = as_double<T>(dscale_, channels_in_all), dbias = as_double<T>(dbias_, channels_in_all);
  const auto cotangent_scale = as_double<T>(on_scale, channels_in_all);
  const auto cotangent_bias = as_double<T>(on_bias, channels_in_all);
  const auto cotangent_eps = as_double<T>(on_eps, g.tasks);
  const Tensor direction = given(on_weight) ? on_weight->contiguous() : Tensor();

  // u and its three sums [T, C]
  std::vector<double> su(size_t(channels_in_all), 0.0), su_unit = su, su_dz = su;
  Tensor u;  // [T, S, H, W, C]; in the first layer never stored
  PatchProducts of_weight, of_direction;
  Tensor sparse = sparse_;
  const int64_t taps = g.taps();
  if (patches) {
    const double* mu = patches->mean.const_data_ptr<double>();
    const double* sigma = patches->covariance.const_data_ptr<double>();
    of_weight = patch_products(g, weight.const_data_ptr<T>(), mu, sigma);
    // a first derivative in epsilon alone did not need it
    if (sparse_.dim() != 3 && (need_weight || direction.defined())) {
      Sums<T> sums = pooled_sums(g, q_data, y_data, selected_data, corner_data, channels, slope, &x_);
      sparse = sparse_of(g, sums);
    }
    if (direction.defined()) {
      of_direction = patch_products(g, direction.const_data_ptr<T>(), mu, sigma);
      const int64_t row = g.outputs;
      for (int64_t i = 0; i < channels_in_all; ++i) {
        su[i] = n * of_direction.mean[i];
        const double* d = sparse.const_data_ptr<double>() + i / g.outputs * taps * row + i % g.outputs;
        for (int64_t t = 0; t < taps; ++t) {
          const double w = double(direction.const_data_ptr<T>()[i * taps + t]);
          su_unit[i] += n * channels.inverse[i] * w * of_weight.turned[i * taps + t];
          su_dz[i] += w * d[t * row];
        }
      }
    }
  } else {
    std::vector<typename Convolution<T>::Term> terms;
    std::vector<Tensor> inputs;
    if (given(on_x)) {
      inputs.push_back(channels_last(*on_x));
      terms.push_back({weight.const_data_ptr<T>(), g.inputs, false});
    }
    if (direction.defined()) {
      inputs.push_back(channels_last(x_));
      terms.push_back({direction.const_data_ptr<T>(), g.inputs, false});
    }
    if (!terms.empty()) {
      u = empty_buffer({g.tasks, g.images, g.height, g.width, g.outputs}, options);
      T* u_data = u.mutable_data_ptr<T>();
      const ConvolutionShape shape = g.convolution();
      const Convolution<T> convolution(shape, terms, g.outputs);
      Sums<T> sums(g, 3, g.outputs);
      sums.start(0, g.tasks);
      for_groups(shape, shape.groups(), 0, g.tasks,
                 [&](int64_t task, int64_t, int64_t first, int64_t count, bool) {
                   const int64_t start = task * g.images + first;
                   const T* in[2] = {};
                   for (size_t s = 0; s < inputs.size(); ++s)
                     in[s] = inputs[s].const_data_ptr<T>() + start * g.height * g.width * g.inputs;
                   convolution.run(task, count, in, u_data + start * g.image_size());
                   for (int64_t unit = start; unit < start + count; ++unit) {
                     const int64_t at = unit * g.out_size(), full = unit * g.image_size();
                     double* part = sums.part(task, unit % g.images);
                     const Affine<T> affine = channels.affine(task);
                     if (g.pool)
                       second_reduce_pooled(g.plane(), u_data + full, y_data + full, q_data + at, corner_data + at,
                                            affine, slope, part);
                     else
                       second_reduce_full(g.plane(), u_data + full, y_data + full, q_data + at, affine, slope, part);
                   }
                 });
      sums.finish(g.tasks);
      for (int64_t i = 0; i < channels_in_all; ++i) {
        const int64_t task = i / g.outputs, c = i % g.outputs;
        su[i] = sums.row(task, 0)[c];
        su_unit[i] = sums.row(task, 1)[c];
        su_dz[i] = sums.row(task, 2)[c];
      }
    }
  }

  ChannelTable<T> table(g.tasks, 11, g.outputs);
  fill_linear(channels, dbias.data(), dscale.data(), table);
  std::vector<SecondChannel> seconds(static_cast<size_t>(channels_in_all));
  Tensor scale_gradient = at::empty({g.tasks, g.outputs}, options), eps_gradient = at::empty({g.tasks}, options);
  for (int64_t task = 0; task < g.tasks; ++task) {
    double sum = 0;
    for (int64_t c = 0; c < g.outputs; ++c) {
      const int64_t i = task * g.outputs + c;
      const double inverse = channels.inverse[i];
      const SecondChannel s = seconds[i] =
          second_channel(n, inverse, channels.scale[i], dbias[i], dscale[i], su[i], su_unit[i], su_dz[i],
                         cotangent_scale[i], cotangent_eps[task]);
      const double rows[] = {su[i] / n,       su_unit[i] / n,  s.of_unit,          cotangent_bias[i],
                             inverse * s.a,   inverse * s.d,   inverse * s.s0 / n, inverse * s.r / n};
      for (int64_t row = 0; row < 8; ++row) table.row(task, 3 + row)[c] = T(rows[row]);
      scale_gradient.mutable_data_ptr<T>()[i] = T(s.scale);
      sum += inverse * inverse * s.r;
    }
    eps_gradient.mutable_data_ptr<T>()[task] = T(-0.5 * sum);
  }

  Tensor q_gradient = empty_buffer({g.tasks, g.images, g.out_height(), g.out_width(), g.outputs}, options);
  T* q_out = q_gradient.mutable_data_ptr<T>();
  Tensor x_gradient = nothing(x_), weight_gradient_ = nothing(x_), y_gradient = nothing(x_);
  auto second = [&](int64_t task) {
    auto row = [&](int64_t index) { return table.row(task, index); };
    return Second<T>{{row(0), row(1), row(2)}, row(3), row(4), row(5), row(6), row(7), row(8), row(9), row(10)};
  };
  if (patches) {
    const T* packed = nullptr;
    if (direction.defined()) {
      packed = taps_of(g, direction.const_data_ptr<T>());
      convolution_count += g.tasks * g.images * g.out_height() * g.out_width() * taps * g.outputs;
    }
    const int64_t weight_size = taps * round_up(g.outputs, kWidth<T>);
    for_images(g, 0, g.tasks, [&](int64_t task, int64_t unit) {
      const int64_t at = unit * g.out_size();
      T* at_corners = nullptr;  // u at the arg-max
      if (packed) {
        at_corners = scratch<T>(Slot::kGradient, g.out_size());
        first_select(g.layer(), interleaved<T>(g, x_, unit), packed + task * weight_size, corner_data + at, at_corners);
      }
      first_second(g.plane(), at_corners, selected_data + at, corner_data + at, second(task), slope, q_out + at);
    });
    if (need_weight) {
      weight_gradient_ = at::empty_like(weight, at::MemoryFormat::Contiguous);
      for (int64_t i = 0; i < channels_in_all; ++i) {
        const SecondChannel& s = seconds[i];
        const double* mu = patches->mean.const_data_ptr<double>() + i / g.outputs * taps;
        const double* d = sparse.const_data_ptr<double>() + i / g.outputs * taps * g.outputs + i % g.outputs;
        const double inverse = channels.inverse[i];
        for (int64_t t = 0; t < taps; ++t) {
          double value = s.d * d[t * g.outputs] - s.s0 * mu[t] - s.r * inverse * of_weight.turned[i * taps + t];
          if (direction.defined())
            value += s.a * n * (of_direction.turned[i * taps + t] + of_direction.mean[i] * mu[t]);
          weight_gradient_.mutable_data_ptr<T>()[i * taps + t] = T(inverse * value);
        }
      }
    }
  } else {
    const bool want_dx = need_x && direction.defined(), want_dw = need_weight && given(on_x);
    y_gradient = empty_buffer({g.tasks, g.images, g.height, g.width, g.outputs}, options);
    T* y_out = y_gradient.mutable_data_ptr<T>();
    const bool has_u = u.defined();
    auto image_second = [&](auto with_u, auto with_dy, int64_t task, int64_t unit, T* dy) {
      const int64_t at = unit * g.out_size(), full = unit * g.image_size();
      const T* u_data = with_u ? u.const_data_ptr<T>() + full : nullptr;
      const Affine<T> affine = channels.affine(task);
      if (g.pool)
        second_pooled<T, with_u, with_dy>(g.plane(), u_data, y_data + full, q_data + at, selected_data + at,
                                          corner_data + at, affine, second(task), slope, q_out + at, y_out + full, dy);
      else
        second_full<T, with_u, with_dy>(g.plane(), u_data, y_data + full, q_data + at, affine, second(task), slope,
                                        q_out + at, y_out + full, dy);
    };
    if (want_dx || want_dw) {
      const Tensor on = want_dw ? channels_last(*on_x) : x_;
      std::tie(x_gradient, weight_gradient_) =
          push<T>(g, on, want_dx ? direction : weight, want_dx, want_dw, [&](int64_t task, int64_t unit, T* dy) {
            image_second(std::true_type(), std::true_type(), task, unit, dy);
          });
    } else {
      for_images(g, 0, g.tasks, [&](int64_t task, int64_t unit) {
        if (has_u)
          image_second(std::true_type(), std::false_type(), task, unit, static_cast<T*>(nullptr));
        else
          image_second(std::false_type(), std::false_type(), task, unit, static_cast<T*>(nullptr));
      });
    }
    y_gradient = y_gradient.permute({0, 1, 4, 2, 3});
  }
  return {q_gradient.permute({0, 1, 4, 2, 3}), x_gradient, weight_gradient_, scale_gradient, eps_gradient, y_gradient};
}

std::optional<Patches> patches_of(const OptionalTensor& mean, const OptionalTensor& covariance) {
  if (!given(mean)) return std::nullopt;
  return Patches(mean, covariance);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv_block(const Tensor& x, const Tensor& weight,
                                                              const Tensor& scale, const Tensor& bias,
                                                              const Tensor& eps, double slope, bool pool,
                                                              const OptionalTensor& patch_mean,
                                                              const OptionalTensor& patch_covariance,
                                                              Precision precision) {
  const Geometry g(x, weight, pool, given(patch_mean), precision);
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> result;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "conv_block", [&] {
    result = forward<scalar_t>(g, x, weight, scale, bias, eps, scalar_t(slope), patches_of(patch_mean, patch_covariance));
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv_block_backward(
    const Tensor& q, const OptionalTensor& y_gradient, const Tensor& x, const Tensor& weight, const Tensor& scale,
    const Tensor& bias, const Tensor& eps, const Tensor& y, const Tensor& selected, const Tensor& corners,
    const Tensor& moments, double slope, bool pool, const OptionalTensor& patch_mean,
    const OptionalTensor& patch_covariance, bool need_x, bool need_weight, Precision precision) {
  const Geometry g(x, weight, pool, given(patch_mean), precision);
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> result;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "conv_block_backward", [&] {
    result = backward<scalar_t>(g, q, y_gradient, x, weight, scale, bias, eps, y, selected, corners, moments,
                                scalar_t(slope), patches_of(patch_mean, patch_covariance), need_x, need_weight);
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv_block_double_backward(
    const OptionalTensor& on_x, const OptionalTensor& on_weight, const OptionalTensor& on_scale,
    const OptionalTensor& on_bias, const OptionalTensor& on_eps, const Tensor& q, const Tensor& x,
    const Tensor& weight, const Tensor& scale, const Tensor& bias, const Tensor& eps, const Tensor& y,
    const Tensor& selected, const Tensor& corners, const Tensor& moments, const Tensor& dscale, const Tensor& dbias,
    const Tensor& sparse, double slope, bool pool, const OptionalTensor& patch_mean,
    const OptionalTensor& patch_covariance, bool need_x, bool need_weight, Precision precision) {
  const Geometry g(x, weight, pool, given(patch_mean), precision);
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> result;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "conv_block_double_backward", [&] {
    result = double_backward<scalar_t>(g, on_x, on_weight, on_scale, on_bias, on_eps, q, x, weight, scale, bias, eps, y,
                                       selected, corners, moments, dscale, dbias, sparse, scalar_t(slope),
                                       patches_of(patch_mean, patch_covariance), need_x, need_weight);
  });
  return result;
}

Tensor conv_block_convolution(const Tensor& x, const Tensor& weight, Precision precision) {
  const Geometry g(x, weight, false, false, precision);
  Tensor y;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "conv_block_convolution", [&] { y = convolution<scalar_t>(g, x, weight); });
  return y;
}

Tensor conv_block_activation(const Tensor& y, const Tensor& scale, const Tensor& bias, const Tensor& eps,
                             const Tensor& moments, double slope) {
  const Geometry g(y, y.size(2));
  Tensor out;
  AT_DISPATCH_FLOATING_TYPES(y.scalar_type(), "conv_block_activation", [&] {
    out = activation<scalar_t>(g, y, scale, bias, eps, moments, scalar_t(slope));
  });
  return out;
}

}  // namespace cxgrad
