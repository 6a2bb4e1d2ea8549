#include "weights.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <cmath>

#include "buffers.h"
#include "wide.h"

namespace cxgrad {
namespace {

// Everything here is inner products of rows, a few numbers made of them, and linear combinations of rows, where a row
// is a weight of one task (or the shared one), or what has its shape. With N = |w|, u = w / N, a factor f (gamma or 1):
//
//     h = f / N    s = <u, v>    t = <u, a>    q = <a, v>
//
// Rows are cut into blocks whose size depends on nothing: the same sums for any number of threads.
constexpr int64_t kBlock = 4096;
constexpr int64_t kBlocksPerThread = 8;  // fewer are not worth a second thread

template <class T>
struct Product {
  const T *a, *b;
  int64_t count;
};

template <class T>
struct Term {
  double factor;
  const T* row;
};

template <class T>
struct Combination {
  T* out;
  int64_t count;
  std::vector<Term<T>> terms;
};

struct Block {
  int64_t item, start, count;
};

template <class Item>
std::vector<Block> blocks_of_items(const std::vector<Item>& items) {
  std::vector<Block> blocks;
  for (size_t i = 0; i < items.size(); ++i)
    for (int64_t start = 0; start < items[i].count; start += kBlock)
      blocks.push_back({int64_t(i), start, std::min(kBlock, items[i].count - start)});
  return blocks;
}

template <class T>
std::vector<double> compute(const std::vector<Product<T>>& products) {
  const auto blocks = blocks_of_items(products);
  std::vector<double> parts(blocks.size()), results(products.size(), 0.0);
  at::parallel_for(0, int64_t(blocks.size()), kBlocksPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto& [item, start, count] = blocks[i];
      parts[i] = inner_product(products[item].a + start, products[item].b + start, count);
    }
  });
  for (size_t i = 0; i < blocks.size(); ++i) results[blocks[i].item] += parts[i];
  return results;
}

// out = sum of the terms' rows, entries start to end; Terms 0: any number of them
template <class T, int Terms>
void combine(const Combination<T>& combination, int64_t start, int64_t end) {
  constexpr int64_t W = kWidth<double>;
  const Term<T>* terms = combination.terms.data();
  const int count = Terms ? Terms : int(combination.terms.size());
  int64_t k = start;
  for (; k + W <= end; k += W) {
    Vec<double> total{};
    for (int i = 0; i < count; ++i) total += terms[i].factor * load_wide(terms[i].row + k);
    store_rounded(combination.out + k, total);
  }
  if (k == end) return;
  Vec<double> total{};
  for (int i = 0; i < count; ++i) total += terms[i].factor * load_wide(terms[i].row + k, end - k);
  store_rounded(combination.out + k, total, end - k);
}

template <class T>
void compute(const std::vector<Combination<T>>& combinations) {
  const auto blocks = blocks_of_items(combinations);
  at::parallel_for(0, int64_t(blocks.size()), kBlocksPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto& [item, start, count] = blocks[i];
      const Combination<T>& combination = combinations[item];
      switch (combination.terms.size()) {
        case 1: combine<T, 1>(combination, start, start + count); break;
        case 2: combine<T, 2>(combination, start, start + count); break;
        case 3: combine<T, 3>(combination, start, start + count); break;
        default: combine<T, 0>(combination, start, start + count);
      }
    }
  });
}

// One layer: `rows` weights, each used by `uses` tasks, so that v and what is made of it have rows * uses rows.
template <class T>
struct Layer {
  int64_t rows, uses, size;
  const T *w, *v, *a;
  T *out, *w_bar, *v_bar;  // the forward's result; gradients
};

// The numbers of one use of one weight.
struct Numbers {
  double factor = 1, c = 0, n = 0;             // given: f, the cotangents on the gradient of f and on N
  double norm = 0, factor_bar = 0, n_bar = 0;  // found: N, gradients of f and n
};

enum class Stage { kForward, kBackward, kDoubleBackward };

template <class T>
void run(Stage stage, const std::vector<Layer<T>>& layers, std::vector<std::vector<Numbers>>& numbers) {
  const bool with_v = stage != Stage::kForward, with_a = stage == Stage::kDoubleBackward;
  std::vector<Product<T>> products;
  for (const auto& layer : layers)
    for (int64_t row = 0; row < layer.rows; ++row) {
      const T* w = layer.w + row * layer.size;
      const T* a = with_a ? layer.a + row * layer.size : nullptr;
      products.push_back({w, w, layer.size});
      if (with_a) products.push_back({w, a, layer.size});
      for (int64_t use = row * layer.uses; with_v && use < (row + 1) * layer.uses; ++use) {
        const T* v = layer.v + use * layer.size;
        products.push_back({w, v, layer.size});
        if (with_a) products.push_back({a, v, layer.size});
      }
    }
  const std::vector<double> results = compute(products);

  std::vector<Combination<T>> combinations;
  auto result = results.begin();
  for (size_t l = 0; l < layers.size(); ++l)
    for (int64_t row = 0; row < layers[l].rows; ++row) {
      const auto& layer = layers[l];
      const T* w = layer.w + row * layer.size;
      const T* a = with_a ? layer.a + row * layer.size : nullptr;
      const double norm = std::sqrt(*result++);
      const double t = with_a ? *result++ / norm : 0;
      Combination<T> w_bar{with_v ? layer.w_bar + row * layer.size : nullptr, layer.size, {}};
      double of_w = 0, of_a = 0;  // their factors, summed over the uses
      for (int64_t use = row * layer.uses; use < (row + 1) * layer.uses; ++use) {
        Numbers& number = numbers[l][use];
        const double h = number.factor / norm, c = number.c, n = number.n;
        number.norm = norm;
        if (stage == Stage::kForward) {
          combinations.push_back({layer.out + use * layer.size, layer.size, {{h, w}}});
          continue;
        }
        const T* v = layer.v + use * layer.size;
        const double s = *result++ / norm;
        if (stage == Stage::kBackward) {
          number.factor_bar = s;
          w_bar.terms.push_back({h, v});
          of_w += (n - h * s) / norm;
          continue;
        }
        const double q = *result++;
        number.factor_bar = (q - s * t) / norm;
        number.n_bar = t;
        combinations.push_back({layer.v_bar + use * layer.size, layer.size, {{h, a}, {(c - h * t) / norm, w}}});
        w_bar.terms.push_back({(c - h * t) / norm, v});
        of_a += (n - h * s) / norm;
        of_w -= (h * (q - 3 * s * t) + c * s + n * t) / (norm * norm);
      }
      if (with_a) w_bar.terms.push_back({of_a, a});
      if (with_v) {
        w_bar.terms.push_back({of_w, w});
        combinations.push_back(std::move(w_bar));
      }
    }
  compute(combinations);
}

// What the six functions share: tensors to rows, numbers to and from [T, L].
class Layers {
 public:
  // tasks_of_shared: how many tasks use a weight [1, ...] with a row of v each
  Layers(at::TensorList weights, int64_t tasks_of_shared) {
    for (const auto& weight : weights) {
      const int64_t rows = weight.size(0), uses = rows == 1 ? tasks_of_shared : 1;
      auto sizes = weight.sizes().vec();
      sizes[0] = rows * uses;
      uses_.push_back(uses);
      used_sizes_.push_back(sizes);
      w_.push_back(weight.contiguous());
      numbers_.emplace_back(rows * uses);
    }
  }

  void set_v(at::TensorList v) {
    for (const auto& tensor : v) v_.push_back(tensor.contiguous());
  }
  void set_a(at::TensorList a) {
    for (const auto& tensor : a) a_.push_back(tensor.contiguous());
  }

  // from [T, L]; a number of all tasks together is the sum of theirs
  void set(double Numbers::*member, const at::Tensor& values) {
    const at::Tensor wide = values.to(at::kDouble).contiguous();
    const auto at = wide.accessor<double, 2>();
    for (size_t l = 0; l < numbers_.size(); ++l) {
      for (Numbers& number : numbers_[l]) number.*member = 0;
      for (int64_t task = 0; task < wide.size(0); ++task)
        numbers_[l][task % int64_t(numbers_[l].size())].*member += at[task][l];
    }
  }

  // to [T, L]
  at::Tensor get(double Numbers::*member, int64_t tasks) const {
    at::Tensor values = at::empty({tasks, int64_t(numbers_.size())}, w_[0].options().dtype(at::kDouble));
    auto at = values.accessor<double, 2>();
    for (size_t l = 0; l < numbers_.size(); ++l)
      for (int64_t task = 0; task < tasks; ++task)
        at[task][l] = numbers_[l][task % int64_t(numbers_[l].size())].*member;
    return values.to(w_[0].scalar_type());
  }

  void run(Stage stage) {
    for (size_t l = 0; l < w_.size(); ++l) {
      if (stage == Stage::kForward) out.push_back(empty_buffer(used_sizes_[l], w_[l].options()));
      if (stage != Stage::kForward) w_bar.push_back(empty_buffer(w_[l].sizes(), w_[l].options()));
      if (stage == Stage::kDoubleBackward) v_bar.push_back(empty_buffer(used_sizes_[l], w_[l].options()));
    }
    AT_DISPATCH_FLOATING_TYPES(w_[0].scalar_type(), "weights", [&] {
      const auto read = [](const Tensors& list, size_t l) {
        return l < list.size() ? list[l].const_data_ptr<scalar_t>() : nullptr;
      };
      const auto write = [](const Tensors& list, size_t l) {
        return l < list.size() ? list[l].mutable_data_ptr<scalar_t>() : nullptr;
      };
      std::vector<Layer<scalar_t>> layers;
      for (size_t l = 0; l < w_.size(); ++l) {
        const int64_t rows = w_[l].size(0), size = rows ? w_[l].numel() / rows : 0;
        layers.push_back({rows, uses_[l], size, read(w_, l), read(v_, l), read(a_, l), write(out, l), write(w_bar, l),
                          write(v_bar, l)});
      }
      cxgrad::run(stage, layers, numbers_);
    });
  }

  Tensors out, w_bar, v_bar;

 private:
  Tensors w_, v_, a_;
  std::vector<int64_t> uses_;
  std::vector<std::vector<int64_t>> used_sizes_;
  std::vector<std::vector<Numbers>> numbers_;
};

int64_t tasks_of(at::TensorList weights) {
  for (const auto& weight : weights)
    if (weight.size(0) != 1) return weight.size(0);
  return 1;
}

}  // namespace

Tensors scale_weights(at::TensorList weights, const at::Tensor& gammas) {
  Layers layers(weights, gammas.size(0));
  layers.set(&Numbers::factor, gammas);
  layers.run(Stage::kForward);
  return layers.out;
}

std::tuple<Tensors, at::Tensor> scale_weights_backward(at::TensorList weights, const at::Tensor& gammas,
                                                       at::TensorList v) {
  Layers layers(weights, gammas.size(0));
  layers.set(&Numbers::factor, gammas);
  layers.set_v(v);
  layers.run(Stage::kBackward);
  return {layers.w_bar, layers.get(&Numbers::factor_bar, gammas.size(0))};
}

std::tuple<Tensors, at::Tensor, Tensors> scale_weights_double_backward(at::TensorList weights, const at::Tensor& gammas,
                                                                       at::TensorList v, at::TensorList a,
                                                                       const at::Tensor& c) {
  Layers layers(weights, gammas.size(0));
  layers.set(&Numbers::factor, gammas);
  layers.set(&Numbers::c, c);
  layers.set_v(v);
  layers.set_a(a);
  layers.run(Stage::kDoubleBackward);
  return {layers.w_bar, layers.get(&Numbers::factor_bar, gammas.size(0)), layers.v_bar};
}

std::tuple<Tensors, at::Tensor> normalize_weights(at::TensorList weights) {
  Layers layers(weights, 1);
  layers.run(Stage::kForward);
  return {layers.out, layers.get(&Numbers::norm, tasks_of(weights))};
}

Tensors normalize_weights_backward(at::TensorList weights, at::TensorList v, const at::Tensor& n) {
  Layers layers(weights, 1);
  layers.set(&Numbers::n, n);
  layers.set_v(v);
  layers.run(Stage::kBackward);
  return layers.w_bar;
}

std::tuple<Tensors, Tensors, at::Tensor> normalize_weights_double_backward(at::TensorList weights, at::TensorList v,
                                                                           const at::Tensor& n, at::TensorList a) {
  Layers layers(weights, 1);
  layers.set(&Numbers::n, n);
  layers.set_v(v);
  layers.set_a(a);
  layers.run(Stage::kDoubleBackward);
  return {layers.w_bar, layers.v_bar, layers.get(&Numbers::n_bar, n.size(0))};
}

}  // namespace cxgrad
