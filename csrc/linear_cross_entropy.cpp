#include "linear_cross_entropy.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "buffers.h"
#include "simd.h"
#include "wide.h"

namespace cxgrad {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

namespace {

// Blocks, and with them every sum's order, depend on the sizes alone: the same bits for any number of threads.
constexpr int64_t kImages = 20;     // images whose logits are one piece of work
constexpr int64_t kFeatures = 512;  // features whose gradients are
constexpr int64_t kDepth = 1024;    // features of all rows that stay in the cache
constexpr int64_t kTerms = 128;     // rows summed in registers
constexpr int64_t kWork = 1 << 17;  // multiplications that are worth another thread
constexpr int64_t kExponential = 16;  // multiplications that one costs

// of a block in registers
constexpr int kImageTile = kRegisters == 32 ? 4 : 2;
constexpr int kRowTile = 5;
constexpr int kVectorTile = kRegisters == 32 ? 4 : 2;

struct Sizes {
  int64_t tasks, images, ways, features;

  Sizes(const Tensor& x, const Tensor& weight)
      : tasks(x.size(0)), images(x.size(1)), ways(weight.size(1)), features(weight.size(2)) {}
};

// --- how features lie ---

Tensor features_in_order(const Tensor& x) { return x.dim() == 5 ? x.permute({0, 1, 3, 4, 2}) : x; }

// a weight [T, N, D] in the same order
Tensor features_in_order_of(const Tensor& x, const Tensor& weight) {
  return x.dim() == 5 ? features_in_order(weight.unflatten(2, x.sizes().slice(2))) : weight;
}

template <class T>
struct Rows {
  const T* data = nullptr;
  int64_t task = 0, row = 0;  // strides

  explicit operator bool() const { return data; }
  const T* at(int64_t t, int64_t r = 0) const { return data + t * task + r * row; }
};

// Rows of features of every task, features side by side: copied where they are not. Strides of tasks and rows are free,
// and what is expanded over tasks stays one.
class Operand {
 public:
  Operand() = default;
  explicit Operand(const Tensor& ordered) {
    const bool expanded = ordered.size(0) > 1 && ordered.stride(0) == 0;
    held_ = expanded ? ordered.narrow(0, 0, 1) : ordered;
    int64_t next = 1;
    bool dense = true;
    for (int64_t axis = held_.dim() - 1; axis >= 2; next *= held_.size(axis--))
      dense = dense && (held_.size(axis) == 1 || held_.stride(axis) == next);
    if (!dense) held_ = held_.contiguous();
    task_ = expanded ? 0 : held_.stride(0);
  }

  static Operand of(const OptionalTensor& x) { return x ? Operand(features_in_order(*x)) : Operand(); }
  static Operand of(const OptionalTensor& weight, const Tensor& x) {
    return weight ? Operand(features_in_order_of(x, *weight)) : Operand();
  }

  template <class T>
  Rows<T> rows() const {
    return held_.defined() ? Rows<T>{held_.const_data_ptr<T>(), task_, held_.stride(1)} : Rows<T>{};
  }

 private:
  Tensor held_;
  int64_t task_ = 0;
};

Tensor nothing(const Tensor& like) { return at::empty({0}, like.options()); }

// what a gradient of x is written to, with its rows in order
Tensor empty_ordered(const Tensor& x) { return empty_buffer(features_in_order(x).sizes(), x.options()); }

Tensor back_from_order(const Tensor& ordered) {
  return ordered.dim() == 5 ? ordered.permute({0, 1, 4, 2, 3}) : ordered;
}

// the gradient of a weight, [T, N, D], from one with its features in order
Tensor weight_from_order(const Tensor& ordered, const Tensor& x) {
  if (x.dim() != 5) return ordered;
  const std::vector<int64_t> sizes{ordered.size(0), ordered.size(1), x.size(3), x.size(4), x.size(2)};
  return back_from_order(ordered.view(sizes)).reshape(ordered.sizes());
}

// --- sums of products ---

// calls f(the smaller of count and Most, as a constant)
template <int Most, class F>
inline int64_t with_constant(int64_t count, const F& f) {
  const int found = int(std::min<int64_t>(count, Most));
  unrolled<Most>([&](auto i) CXGRAD_INLINE {
    if (found == i + 1) f(std::integral_constant<int, i + 1>());
  });
  return found;
}

// out[i][j] += <a_i, b_j> in float64, where products of float32 numbers are exact
template <class T, int I, int J>
void add_tile(const T* a, int64_t a_row, const T* b, int64_t b_row, int64_t depth, double* out, int64_t out_row) {
  constexpr int64_t W = kWidth<double>;
  Vec<double> sums[I][J] = {};
  const auto step = [&](int64_t d, int64_t lanes) CXGRAD_INLINE {
    Vec<double> right[J];
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) right[j] = load_wide(b + j * b_row + d, lanes);
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i) {
      const Vec<double> left = load_wide(a + i * a_row + d, lanes);
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) sums[i][j] += left * right[j];
    }
  };
  int64_t d = 0;
  for (; d + W <= depth; d += W) step(d, W);
  if (d < depth) step(d, depth - d);
#pragma GCC unroll 8
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) out[i * out_row + j] += sum(sums[i][j]);
}

// out [rows, ways] += a b^T
template <class T>
void add_products(const T* a, int64_t a_row, int64_t rows, const T* b, int64_t b_row, int64_t ways, int64_t features,
                  double* out) {
  for (int64_t d = 0; d < features; d += kDepth) {
    const int64_t depth = std::min(kDepth, features - d);
    for (int64_t i = 0; i < rows;)
      i += with_constant<kImageTile>(rows - i, [&](auto I) {
        for (int64_t j = 0; j < ways;)
          j += with_constant<kRowTile>(ways - j, [&](auto J) {
            add_tile<T, I, J>(a + i * a_row + d, a_row, b + j * b_row + d, b_row, depth, out + i * ways + j, ways);
          });
      });
  }
}

// a sum over k of factors[i * row + k * next] times row k
template <class T>
struct Terms {
  const T* factors;
  int64_t row, next;
  const T* rows;
  int64_t rows_stride, count;
};

template <class T, int I, int V>
inline __attribute__((always_inline)) void combine_tile(const Terms<T>& terms, int64_t first, int64_t last, int64_t i,
                                                        int64_t d, T* out, int64_t out_row, int lanes, bool add) {
  constexpr int W = kWidth<T>;
  Vec<T> sums[I][V] = {};
  for (int64_t k = first; k < last; ++k) {
    Vec<T> row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) row[v] = load(terms.rows + k * terms.rows_stride + d + v * W, lanes);
#pragma GCC unroll 8
    for (int r = 0; r < I; ++r) {
      const Vec<T> factor = broadcast(terms.factors[(i + r) * terms.row + k * terms.next]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[r][v] += factor * row[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < I; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      T* to = out + (i + r) * out_row + d + v * W;
      store(to, add ? load(to, lanes) + sums[r][v] : sums[r][v], lanes);
    }
}

// features from..to of `rows` rows of out = the terms' sum, added to what is there where `add` is set
template <class T>
void combine(const Terms<T>& terms, int64_t rows, int64_t from, int64_t to, T* out, int64_t out_row, bool add) {
  constexpr int W = kWidth<T>;
  for (int64_t k = 0; k < terms.count; k += kTerms, add = true) {
    const int64_t end = std::min(terms.count, k + kTerms);
    int64_t d = from;
    while (d + W <= to)
      d += W * with_constant<kVectorTile>((to - d) / W, [&](auto V) {
             for (int64_t i = 0; i < rows;)
               i += with_constant<kRowTile>(
                   rows - i, [&](auto I) { combine_tile<T, I, V>(terms, k, end, i, d, out, out_row, W, add); });
           });
    if (d == to) continue;
    for (int64_t i = 0; i < rows;)
      i += with_constant<kRowTile>(
          rows - i, [&](auto I) { combine_tile<T, I, 1>(terms, k, end, i, d, out, out_row, int(to - d), add); });
  }
}

// features from..to of a sum of up to two lists of terms
template <class T>
void combine(const std::vector<Terms<T>>& lists, int64_t rows, int64_t from, int64_t to, T* out, int64_t out_row) {
  for (size_t l = 0; l < lists.size(); ++l) combine(lists[l], rows, from, to, out, out_row, l > 0);
  if (lists.empty())
    for (int64_t i = 0; i < rows; ++i) std::fill(out + i * out_row + from, out + i * out_row + to, T(0));
}

// calls f(number of the block, task, from, to) for all blocks of `size` of 0..count of all tasks; `work` is one's
template <class F>
void for_blocks(int64_t tasks, int64_t count, int64_t size, int64_t work, const F& f) {
  const int64_t blocks = blocks_of(count, size);
  const int64_t grain = std::max<int64_t>(1, kWork / (work * std::min(count, size)));
  at::parallel_for(0, tasks * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t from = block % blocks * size;
      f(block, block / blocks, from, std::min(count, from + size));
    }
  });
}

// --- softmax ---

// p = softmax of one image's logits; the loss is returned
double softmax(const double* logits, int64_t ways, int64_t label, double* p) {
  double largest = logits[0], others = 0;
  for (int64_t n = 1; n < ways; ++n) largest = std::max(largest, logits[n]);
  for (int64_t n = 0; n < ways; ++n) {
    p[n] = std::exp(logits[n] - largest);
    if (n != label) others += p[n];
  }
  const double total = others + p[label];
  const double loss = p[label] == 1 ? std::log1p(others) : std::log(total) + (largest - logits[label]);
  for (int64_t n = 0; n < ways; ++n) p[n] /= total;
  return loss;
}

// p with 1 taken from the label's, as a sum that does not cancel
void subtract_label(const double* p, int64_t ways, int64_t label, double* out) {
  double others = 0;
  for (int64_t n = 0; n < ways; ++n) {
    out[n] = p[n];
    if (n != label) others += p[n];
  }
  out[label] = -others;
}

template <class T>
struct Given {  // to all derivatives, of all tasks
  const int64_t* labels;
  const double* probabilities;
  const T* losses_gradient;  // null: none
  int64_t losses_stride;
  const T* logits_gradient;  // null: none

  Given(const Tensor& labels, const Tensor& probabilities, const OptionalTensor& of_losses,
        const OptionalTensor& of_logits)
      : labels(labels.const_data_ptr<int64_t>()),
        probabilities(probabilities.const_data_ptr<double>()),
        losses_gradient(of_losses ? of_losses->const_data_ptr<T>() : nullptr),
        losses_stride(of_losses ? of_losses->stride(0) : 0),
        logits_gradient(of_logits ? of_logits->const_data_ptr<T>() : nullptr) {}

  // u / S of a task
  double factor(int64_t task, int64_t images) const {
    return losses_gradient ? double(losses_gradient[task * losses_stride]) / double(images) : 0;
  }

  // e of image s of all, the logits' whole gradient: factor * difference + logits_gradient
  double logit_gradient(double factor, double difference, int64_t s, int64_t ways, int64_t n) const {
    const double value = losses_gradient ? factor * difference : 0;
    return logits_gradient ? value + double(logits_gradient[s * ways + n]) : value;
  }
};

OptionalTensor contiguous(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(tensor->contiguous()) : std::nullopt;
}

// [T, N] from sums over the images of each block
template <class T>
void write_sums(const std::vector<double>& parts, const Sizes& sizes, int64_t width, T* out) {
  const int64_t blocks = blocks_of(sizes.images, kImages);
  for (int64_t t = 0; t < sizes.tasks; ++t)
    for (int64_t n = 0; n < width; ++n) {
      double total = 0;
      for (int64_t block = 0; block < blocks; ++block) total += parts[(t * blocks + block) * width + n];
      out[t * width + n] = T(total);
    }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy(const Tensor& x, const Tensor& weight, const Tensor& bias_,
                                                        const Tensor& labels_) {
  const Sizes sizes(x, weight);
  const int64_t images = sizes.images, ways = sizes.ways;
  const Operand of_x = Operand::of(x), of_weight = Operand::of(weight, x);
  const Tensor bias = bias_.contiguous(), labels = labels_.contiguous();
  Tensor losses = at::empty({sizes.tasks}, x.options());
  Tensor logits = empty_buffer({sizes.tasks, images, ways}, x.options());
  Tensor probabilities = empty_buffer(logits.sizes(), x.options().dtype(at::kDouble));
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "linear_cross_entropy", [&] {
    const auto a = of_x.rows<scalar_t>(), b = of_weight.rows<scalar_t>();
    const scalar_t* biases = bias.const_data_ptr<scalar_t>();
    const int64_t* label = labels.const_data_ptr<int64_t>();
    scalar_t* to_logits = logits.mutable_data_ptr<scalar_t>();
    double* to_probabilities = probabilities.mutable_data_ptr<double>();
    std::vector<double> parts(sizes.tasks * blocks_of(images, kImages));
    const int64_t work = ways * (sizes.features + kExponential);
    for_blocks(sizes.tasks, images, kImages, work, [&](int64_t block, int64_t t, int64_t from, int64_t to) {
      std::vector<double> z((to - from) * ways);
      for (int64_t i = 0; i < to - from; ++i)
        for (int64_t n = 0; n < ways; ++n) z[i * ways + n] = double(biases[t * ways + n]);
      add_products(a.at(t, from), a.row, to - from, b.at(t), b.row, ways, sizes.features, z.data());
      double total = 0;
      for (int64_t s = t * images + from, i = 0; i < to - from; ++s, ++i) {
        const double* row = z.data() + i * ways;
        total += softmax(row, ways, label[s], to_probabilities + s * ways);
        for (int64_t n = 0; n < ways; ++n) to_logits[s * ways + n] = scalar_t(row[n]);
      }
      parts[block] = total / double(images);
    });
    write_sums(parts, sizes, 1, losses.mutable_data_ptr<scalar_t>());
  });
  return {losses, logits, probabilities};
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward(const OptionalTensor& losses_gradient,
                                                                 const OptionalTensor& logits_gradient_,
                                                                 const Tensor& x, const Tensor& weight,
                                                                 const Tensor& labels_, const Tensor& probabilities_,
                                                                 bool need_x, bool need_weight) {
  const Sizes sizes(x, weight);
  const int64_t images = sizes.images, ways = sizes.ways, features = sizes.features;
  const Operand of_x = need_weight ? Operand::of(x) : Operand();
  const Operand of_weight = need_x ? Operand::of(weight, x) : Operand();
  const Tensor labels = labels_.contiguous(), probabilities = probabilities_.contiguous();
  const OptionalTensor logits_gradient = contiguous(logits_gradient_);
  Tensor dx = need_x ? empty_ordered(x) : nothing(x);
  Tensor dweight = need_weight ? empty_buffer(weight.sizes(), x.options()) : nothing(x);
  Tensor dbias = at::empty({sizes.tasks, ways}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "linear_cross_entropy_backward", [&] {
    const Given<scalar_t> given(labels, probabilities, losses_gradient, logits_gradient);
    std::vector<scalar_t> e(sizes.tasks * images * ways);
    std::vector<double> parts(sizes.tasks * blocks_of(images, kImages) * ways);
    for_blocks(sizes.tasks, images, kImages, ways, [&](int64_t block, int64_t t, int64_t from, int64_t to) {
      std::vector<double> difference(ways);
      const double factor = given.factor(t, images);
      for (int64_t s = t * images + from; s < t * images + to; ++s) {
        subtract_label(given.probabilities + s * ways, ways, given.labels[s], difference.data());
        for (int64_t n = 0; n < ways; ++n) {
          const double value = given.logit_gradient(factor, difference[n], s, ways, n);
          e[s * ways + n] = scalar_t(value);
          parts[block * ways + n] += value;
        }
      }
    });
    write_sums(parts, sizes, ways, dbias.mutable_data_ptr<scalar_t>());
    if (!need_x && !need_weight) return;
    const auto a = of_x.rows<scalar_t>(), b = of_weight.rows<scalar_t>();
    scalar_t* to_x = dx.mutable_data_ptr<scalar_t>();
    scalar_t* to_weight = dweight.mutable_data_ptr<scalar_t>();
    for_blocks(sizes.tasks, features, kFeatures, 2 * images * ways, [&](int64_t, int64_t t, int64_t from, int64_t to) {
      const scalar_t* factors = e.data() + t * images * ways;
      if (need_x)
        combine(Terms<scalar_t>{factors, ways, 1, b.at(t), b.row, ways}, images, from, to,
                to_x + t * images * features, features, false);
      if (need_weight)
        combine(Terms<scalar_t>{factors, 1, ways, a.at(t), a.row, images}, ways, from, to,
                to_weight + t * ways * features, features, false);
    });
  });
  return {need_x ? back_from_order(dx) : dx, need_weight ? weight_from_order(dweight, x) : dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_double_backward(
    const OptionalTensor& on_x, const OptionalTensor& on_weight, const OptionalTensor& on_bias_,
    const OptionalTensor& losses_gradient, const OptionalTensor& logits_gradient_, const Tensor& x,
    const Tensor& weight, const Tensor& labels_, const Tensor& probabilities_, bool need_x, bool need_weight) {
  const Sizes sizes(x, weight);
  const int64_t images = sizes.images, ways = sizes.ways, features = sizes.features;
  const bool with_losses = losses_gradient.has_value();
  const Operand of_x = on_weight || (need_weight && with_losses) ? Operand::of(x) : Operand();
  const Operand of_weight = on_x || (need_x && with_losses) ? Operand::of(weight, x) : Operand();
  const Operand of_on_x = Operand::of(on_x), of_on_weight = Operand::of(on_weight, x);
  const Tensor labels = labels_.contiguous(), probabilities = probabilities_.contiguous();
  const OptionalTensor on_bias = contiguous(on_bias_), logits_gradient = contiguous(logits_gradient_);
  Tensor x_bar = need_x ? empty_ordered(x) : nothing(x);
  Tensor weight_bar = need_weight ? empty_buffer(weight.sizes(), x.options()) : nothing(x);
  Tensor bias_bar = at::empty({sizes.tasks, ways}, x.options());
  Tensor losses_bar = with_losses ? at::empty({sizes.tasks}, x.options()) : nothing(x);
  Tensor logits_bar = logits_gradient ? empty_buffer(probabilities.sizes(), x.options()) : nothing(x);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "linear_cross_entropy_double_backward", [&] {
    const Given<scalar_t> given(labels, probabilities, losses_gradient, logits_gradient);
    const auto a = of_x.rows<scalar_t>(), b = of_weight.rows<scalar_t>();
    const auto on_a = of_on_x.rows<scalar_t>(), on_b = of_on_weight.rows<scalar_t>();
    const scalar_t* biases = on_bias ? on_bias->const_data_ptr<scalar_t>() : nullptr;
    scalar_t* to_logits = logits_gradient ? logits_bar.mutable_data_ptr<scalar_t>() : nullptr;
    std::vector<scalar_t> e(sizes.tasks * images * ways), z_bar(with_losses ? e.size() : 0);
    const int64_t blocks = sizes.tasks * blocks_of(images, kImages);
    std::vector<double> bias_parts(blocks * ways), losses_parts(blocks);
    const int64_t work = ways * ((bool(on_a) + bool(on_b)) * features + 1);
    for_blocks(sizes.tasks, images, kImages, work, [&](int64_t block, int64_t t, int64_t from, int64_t to) {
      std::vector<double> m((to - from) * ways), difference(ways);
      for (int64_t i = 0; biases && i < to - from; ++i)
        for (int64_t n = 0; n < ways; ++n) m[i * ways + n] = double(biases[t * ways + n]);
      if (on_a) add_products(on_a.at(t, from), on_a.row, to - from, b.at(t), b.row, ways, features, m.data());
      if (on_b) add_products(a.at(t, from), a.row, to - from, on_b.at(t), on_b.row, ways, features, m.data());
      const double factor = given.factor(t, images);
      for (int64_t s = t * images + from, i = 0; i < to - from; ++s, ++i) {
        const double *row = m.data() + i * ways, *p = given.probabilities + s * ways;
        subtract_label(p, ways, given.labels[s], difference.data());
        double mean = 0, product = 0;
        for (int64_t n = 0; n < ways; ++n) {
          mean += p[n] * row[n];
          product += difference[n] * row[n];
        }
        losses_parts[block] += product / double(images);
        for (int64_t n = 0; n < ways; ++n) {
          e[s * ways + n] = scalar_t(given.logit_gradient(factor, difference[n], s, ways, n));
          if (to_logits) to_logits[s * ways + n] = scalar_t(row[n]);
          if (!with_losses) continue;
          const double bar = factor * p[n] * (row[n] - mean);
          z_bar[s * ways + n] = scalar_t(bar);
          bias_parts[block * ways + n] += bar;
        }
      }
    });
    write_sums(bias_parts, sizes, ways, bias_bar.mutable_data_ptr<scalar_t>());
    if (with_losses) write_sums(losses_parts, sizes, 1, losses_bar.mutable_data_ptr<scalar_t>());
    if (!need_x && !need_weight) return;
    scalar_t* to_x = x_bar.mutable_data_ptr<scalar_t>();
    scalar_t* to_weight = weight_bar.mutable_data_ptr<scalar_t>();
    for_blocks(sizes.tasks, features, kFeatures, 4 * images * ways, [&](int64_t, int64_t t, int64_t from, int64_t to) {
      const int64_t start = t * images * ways;
      std::vector<Terms<scalar_t>> of_classes, of_images;
      if (on_b) of_classes.push_back({e.data() + start, ways, 1, on_b.at(t), on_b.row, ways});
      if (on_a) of_images.push_back({e.data() + start, 1, ways, on_a.at(t), on_a.row, images});
      if (with_losses) {
        of_classes.push_back({z_bar.data() + start, ways, 1, b.at(t), b.row, ways});
        of_images.push_back({z_bar.data() + start, 1, ways, a.at(t), a.row, images});
      }
      if (need_x) combine(of_classes, images, from, to, to_x + t * images * features, features);
      if (need_weight) combine(of_images, ways, from, to, to_weight + t * ways * features, features);
    });
  });
  return {need_x ? back_from_order(x_bar) : x_bar, need_weight ? weight_from_order(weight_bar, x) : weight_bar,
          bias_bar, losses_bar, logits_bar};
}

}  // namespace cxgrad
