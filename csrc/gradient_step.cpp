#include "gradient_step.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>

#include "buffers.h"
#include "rows.h"

namespace cxgrad {
namespace {

using at::Tensor;
using Tensors = std::vector<Tensor>;

// numbers [T or 1, L] a task and tensor; `otherwise` where there are none
class Table {
 public:
  Table(const std::optional<Tensor>& given, double otherwise) : otherwise_(otherwise) {
    if (!given) return;
    const Tensor wide = given->to(at::kDouble).contiguous();
    rows_ = wide.size(0), columns_ = wide.size(1);
    values_.assign(wide.const_data_ptr<double>(), wide.const_data_ptr<double>() + wide.numel());
  }

  double at(int64_t task, int64_t column) const {
    return column < columns_ ? values_[(rows_ == 1 ? 0 : task) * columns_ + column] : otherwise_;
  }
  int64_t columns() const { return columns_; }

 private:
  double otherwise_;
  int64_t rows_ = 0, columns_ = 0;
  std::vector<double> values_;
};

// [T, ...] by rows, which may all be the same one
template <class T>
class Rows {
 public:
  explicit Rows(const Tensor& tensor) : size_(tensor.size(0) ? tensor.numel() / tensor.size(0) : 0) {
    const bool is_shared = tensor.size(0) > 0 && tensor.stride(0) == 0 && tensor.select(0, 0).is_contiguous();
    kept_ = is_shared ? tensor.select(0, 0) : tensor.contiguous();
    step_ = is_shared ? 0 : size_;
    data_ = kept_.const_data_ptr<T>();
  }

  const T* operator[](int64_t task) const { return data_ + task * step_; }
  int64_t size() const { return size_; }

 private:
  int64_t size_, step_;
  Tensor kept_;
  const T* data_;
};

template <class T>
std::vector<Rows<T>> rows_of(at::TensorList tensors) {
  return std::vector<Rows<T>>(tensors.begin(), tensors.end());
}

Tensors like(at::TensorList tensors, size_t count) {
  Tensors made;
  for (size_t k = 0; k < count; ++k) made.push_back(empty_buffer(tensors[k].sizes(), tensors[k].options()));
  return made;
}

}  // namespace

Tensors gradient_step(at::TensorList weights, at::TensorList gradients, double rate,
                      const std::optional<Tensor>& rates, const std::optional<Tensor>& factors,
                      const std::optional<Tensor>& divisors) {
  const Table r(rates, rate), f(factors, 1), d(divisors, 1);
  const int64_t tasks = weights[0].size(0);
  Tensors moved = like(weights, weights.size());
  AT_DISPATCH_FLOATING_TYPES(weights[0].scalar_type(), "gradient_step", [&] {
    const auto w = rows_of<scalar_t>(weights), g = rows_of<scalar_t>(gradients);
    std::vector<Combination<scalar_t>> combinations;
    for (size_t k = 0; k < weights.size(); ++k)
      for (int64_t task = 0; task < tasks; ++task)
        combinations.push_back({moved[k].mutable_data_ptr<scalar_t>() + task * w[k].size(), w[k].size(),
                                {{f.at(task, k), w[k][task]}, {-r.at(task, k) / d.at(task, k), g[k][task]}}});
    compute(combinations);
  });
  return moved;
}

std::tuple<Tensors, Tensors, Tensor, Tensor, Tensor> gradient_step_backward(
    at::TensorList weights, at::TensorList gradients, double rate, const std::optional<Tensor>& rates,
    const std::optional<Tensor>& factors, const std::optional<Tensor>& divisors, at::TensorList v_,
    at::ArrayRef<bool> needs) {
  const Table r(rates, rate), f(factors, 1), d(divisors, 1);
  const int64_t tasks = weights[0].size(0), layers = int64_t(weights.size());
  const bool need_weights = needs[0], need_gradients = needs[1], need_r = needs[2], need_f = needs[3], need_d = needs[4];
  Tensors w_bar = like(weights, need_weights ? size_t(f.columns()) : 0);
  Tensors g_bar = like(gradients, need_gradients ? weights.size() : 0);
  const auto wide = weights[0].options().dtype(at::kDouble);
  Tensor r_bar = at::zeros(need_r ? rates->sizes() : at::IntArrayRef{0}, wide);
  Tensor f_bar = at::empty(need_f ? factors->sizes() : at::IntArrayRef{0}, wide);
  Tensor d_bar = at::empty(need_d ? divisors->sizes() : at::IntArrayRef{0}, wide);

  AT_DISPATCH_FLOATING_TYPES(weights[0].scalar_type(), "gradient_step_backward", [&] {
    const auto w = rows_of<scalar_t>(weights), g = rows_of<scalar_t>(gradients), v = rows_of<scalar_t>(v_);
    std::vector<Product<scalar_t>> products;
    std::vector<Combination<scalar_t>> combinations;
    for (int64_t k = 0; k < layers; ++k)
      for (int64_t task = 0; task < tasks; ++task) {
        const int64_t size = w[k].size();
        if (need_f && k < f.columns()) products.push_back({v[k][task], w[k][task], size});
        if (need_r || (need_d && k < d.columns())) products.push_back({v[k][task], g[k][task], size});
        if (need_weights && k < f.columns())
          combinations.push_back(
              {w_bar[k].mutable_data_ptr<scalar_t>() + task * size, size, {{f.at(task, k), v[k][task]}}});
        if (need_gradients)
          combinations.push_back({g_bar[k].mutable_data_ptr<scalar_t>() + task * size,
                                  size,
                                  {{-r.at(task, k) / d.at(task, k), v[k][task]}}});
      }
    compute(combinations);
    const std::vector<double> found = compute(products);
    auto next = found.begin();
    double* const of_r = r_bar.mutable_data_ptr<double>();
    for (int64_t k = 0; k < layers; ++k)
      for (int64_t task = 0; task < tasks; ++task) {
        if (need_f && k < f.columns()) f_bar.mutable_data_ptr<double>()[task * f.columns() + k] = *next++;
        if (!need_r && !(need_d && k < d.columns())) continue;
        const double t = *next++, inverse = 1 / d.at(task, k);
        if (need_r) of_r[(r_bar.size(0) == 1 ? 0 : task) * layers + k] -= t * inverse;
        if (need_d && k < d.columns())
          d_bar.mutable_data_ptr<double>()[task * d.columns() + k] = t * r.at(task, k) * inverse * inverse;
      }
  });
  const auto type = weights[0].scalar_type();
  return {w_bar, g_bar, r_bar.to(type), f_bar.to(type), d_bar.to(type)};
}

}  // namespace cxgrad
