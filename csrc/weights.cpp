#include "weights.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>

#include <cmath>

#include "buffers.h"
#include "rows.h"

namespace cxgrad {
namespace {

// A few numbers made of inner products of rows, and linear combinations of rows (rows.h), where a row is a weight of one
// task (or the shared one), or what has its shape. With N = |w|, u = w / N, a factor f (gamma or 1):
//
//     h = f / N    s = <u, v>    t = <u, a>    q = <a, v>

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
