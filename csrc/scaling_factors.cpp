#include "scaling_factors.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <cmath>
#include <vector>

#include "wide.h"

namespace cxgrad {

using at::Tensor;

namespace {

using Row = std::vector<double>;

constexpr double kLinearFrom = 20;  // the framework's softplus is the identity above

// where and how a tensor is read; null where there is none
template <class T>
class Reader {
 public:
  Reader() = default;
  explicit Reader(const Tensor& tensor) : tensor_(tensor.contiguous()), data_(tensor_.const_data_ptr<T>()) {}
  explicit Reader(const std::optional<Tensor>& tensor) {
    if (tensor) *this = Reader(*tensor);
  }

  explicit operator bool() const { return data_ != nullptr; }
  const T* row(int64_t index) const { return data_ + index * tensor_.size(-1); }
  double operator[](int64_t index) const { return double(data_[index]); }

 private:
  Tensor tensor_;
  const T* data_ = nullptr;
};

// sums over tasks, or the rows of tasks: rounded once; nothing where they are not needed
class Result {
 public:
  Result(const Tensor& like, bool needed)
      : tensor_(at::empty(needed ? like.sizes().vec() : std::vector<int64_t>{0}, like.options())),
        columns_(like.size(-1)),
        values_(tensor_.numel(), 0.0) {}

  explicit operator bool() const { return !values_.empty(); }
  double& operator[](int64_t index) { return values_[index]; }
  double* row(int64_t index) { return values_.data() + index * columns_; }

  template <class T>
  Tensor rounded() const {
    std::copy(values_.begin(), values_.end(), tensor_.mutable_data_ptr<T>());
    return tensor_;
  }

 private:
  Tensor tensor_;
  int64_t columns_;
  Row values_;
};

// out += factor row
template <class T>
void add(double* out, double factor, const T* row, int64_t count) {
  constexpr int64_t W = kWidth<double>;
  int64_t i = 0;
  for (; i + W <= count; i += W) store(out + i, load(out + i) + factor * load_wide(row + i));
  for (; i < count; ++i) out[i] += factor * double(row[i]);
}

void add(double* out, double factor, const Row& row) { add(out, factor, row.data(), int64_t(row.size())); }

// the numbers of one task's layer
struct Factor {
  double gamma, eps;
  double slope, bend;  // first and second derivative of softplus
};

Factor factor_of(double s, double norm_eps, double least) {
  const bool linear = s > kLinearFrom;
  const double power = std::exp(linear ? 0 : s);
  const double softplus = linear ? s : std::log1p(power);
  const double gamma = softplus < least ? least : softplus;  // NaN stays
  const double slope = linear ? 1 : power / (1 + power);
  return {gamma, norm_eps / gamma / gamma, slope, linear ? 0 : slope / (1 + power)};
}

// everything of one task at a time; what `of` computes stays until the next task
template <class T>
class Network {
 public:
  explicit Network(const Scaler& scaler)
      : tasks(scaler.context.size(0)),
        inputs(scaler.context.size(1)),
        width(scaler.w0.size(0)),
        layers(scaler.w2.size(0)),
        context(scaler.context),
        w0(scaler.w0),
        w2(scaler.w2),
        hidden(width),
        factors(layers),
        b0_(scaler.b0),
        b2_(scaler.b2),
        norm_eps_(scaler.norm_eps),
        least_(scaler.least),
        dead_(width) {}

  void of(int64_t task) {
    const T* c = context.row(task);
    for (int64_t j = 0; j < width; ++j) {
      const double sum = b0_[j] + inner_product(w0.row(j), c, inputs);
      dead_[j] = sum <= 0;
      hidden[j] = dead_[j] ? 0 : sum;
    }
    for (int64_t l = 0; l < layers; ++l)
      factors[l] = factor_of(b2_[l] + inner_product(w2.row(l), hidden.data(), width), norm_eps_, least_);
  }

  // gradients of s for cotangents of the two results
  Row of_sums(const Reader<T>& v, const Reader<T>& e, int64_t task) const {
    Row sums(layers, 0.0);
    for (int64_t l = 0; l < layers; ++l) {
      const Factor& f = factors[l];
      if (v) sums[l] += v.row(task)[l] * f.slope;
      // in this order, since the slope is small where gamma is
      if (e) sums[l] -= 2 * e.row(task)[l] * f.eps * (f.slope / f.gamma);
    }
    return sums;
  }

  // back through relu
  void mask(Row& row) const {
    for (int64_t j = 0; j < width; ++j)
      if (dead_[j]) row[j] = 0;
  }

  // back through a layer: sums matrix
  static Row transposed(const Row& sums, const Reader<T>& matrix, int64_t columns) {
    Row row(columns, 0.0);
    for (size_t k = 0; k < sums.size(); ++k) add(row.data(), sums[k], matrix.row(k), columns);
    return row;
  }

  const int64_t tasks, inputs, width, layers;
  const Reader<T> context, w0, w2;
  Row hidden;
  std::vector<Factor> factors;

 private:
  const Reader<T> b0_, b2_;
  const double norm_eps_, least_;
  std::vector<char> dead_;  // where relu is 0
};

template <class T>
std::tuple<Tensor, Tensor> forward(const Scaler& scaler) {
  Network<T> network(scaler);
  Tensor gammas = at::empty({network.tasks, network.layers}, scaler.context.options()), eps = at::empty_like(gammas);
  T *gammas_to = gammas.mutable_data_ptr<T>(), *eps_to = eps.mutable_data_ptr<T>();
  for (int64_t task = 0; task < network.tasks; ++task) {
    network.of(task);
    for (const Factor& f : network.factors) *gammas_to++ = T(f.gamma), *eps_to++ = T(f.eps);
  }
  return {gammas, eps};
}

template <class T>
std::array<Tensor, 5> backward(const Reader<T>& v, const Reader<T>& e, const Scaler& scaler,
                               const std::array<bool, 5>& needed) {
  Network<T> network(scaler);
  Result dc(scaler.context, needed[0]), dw0(scaler.w0, needed[1]), db0(scaler.b0, needed[2]);
  Result dw2(scaler.w2, needed[3]), db2(scaler.b2, needed[4]);
  for (int64_t task = 0; task < network.tasks; ++task) {
    network.of(task);
    const T* c = network.context.row(task);
    const Row sums = network.of_sums(v, e, task);
    if (db2) add(db2.row(0), 1, sums);
    for (int64_t l = 0; dw2 && l < network.layers; ++l) add(dw2.row(l), sums[l], network.hidden);
    if (!dc && !dw0 && !db0) continue;
    Row inner = network.transposed(sums, network.w2, network.width);
    network.mask(inner);
    if (db0) add(db0.row(0), 1, inner);
    for (int64_t j = 0; j < network.width; ++j) {
      if (dw0) add(dw0.row(j), inner[j], c, network.inputs);
      if (dc) add(dc.row(task), inner[j], network.w0.row(j), network.inputs);
    }
  }
  return {dc.rounded<T>(), dw0.rounded<T>(), db0.rounded<T>(), dw2.rounded<T>(), db2.rounded<T>()};
}

// docs/math.md's q, P, P', q' are here sums, inner, up, up_sums; with a bar: sums_bar for s, inner_bar for z
template <class T>
std::array<Tensor, 7> double_backward(const std::array<Reader<T>, 5>& on, const Reader<T>& v, const Reader<T>& e,
                                      const Scaler& scaler, const std::array<bool, 7>& needed) {
  Network<T> network(scaler);
  const int64_t inputs = network.inputs, width = network.width, layers = network.layers;
  const auto& [on_c, on_w0, on_b0, on_w2, on_b2] = on;
  const Tensor gammas = at::empty({network.tasks, layers}, scaler.context.options());
  Result v_bar(gammas, needed[0]), e_bar(gammas, needed[1]), c_bar(scaler.context, needed[2]);
  Result w0_bar(scaler.w0, needed[3]), b0_bar(scaler.b0, needed[4]), w2_bar(scaler.w2, needed[5]);
  Result b2_bar(scaler.b2, needed[6]);
  Row up(width), up_sums(layers), sums_bar(layers);
  for (int64_t task = 0; task < network.tasks; ++task) {
    network.of(task);
    const T* c = network.context.row(task);
    const Row sums = network.of_sums(v, e, task);
    Row inner = network.transposed(sums, network.w2, width);
    network.mask(inner);
    for (int64_t j = 0; j < width; ++j) {
      up[j] = on_b0 ? on_b0[j] : 0;
      if (on_c) up[j] += inner_product(network.w0.row(j), on_c.row(task), inputs);
      if (on_w0) up[j] += inner_product(on_w0.row(j), c, inputs);
    }
    network.mask(up);
    for (int64_t l = 0; l < layers; ++l) {
      up_sums[l] = (on_b2 ? on_b2[l] : 0) + inner_product(network.w2.row(l), up.data(), width);
      if (on_w2) up_sums[l] += inner_product(on_w2.row(l), network.hidden.data(), width);
      const Factor& f = network.factors[l];
      const double share = f.slope / f.gamma;  // at most 1
      if (v_bar) v_bar.row(task)[l] = up_sums[l] * f.slope;
      if (e_bar) e_bar.row(task)[l] = -2 * up_sums[l] * f.eps * share;
      double curvature = v ? v.row(task)[l] * f.bend : 0;
      if (e) curvature += e.row(task)[l] * f.eps * (6 * share * share - 2 * (f.bend / f.gamma));
      sums_bar[l] = up_sums[l] * curvature;
      if (w2_bar) {
        add(w2_bar.row(l), sums[l], up);
        add(w2_bar.row(l), sums_bar[l], network.hidden);
      }
    }
    if (b2_bar) add(b2_bar.row(0), 1, sums_bar);
    if (!c_bar && !w0_bar && !b0_bar) continue;
    Row inner_bar = network.transposed(sums_bar, network.w2, width);
    for (int64_t l = 0; on_w2 && l < layers; ++l) add(inner_bar.data(), sums[l], on_w2.row(l), width);
    network.mask(inner_bar);
    if (b0_bar) add(b0_bar.row(0), 1, inner_bar);
    for (int64_t j = 0; j < width; ++j) {
      if (w0_bar) {
        if (on_c) add(w0_bar.row(j), inner[j], on_c.row(task), inputs);
        add(w0_bar.row(j), inner_bar[j], c, inputs);
      }
      if (c_bar) {
        if (on_w0) add(c_bar.row(task), inner[j], on_w0.row(j), inputs);
        add(c_bar.row(task), inner_bar[j], network.w0.row(j), inputs);
      }
    }
  }
  return {v_bar.rounded<T>(),  e_bar.rounded<T>(),  c_bar.rounded<T>(), w0_bar.rounded<T>(),
          b0_bar.rounded<T>(), w2_bar.rounded<T>(), b2_bar.rounded<T>()};
}

}  // namespace

std::tuple<Tensor, Tensor> scaling_factors(const Scaler& scaler) {
  return AT_DISPATCH_FLOATING_TYPES(scaler.context.scalar_type(), "scaling_factors",
                                    [&] { return forward<scalar_t>(scaler); });
}

std::array<Tensor, 5> scaling_factors_backward(const std::optional<Tensor>& v, const std::optional<Tensor>& e,
                                               const Scaler& scaler, const std::array<bool, 5>& needed) {
  return AT_DISPATCH_FLOATING_TYPES(scaler.context.scalar_type(), "scaling_factors_backward", [&] {
    return backward<scalar_t>(Reader<scalar_t>(v), Reader<scalar_t>(e), scaler, needed);
  });
}

std::array<Tensor, 7> scaling_factors_double_backward(const std::array<std::optional<Tensor>, 5>& on,
                                                      const std::optional<Tensor>& v, const std::optional<Tensor>& e,
                                                      const Scaler& scaler, const std::array<bool, 7>& needed) {
  return AT_DISPATCH_FLOATING_TYPES(scaler.context.scalar_type(), "scaling_factors_double_backward", [&] {
    using R = Reader<scalar_t>;
    return double_backward<scalar_t>({R(on[0]), R(on[1]), R(on[2]), R(on[3]), R(on[4])}, R(v), R(e), scaler, needed);
  });
}

}  // namespace cxgrad
