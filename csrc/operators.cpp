// The operators' schemas, and what they ask of their arguments. Everything behind this file trusts what it gets.
//
// Derivatives are operators of their own, x -> x_backward -> x_double_backward; kernels/<x>/cpp.py chains them.

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "buffers.h"
#include "conv_block.h"
#include "gradient_step.h"
#include "linear_cross_entropy.h"
#include "patch_statistics.h"
#include "residual_end.h"
#include "scaling_factors.h"
#include "simd.h"
#include "sums.h"
#include "tiles.h"
#include "weights.h"

namespace cxgrad {
namespace {

// --- checks: every message has the argument's name, what was expected and what came ---
//
// The public functions make those of the forward operators before, for all backends (kernels/checks.py).

void check_like(const std::string& name, const at::Tensor& tensor, const std::string& other_name,
                const at::Tensor& other) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == other.scalar_type() && tensor.device() == other.device(), name, " must be ",
                    other.scalar_type(), " on ", other.device(), " like ", other_name, ", got ", tensor.scalar_type(),
                    " on ", tensor.device());
}

void check_floating(const std::string& name, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble, name,
                    " must be Float or Double, got ", tensor.scalar_type());
}

void check_shape(const std::string& name, const at::Tensor& tensor, at::IntArrayRef expected, const char* why) {
  TORCH_CHECK_VALUE(tensor.sizes() == expected, name, " must be ", expected, " (", why, "), got ", tensor.sizes());
}

bool none_is_zero(at::IntArrayRef sizes) {
  return std::all_of(sizes.begin(), sizes.end(), [](int64_t size) { return size > 0; });
}

// [T, S, C, H, W], of which T alone may be 0, and pooling with a padding leaves something
void check_images(const std::string& name, const at::Tensor& images, bool pool = false, int64_t padding = 0,
                  const char* shape = "[T, S, C, H, W]") {
  TORCH_CHECK_VALUE(images.dim() == 5, name, " must be ", shape, ", got ", images.sizes());
  check_floating(name, images);
  TORCH_CHECK_VALUE(none_is_zero(images.sizes().slice(1)), name, " must be ", shape,
                    ", of which T alone may be 0, got ", images.sizes());
  TORCH_CHECK_VALUE(!pool || std::min(images.size(3), images.size(4)) + 2 * padding >= 2, name,
                    " must have H and W of at least 2 to be pooled, got ", images.sizes());
}

void check_slope(double slope) {
  TORCH_CHECK_VALUE(slope >= 0 && std::isfinite(slope), "slope must be finite and not negative, got ", slope);
}

std::string entry(const char* list, size_t index) { return std::string(list) + "[" + std::to_string(index) + "]"; }

// weights [T or 1, ...] of one precision
void check_weights(at::TensorList weights, int64_t tasks) {
  TORCH_CHECK_VALUE(!weights.empty(), "weights must hold at least one tensor, got none");
  check_floating("weights[0]", weights[0]);
  for (size_t l = 0; l < weights.size(); ++l) {
    TORCH_CHECK_VALUE(weights[l].dim() > 0 && (weights[l].size(0) == tasks || weights[l].size(0) == 1),
                      entry("weights", l), " must be [", tasks, " or 1, ...] (T tasks), got ", weights[l].sizes());
    check_like(entry("weights", l), weights[l], "weights[0]", weights[0]);
    TORCH_CHECK_VALUE(none_is_zero(weights[l].sizes().slice(1)), entry("weights", l),
                      " must hold at least one value a task, got ", weights[l].sizes());
  }
}

// [T, L]
void check_numbers(const char* name, const at::Tensor& numbers, at::TensorList weights) {
  TORCH_CHECK_VALUE(numbers.dim() == 2 && numbers.size(1) == int64_t(weights.size()), name, " must be [T, ",
                    weights.size(), "] (one a task and weight), got ", numbers.sizes());
  check_like(name, numbers, "weights[0]", weights[0]);
}

// one tensor a weight, with the weight's shape, or [tasks, ...] where tasks is given
void check_cotangents(const char* name, at::TensorList given, at::TensorList weights, int64_t tasks = -1) {
  TORCH_CHECK_VALUE(given.size() == weights.size(), name, " must hold ", weights.size(),
                    " tensors (one a weight), got ", given.size());
  for (size_t l = 0; l < given.size(); ++l) {
    auto sizes = weights[l].sizes().vec();
    if (tasks >= 0) sizes[0] = tasks;
    check_shape(entry(name, l), given[l], sizes, tasks >= 0 ? "a scaled weight" : "its weight");
    check_like(entry(name, l), given[l], "weights[0]", weights[0]);
  }
}

// --- scale_weights ---

void check_scale(at::TensorList weights, const at::Tensor& gammas) {
  TORCH_CHECK_VALUE(gammas.dim() == 2, "gammas must be [T, L], got ", gammas.sizes());
  check_weights(weights, gammas.size(0));
  check_numbers("gammas", gammas, weights);
}

Tensors checked_scale_weights(at::TensorList weights, const at::Tensor& gammas) {
  check_scale(weights, gammas);
  return scale_weights(weights, gammas);
}

std::tuple<Tensors, at::Tensor> checked_scale_weights_backward(at::TensorList weights, const at::Tensor& gammas,
                                                               at::TensorList v) {
  check_scale(weights, gammas);
  check_cotangents("v", v, weights, gammas.size(0));
  return scale_weights_backward(weights, gammas, v);
}

std::tuple<Tensors, at::Tensor, Tensors> checked_scale_weights_double_backward(at::TensorList weights,
                                                                               const at::Tensor& gammas,
                                                                               at::TensorList v, at::TensorList a,
                                                                               const at::Tensor& c) {
  check_scale(weights, gammas);
  check_cotangents("v", v, weights, gammas.size(0));
  check_cotangents("a", a, weights);
  check_numbers("c", c, weights);
  check_shape("c", c, gammas.sizes(), "like gammas");
  return scale_weights_double_backward(weights, gammas, v, a, c);
}

// --- normalize_weights ---

void check_normalize(at::TensorList weights) {
  int64_t tasks = 1;
  for (const auto& weight : weights)
    if (tasks == 1 && weight.dim() > 0) tasks = weight.size(0);
  check_weights(weights, tasks);
}

std::tuple<Tensors, at::Tensor> checked_normalize_weights(at::TensorList weights) {
  check_normalize(weights);
  return normalize_weights(weights);
}

Tensors checked_normalize_weights_backward(at::TensorList weights, at::TensorList v, const at::Tensor& n) {
  check_normalize(weights);
  check_cotangents("v", v, weights);
  check_numbers("n", n, weights);
  return normalize_weights_backward(weights, v, n);
}

std::tuple<Tensors, Tensors, at::Tensor> checked_normalize_weights_double_backward(at::TensorList weights,
                                                                                   at::TensorList v,
                                                                                   const at::Tensor& n,
                                                                                   at::TensorList a) {
  check_normalize(weights);
  check_cotangents("v", v, weights);
  check_cotangents("a", a, weights);
  check_numbers("n", n, weights);
  return normalize_weights_double_backward(weights, v, n, a);
}

// --- gradient_step ---

void check_table(const char* name, const std::optional<Tensor>& numbers, at::TensorList weights, int64_t tasks,
                 bool of_all) {
  if (!numbers) return;
  const int64_t layers = int64_t(weights.size());
  TORCH_CHECK_VALUE(numbers->dim() == 2 && (numbers->size(0) == tasks || (of_all && numbers->size(0) == 1)) &&
                        (of_all ? numbers->size(1) == layers : 0 < numbers->size(1) && numbers->size(1) <= layers),
                    name, " must be [", tasks, of_all ? " or 1, " : ", 1 to ", layers, "], got ", numbers->sizes());
  check_like(name, *numbers, "weights[0]", weights[0]);
}

void check_step(at::TensorList weights, at::TensorList gradients, const std::optional<Tensor>& rates,
                const std::optional<Tensor>& factors, const std::optional<Tensor>& divisors) {
  const int64_t tasks = weights.empty() || weights[0].dim() == 0 ? 0 : weights[0].size(0);
  check_weights(weights, tasks);
  check_cotangents("weights", weights, weights, tasks);
  check_cotangents("gradients", gradients, weights);
  check_table("rates", rates, weights, tasks, true);
  check_table("factors", factors, weights, tasks, false);
  check_table("divisors", divisors, weights, tasks, false);
}

Tensors checked_gradient_step(at::TensorList weights, at::TensorList gradients, double rate,
                              const std::optional<Tensor>& rates, const std::optional<Tensor>& factors,
                              const std::optional<Tensor>& divisors) {
  check_step(weights, gradients, rates, factors, divisors);
  return gradient_step(weights, gradients, rate, rates, factors, divisors);
}

std::tuple<Tensors, Tensors, Tensor, Tensor, Tensor> checked_gradient_step_backward(
    at::TensorList weights, at::TensorList gradients, double rate, const std::optional<Tensor>& rates,
    const std::optional<Tensor>& factors, const std::optional<Tensor>& divisors, at::TensorList v,
    std::array<bool, 5> needs) {
  check_step(weights, gradients, rates, factors, divisors);
  check_cotangents("v", v, weights);
  const bool there[] = {factors.has_value(), true, rates.has_value(), factors.has_value(), divisors.has_value()};
  for (size_t i = 0; i < needs.size(); ++i)
    TORCH_CHECK_VALUE(there[i] || !needs[i], "needs must ask only for gradients of what is given, got needs[", i, "]");
  return gradient_step_backward(weights, gradients, rate, rates, factors, divisors, v, needs);
}

// --- patch_statistics ---

std::tuple<at::Tensor, at::Tensor> checked_patch_statistics(const at::Tensor& x) {
  check_images("x", x);
  return patch_statistics(x);
}

// --- conv_block ---

Precision precision_of(const std::string& name) {
  if (name == "float32") return Precision::kFloat32;
  if (name == "tf32") return Precision::kTf32;
  TORCH_CHECK_VALUE(name == "bfloat16", "precision must be float32, tf32 or bfloat16, got ", name);
  return Precision::kBfloat16;
}

// what every derivative has of the forward operator's arguments
void check_block(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& bias, const Tensor& eps,
                 bool pool, const OptionalTensor& patch_mean, const OptionalTensor& patch_covariance) {
  check_images("x", x, pool, 0, "[T, S, Cin, H, W]");
  const int64_t tasks = x.size(0), inputs = x.size(2);
  TORCH_CHECK_VALUE(weight.dim() == 5 && weight.size(0) == tasks && weight.size(2) == inputs &&
                        weight.size(3) == weight.size(4) && (weight.size(3) == 1 || weight.size(3) == 3),
                    "weight must be [", tasks, ", Cout, ", inputs, ", k, k] with k 1 or 3 (T and Cin from x), got ",
                    weight.sizes());
  check_like("weight", weight, "x", x);
  const int64_t outputs = weight.size(1);
  TORCH_CHECK_VALUE(outputs > 0, "weight must have an output channel, got ", weight.sizes());
  for (const auto& [name, tensor] : {std::pair{"scale", scale}, std::pair{"bias", bias}}) {
    check_shape(name, tensor, {tasks, outputs}, "T from x, Cout from weight");
    check_like(name, tensor, "x", x);
  }
  check_shape("eps", eps, {tasks}, "T from x");
  check_like("eps", eps, "x", x);
  TORCH_CHECK_VALUE(patch_mean.has_value() == patch_covariance.has_value(),
                    "patch_mean and patch_covariance come together");
  if (!patch_mean) return;
  const int64_t taps = 9 * inputs;
  TORCH_CHECK_VALUE(pool && weight.size(3) == 3, "patch statistics need pool=True and a 3x3 kernel");
  check_shape("patch_mean", *patch_mean, {tasks, taps}, "T from x, 9 Cin");
  check_shape("patch_covariance", *patch_covariance, {tasks, taps, taps}, "T from x, 9 Cin");
  TORCH_CHECK_VALUE(patch_mean->scalar_type() == at::kDouble && patch_covariance->scalar_type() == at::kDouble,
                    "patch statistics must be Double, got ", patch_mean->scalar_type(), " and ",
                    patch_covariance->scalar_type());
}

// what the forward operator handed to its derivatives
void check_saved(const Tensor& q, const Tensor& x, const Tensor& weight, const Tensor& y, const Tensor& selected,
                 const Tensor& corners, const Tensor& moments, bool pool, bool first_layer) {
  const int64_t tasks = x.size(0), images = x.size(1), outputs = weight.size(1), height = x.size(3), width = x.size(4);
  const std::vector<int64_t> none{0}, full{tasks, images, outputs, height, width};
  const std::vector<int64_t> pooled{tasks, images, outputs, height / 2, width / 2};
  check_shape("q", q, pool ? pooled : full, "the forward operator's output");
  check_like("q", q, "x", x);
  check_shape("y", y, first_layer ? none : full, "the convolution's output; none in the first layer");
  check_like("y", y, "x", x);
  check_shape("selected", selected, pool ? pooled : none, "the forward operator's output; none without pool");
  check_like("selected", selected, "x", x);
  check_shape("corners", corners, pool ? pooled : none, "the forward operator's output; none without pool");
  TORCH_CHECK_VALUE(corners.scalar_type() == at::kByte, "corners must be Byte, got ", corners.scalar_type());
  check_shape("moments", moments, {tasks, 2, outputs}, "T, mean and variance, Cout");
  TORCH_CHECK_VALUE(moments.scalar_type() == at::kDouble, "moments must be Double, got ", moments.scalar_type());
}

auto checked_conv_block(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& bias,
                        const Tensor& eps, double slope, bool pool, const OptionalTensor& patch_mean,
                        const OptionalTensor& patch_covariance, const std::string& precision) {
  check_block(x, weight, scale, bias, eps, pool, patch_mean, patch_covariance);
  check_slope(slope);
  return conv_block(x, weight, scale, bias, eps, slope, pool, patch_mean, patch_covariance, precision_of(precision));
}

auto checked_conv_block_backward(const Tensor& q, const OptionalTensor& y_gradient, const Tensor& x,
                                 const Tensor& weight, const Tensor& scale, const Tensor& bias, const Tensor& eps,
                                 const Tensor& y, const Tensor& selected, const Tensor& corners, const Tensor& moments,
                                 double slope, bool pool, const OptionalTensor& patch_mean,
                                 const OptionalTensor& patch_covariance, bool need_x, bool need_weight,
                                 const std::string& precision) {
  check_block(x, weight, scale, bias, eps, pool, patch_mean, patch_covariance);
  check_saved(q, x, weight, y, selected, corners, moments, pool, patch_mean.has_value());
  if (y_gradient) {
    check_shape("y_gradient", *y_gradient, y.sizes(), "like y");
    check_like("y_gradient", *y_gradient, "x", x);
  }
  return conv_block_backward(q, y_gradient, x, weight, scale, bias, eps, y, selected, corners, moments, slope, pool,
                             patch_mean, patch_covariance, need_x, need_weight, precision_of(precision));
}

auto checked_conv_block_double_backward(
    const OptionalTensor& on_x, const OptionalTensor& on_weight, const OptionalTensor& on_scale,
    const OptionalTensor& on_bias, const OptionalTensor& on_eps, const Tensor& q, const Tensor& x, const Tensor& weight,
    const Tensor& scale, const Tensor& bias, const Tensor& eps, const Tensor& y, const Tensor& selected,
    const Tensor& corners, const Tensor& moments, const Tensor& dscale, const Tensor& dbias, const Tensor& sparse,
    double slope, bool pool, const OptionalTensor& patch_mean, const OptionalTensor& patch_covariance, bool need_x,
    bool need_weight, const std::string& precision) {
  check_block(x, weight, scale, bias, eps, pool, patch_mean, patch_covariance);
  check_saved(q, x, weight, y, selected, corners, moments, pool, patch_mean.has_value());
  const std::pair<const char*, std::pair<const OptionalTensor&, const Tensor&>> cotangents[] = {
      {"on_x", {on_x, x}}, {"on_weight", {on_weight, weight}}, {"on_scale", {on_scale, scale}},
      {"on_bias", {on_bias, bias}}, {"on_eps", {on_eps, eps}}};
  for (const auto& [name, pair] : cotangents) {
    if (!pair.first) continue;
    check_shape(name, *pair.first, pair.second.sizes(), "like what it is a cotangent of");
    check_like(name, *pair.first, "x", x);
  }
  check_shape("dscale", dscale, scale.sizes(), "like scale");
  check_like("dscale", dscale, "x", x);
  check_shape("dbias", dbias, bias.sizes(), "like bias");
  check_like("dbias", dbias, "x", x);
  if (sparse.dim() != 1 || sparse.numel())
    check_shape("sparse", sparse, {x.size(0), patch_mean ? 9 * x.size(2) : 0, weight.size(1)},
                "the backward operator's output, or none: [0]");
  TORCH_CHECK_VALUE(sparse.scalar_type() == at::kDouble, "sparse must be Double, got ", sparse.scalar_type());
  return conv_block_double_backward(on_x, on_weight, on_scale, on_bias, on_eps, q, x, weight, scale, bias, eps, y,
                                    selected, corners, moments, dscale, dbias, sparse, slope, pool, patch_mean,
                                    patch_covariance, need_x, need_weight, precision_of(precision));
}

Tensor checked_conv_block_convolution(const Tensor& x, const Tensor& weight, const std::string& precision) {
  const Tensor affine = x.new_empty({weight.size(0), weight.dim() > 1 ? weight.size(1) : 0});
  check_block(x, weight, affine, affine, x.new_empty({x.size(0)}), false, std::nullopt, std::nullopt);
  return conv_block_convolution(x, weight, precision_of(precision));
}

Tensor checked_conv_block_activation(const Tensor& y, const Tensor& scale, const Tensor& bias, const Tensor& eps,
                                     const Tensor& moments, double slope) {
  check_images("y", y);
  for (const auto& [name, tensor] : {std::pair{"scale", scale}, std::pair{"bias", bias}}) {
    check_shape(name, tensor, {y.size(0), y.size(2)}, "T and C from y");
    check_like(name, tensor, "y", y);
  }
  check_shape("eps", eps, {y.size(0)}, "T from y");
  check_like("eps", eps, "y", y);
  check_shape("moments", moments, {y.size(0), 2, y.size(2)}, "T, mean and variance, C");
  TORCH_CHECK_VALUE(moments.scalar_type() == at::kDouble, "moments must be Double, got ", moments.scalar_type());
  return conv_block_activation(y, scale, bias, eps, moments, slope);
}

// --- residual_end ---

void check_end(double slope, int64_t padding) {
  check_slope(slope);
  TORCH_CHECK_VALUE(padding == 0 || padding == 1, "padding must be 0 or 1, got ", padding);
}

// codes of the end of [T, S, C, height, width]
void check_codes(const Tensor& codes, const Tensor& like, int64_t height, int64_t width, bool pool, int64_t padding) {
  auto sizes = like.sizes().vec();
  sizes[3] = pool ? (height + 2 * padding) / 2 : height;
  sizes[4] = pool ? (width + 2 * padding) / 2 : width;
  check_shape("codes", codes, sizes, "the forward operator's output");
  TORCH_CHECK_VALUE(codes.scalar_type() == at::kByte, "codes must be Byte, got ", codes.scalar_type());
}

auto checked_residual_end(const Tensor& x, const Tensor& shortcut, double slope, bool pool, int64_t padding) {
  check_end(slope, padding);
  check_images("x", x, pool, padding);
  check_shape("shortcut", shortcut, x.sizes(), "like x");
  check_like("shortcut", shortcut, "x", x);
  return residual_end(x, shortcut, slope, pool, padding);
}

Tensor checked_residual_end_backward(const Tensor& q, const Tensor& codes, int64_t height, int64_t width, double slope,
                                     bool pool, int64_t padding) {
  check_images("q", q);
  check_end(slope, padding);
  check_codes(codes, q, height, width, pool, padding);
  check_shape("q", q, codes.sizes(), "like codes");
  return residual_end_backward(q, codes, height, width, slope, pool, padding);
}

Tensor checked_residual_end_double_backward(const Tensor& cotangent, const Tensor& codes, double slope, bool pool,
                                            int64_t padding) {
  check_end(slope, padding);
  check_images("cotangent", cotangent, pool, padding);
  check_codes(codes, cotangent, cotangent.size(3), cotangent.size(4), pool, padding);
  return residual_end_double_backward(cotangent, codes, slope, pool, padding);
}

// --- scaling_factors ---

Scaler checked_scaler(const Tensor& context, const Tensor& w0, const Tensor& b0, const Tensor& w2, const Tensor& b2,
                      double norm_eps, double least) {
  TORCH_CHECK_VALUE(context.dim() == 2, "context must be [T, D], got ", context.sizes());
  check_floating("context", context);
  TORCH_CHECK_VALUE(w0.dim() == 2 && w0.size(1) == context.size(1) && none_is_zero(w0.sizes()), "w0 must be [H, ",
                    context.size(1), "] (D from context), none 0, got ", w0.sizes());
  TORCH_CHECK_VALUE(w2.dim() == 2 && w2.size(1) == w0.size(0) && none_is_zero(w2.sizes()), "w2 must be [L, ",
                    w0.size(0), "] (H from w0), none 0, got ", w2.sizes());
  check_shape("b0", b0, {w0.size(0)}, "H from w0");
  check_shape("b2", b2, {w2.size(0)}, "L from w2");
  for (const auto& [name, tensor] : {std::pair{"w0", w0}, {"b0", b0}, {"w2", w2}, {"b2", b2}})
    check_like(name, tensor, "context", context);
  TORCH_CHECK_VALUE(norm_eps >= 0 && std::isfinite(norm_eps), "norm_eps must be finite and not negative, got ",
                    norm_eps);
  TORCH_CHECK_VALUE(least >= 0 && std::isfinite(least), "least must be finite and not negative, got ", least);
  return {context, w0, b0, w2, b2, norm_eps, least};
}

// on gammas or eps
void check_factors(const char* name, const OptionalTensor& cotangent, const Scaler& scaler) {
  if (!cotangent) return;
  check_shape(name, *cotangent, {scaler.context.size(0), scaler.w2.size(0)}, "T from context, L from w2");
  check_like(name, *cotangent, "context", scaler.context);
}

std::tuple<Tensor, Tensor> checked_scaling_factors(const Tensor& context, const Tensor& w0, const Tensor& b0,
                                                   const Tensor& w2, const Tensor& b2, double norm_eps, double least) {
  return scaling_factors(checked_scaler(context, w0, b0, w2, b2, norm_eps, least));
}

auto checked_scaling_factors_backward(const OptionalTensor& v, const OptionalTensor& e, const Tensor& context,
                                      const Tensor& w0, const Tensor& b0, const Tensor& w2, const Tensor& b2,
                                      double norm_eps, double least, std::array<bool, 5> needed) {
  const Scaler scaler = checked_scaler(context, w0, b0, w2, b2, norm_eps, least);
  check_factors("v", v, scaler);
  check_factors("e", e, scaler);
  return std::tuple_cat(scaling_factors_backward(v, e, scaler, needed));
}

auto checked_scaling_factors_double_backward(const OptionalTensor& on_context, const OptionalTensor& on_w0,
                                             const OptionalTensor& on_b0, const OptionalTensor& on_w2,
                                             const OptionalTensor& on_b2, const OptionalTensor& v,
                                             const OptionalTensor& e, const Tensor& context, const Tensor& w0,
                                             const Tensor& b0, const Tensor& w2, const Tensor& b2, double norm_eps,
                                             double least, std::array<bool, 7> needed) {
  const Scaler scaler = checked_scaler(context, w0, b0, w2, b2, norm_eps, least);
  check_factors("v", v, scaler);
  check_factors("e", e, scaler);
  const std::pair<const char*, std::pair<const OptionalTensor&, const Tensor&>> cotangents[] = {
      {"on_context", {on_context, context}}, {"on_w0", {on_w0, w0}}, {"on_b0", {on_b0, b0}}, {"on_w2", {on_w2, w2}},
      {"on_b2", {on_b2, b2}}};
  for (const auto& [name, pair] : cotangents) {
    if (!pair.first) continue;
    check_shape(name, *pair.first, pair.second.sizes(), "like what it is a cotangent of");
    check_like(name, *pair.first, "context", context);
  }
  return std::tuple_cat(
      scaling_factors_double_backward({on_context, on_w0, on_b0, on_w2, on_b2}, v, e, scaler, needed));
}

// --- linear_cross_entropy ---

// what every order has; the labels as Long
Tensor check_head(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& labels) {
  TORCH_CHECK_VALUE(x.dim() >= 3, "x must be [T, S, ...], got ", x.sizes());
  check_floating("x", x);
  TORCH_CHECK_VALUE(none_is_zero(x.sizes().slice(1)), "x must be [T, S, ...], of which T alone may be 0, got ",
                    x.sizes());
  const int64_t tasks = x.size(0), features = c10::multiply_integers(x.sizes().slice(2));
  TORCH_CHECK_VALUE(weight.dim() == 3 && weight.size(0) == tasks && weight.size(2) == features, "weight must be [",
                    tasks, ", N, ", features, "] (T and D from x), got ", weight.sizes());
  check_like("weight", weight, "x", x);
  const int64_t ways = weight.size(1);
  TORCH_CHECK_VALUE(ways > 0, "weight must have an output, got ", weight.sizes());
  check_shape("bias", bias, {tasks, ways}, "T from x, N from weight");
  check_like("bias", bias, "x", x);
  check_shape("labels", labels, x.sizes().slice(0, 2), "T and S from x");
  TORCH_CHECK_VALUE(at::isIntegralType(labels.scalar_type(), false) && labels.device() == x.device(),
                    "labels must be whole numbers on ", x.device(), ", got ", labels.scalar_type(), " on ",
                    labels.device());
  const Tensor whole = labels.to(at::kLong).contiguous();
  const int64_t* label = whole.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < whole.numel(); ++i)
    TORCH_CHECK_VALUE(label[i] >= 0 && label[i] < ways, "labels must be from 0 to ", ways - 1, ", got ", label[i]);
  return whole;
}

// what the derivatives have
void check_head_gradients(const OptionalTensor& losses_gradient, const OptionalTensor& logits_gradient, const Tensor& x,
                          const Tensor& weight, const Tensor& probabilities) {
  const std::vector<int64_t> sizes{x.size(0), x.size(1), weight.size(1)};
  check_shape("probabilities", probabilities, sizes, "the forward operator's output");
  TORCH_CHECK_VALUE(probabilities.scalar_type() == at::kDouble, "probabilities must be Double, got ",
                    probabilities.scalar_type());
  TORCH_CHECK_VALUE(losses_gradient || logits_gradient, "losses_gradient or logits_gradient must be there");
  if (losses_gradient) {
    check_shape("losses_gradient", *losses_gradient, x.sizes().slice(0, 1), "T from x");
    check_like("losses_gradient", *losses_gradient, "x", x);
  }
  if (logits_gradient) {
    check_shape("logits_gradient", *logits_gradient, sizes, "T and S from x, N from weight");
    check_like("logits_gradient", *logits_gradient, "x", x);
  }
}

auto checked_linear_cross_entropy(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& labels) {
  return linear_cross_entropy(x, weight, bias, check_head(x, weight, bias, labels));
}

auto checked_linear_cross_entropy_backward(const OptionalTensor& losses_gradient, const OptionalTensor& logits_gradient,
                                           const Tensor& x, const Tensor& weight, const Tensor& bias,
                                           const Tensor& labels, const Tensor& probabilities, bool need_x,
                                           bool need_weight) {
  const Tensor whole = check_head(x, weight, bias, labels);
  check_head_gradients(losses_gradient, logits_gradient, x, weight, probabilities);
  return linear_cross_entropy_backward(losses_gradient, logits_gradient, x, weight, whole, probabilities, need_x,
                                       need_weight);
}

auto checked_linear_cross_entropy_double_backward(const OptionalTensor& on_x, const OptionalTensor& on_weight,
                                                  const OptionalTensor& on_bias, const OptionalTensor& losses_gradient,
                                                  const OptionalTensor& logits_gradient, const Tensor& x,
                                                  const Tensor& weight, const Tensor& bias, const Tensor& labels,
                                                  const Tensor& probabilities, bool need_x, bool need_weight) {
  const Tensor whole = check_head(x, weight, bias, labels);
  check_head_gradients(losses_gradient, logits_gradient, x, weight, probabilities);
  const std::pair<const char*, std::pair<const OptionalTensor&, const Tensor&>> cotangents[] = {
      {"on_x", {on_x, x}}, {"on_weight", {on_weight, weight}}, {"on_bias", {on_bias, bias}}};
  for (const auto& [name, pair] : cotangents) {
    if (!pair.first) continue;
    check_shape(name, *pair.first, pair.second.sizes(), "like what it is a cotangent of");
    check_like(name, *pair.first, "x", x);
  }
  return linear_cross_entropy_double_backward(on_x, on_weight, on_bias, losses_gradient, logits_gradient, x, weight,
                                              whole, probabilities, need_x, need_weight);
}

// --- sums ---

Tensors checked_sums(at::TensorList terms, at::IntArrayRef counts) {
  TORCH_CHECK_VALUE(!terms.empty(), "terms must hold at least two tensors, got none");
  check_floating("terms[0]", terms[0]);
  size_t first = 0;
  for (const int64_t count : counts) {
    TORCH_CHECK_VALUE(count >= 2 && first + size_t(count) <= terms.size(), "counts must be of at least 2 and add up to ",
                      terms.size(), ", the number of terms, got ", counts);
    for (size_t i = first; i < first + size_t(count); ++i) {
      check_shape(entry("terms", i), terms[i], terms[first].sizes(), "like its group's first");
      check_like(entry("terms", i), terms[i], "terms[0]", terms[0]);
      TORCH_CHECK_VALUE(terms[i].is_contiguous(), entry("terms", i), " must be contiguous");
    }
    first += size_t(count);
  }
  TORCH_CHECK_VALUE(first == terms.size(), "counts must add up to ", terms.size(), ", the number of terms, got ",
                    counts);
  return sums(terms, counts);
}

std::string instruction_set() {
  const std::string vectors = kVectorBytes == 64 ? "AVX-512" : kVectorBytes == 32 ? "AVX2" : "128-bit vectors";
  return has_tiles() ? vectors + " and AMX" : vectors;
}

}  // namespace
}  // namespace cxgrad

TORCH_LIBRARY(cxgrad_fast, m) {
  m.def("instruction_set() -> str", &cxgrad::instruction_set);
  m.def("has_tiles() -> bool", &cxgrad::has_tiles);

  m.def("scale_weights(Tensor[] weights, Tensor gammas) -> Tensor[]");
  m.def("scale_weights_backward(Tensor[] weights, Tensor gammas, Tensor[] v) -> (Tensor[], Tensor)");
  m.def(
      "scale_weights_double_backward(Tensor[] weights, Tensor gammas, Tensor[] v, Tensor[] a, Tensor c)"
      " -> (Tensor[], Tensor, Tensor[])");

  m.def("normalize_weights(Tensor[] weights) -> (Tensor[], Tensor)");
  m.def("normalize_weights_backward(Tensor[] weights, Tensor[] v, Tensor n) -> Tensor[]");
  m.def(
      "normalize_weights_double_backward(Tensor[] weights, Tensor[] v, Tensor n, Tensor[] a)"
      " -> (Tensor[], Tensor[], Tensor)");

  m.def(
      "gradient_step(Tensor[] weights, Tensor[] gradients, float rate, Tensor? rates, Tensor? factors,"
      " Tensor? divisors) -> Tensor[]");
  m.def(
      "gradient_step_backward(Tensor[] weights, Tensor[] gradients, float rate, Tensor? rates, Tensor? factors,"
      " Tensor? divisors, Tensor[] v, bool[5] needs) -> (Tensor[], Tensor[], Tensor, Tensor, Tensor)");

  m.def("patch_statistics(Tensor x) -> (Tensor, Tensor)");

  m.def(
      "conv_block(Tensor x, Tensor weight, Tensor scale, Tensor bias, Tensor eps, float slope, bool pool,"
      " Tensor? patch_mean, Tensor? patch_covariance, str precision=\"float32\")"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "conv_block_backward(Tensor q, Tensor? y_gradient, Tensor x, Tensor weight, Tensor scale, Tensor bias,"
      " Tensor eps, Tensor y, Tensor selected, Tensor corners, Tensor moments, float slope, bool pool,"
      " Tensor? patch_mean, Tensor? patch_covariance, bool need_x, bool need_weight,"
      " str precision=\"float32\") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "conv_block_double_backward(Tensor? on_x, Tensor? on_weight, Tensor? on_scale, Tensor? on_bias, Tensor? on_eps,"
      " Tensor q, Tensor x, Tensor weight, Tensor scale, Tensor bias, Tensor eps, Tensor y, Tensor selected,"
      " Tensor corners, Tensor moments, Tensor dscale, Tensor dbias, Tensor sparse, float slope, bool pool,"
      " Tensor? patch_mean, Tensor? patch_covariance, bool need_x, bool need_weight,"
      " str precision=\"float32\") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");

  m.def("conv_block_convolution(Tensor x, Tensor weight, str precision=\"float32\") -> Tensor");
  m.def(
      "conv_block_activation(Tensor y, Tensor scale, Tensor bias, Tensor eps, Tensor moments, float slope) -> Tensor");

  m.def("sums(Tensor[] terms, int[] counts) -> Tensor[]");

  m.def("residual_end(Tensor x, Tensor shortcut, float slope, bool pool, int padding) -> (Tensor, Tensor)");
  m.def(
      "residual_end_backward(Tensor q, Tensor codes, int height, int width, float slope, bool pool, int padding)"
      " -> Tensor");
  m.def(
      "residual_end_double_backward(Tensor cotangent, Tensor codes, float slope, bool pool, int padding) -> Tensor");

  m.def(
      "scaling_factors(Tensor context, Tensor w0, Tensor b0, Tensor w2, Tensor b2, float norm_eps, float least)"
      " -> (Tensor, Tensor)");
  m.def(
      "scaling_factors_backward(Tensor? v, Tensor? e, Tensor context, Tensor w0, Tensor b0, Tensor w2, Tensor b2,"
      " float norm_eps, float least, bool[5] needed) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "scaling_factors_double_backward(Tensor? on_context, Tensor? on_w0, Tensor? on_b0, Tensor? on_w2, Tensor? on_b2,"
      " Tensor? v, Tensor? e, Tensor context, Tensor w0, Tensor b0, Tensor w2, Tensor b2, float norm_eps, float least,"
      " bool[7] needed) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");

  m.def("linear_cross_entropy(Tensor x, Tensor weight, Tensor bias, Tensor labels) -> (Tensor, Tensor, Tensor)");
  m.def(
      "linear_cross_entropy_backward(Tensor? losses_gradient, Tensor? logits_gradient, Tensor x, Tensor weight,"
      " Tensor bias, Tensor labels, Tensor probabilities, bool need_x, bool need_weight) -> (Tensor, Tensor, Tensor)");
  m.def(
      "linear_cross_entropy_double_backward(Tensor? on_x, Tensor? on_weight, Tensor? on_bias, Tensor? losses_gradient,"
      " Tensor? logits_gradient, Tensor x, Tensor weight, Tensor bias, Tensor labels, Tensor probabilities, bool need_x,"
      " bool need_weight) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");

  // for tests and benches
  m.def("take_convolution_count() -> int", &cxgrad::take_convolution_count);
  m.def("assume_tiles(bool? there) -> ()", &cxgrad::assume_tiles);
  m.def("poison_buffers(bool on) -> ()", &cxgrad::poison_buffers);
  m.def("release_buffers() -> int", &cxgrad::release_buffers);
  m.def("fresh_buffer_bytes() -> int", &cxgrad::fresh_buffer_bytes);
}

TORCH_LIBRARY_IMPL(cxgrad_fast, CPU, m) {
  m.impl("scale_weights", &cxgrad::checked_scale_weights);
  m.impl("scale_weights_backward", &cxgrad::checked_scale_weights_backward);
  m.impl("scale_weights_double_backward", &cxgrad::checked_scale_weights_double_backward);
  m.impl("normalize_weights", &cxgrad::checked_normalize_weights);
  m.impl("normalize_weights_backward", &cxgrad::checked_normalize_weights_backward);
  m.impl("normalize_weights_double_backward", &cxgrad::checked_normalize_weights_double_backward);
  m.impl("gradient_step", &cxgrad::checked_gradient_step);
  m.impl("gradient_step_backward", &cxgrad::checked_gradient_step_backward);
  m.impl("patch_statistics", &cxgrad::checked_patch_statistics);
  m.impl("conv_block", &cxgrad::checked_conv_block);
  m.impl("conv_block_backward", &cxgrad::checked_conv_block_backward);
  m.impl("conv_block_double_backward", &cxgrad::checked_conv_block_double_backward);
  m.impl("conv_block_convolution", &cxgrad::checked_conv_block_convolution);
  m.impl("conv_block_activation", &cxgrad::checked_conv_block_activation);
  m.impl("sums", &cxgrad::checked_sums);
  m.impl("residual_end", &cxgrad::checked_residual_end);
  m.impl("residual_end_backward", &cxgrad::checked_residual_end_backward);
  m.impl("residual_end_double_backward", &cxgrad::checked_residual_end_double_backward);
  m.impl("scaling_factors", &cxgrad::checked_scaling_factors);
  m.impl("scaling_factors_backward", &cxgrad::checked_scaling_factors_backward);
  m.impl("scaling_factors_double_backward", &cxgrad::checked_scaling_factors_double_backward);
  m.impl("linear_cross_entropy", &cxgrad::checked_linear_cross_entropy);
  m.impl("linear_cross_entropy_backward", &cxgrad::checked_linear_cross_entropy_backward);
  m.impl("linear_cross_entropy_double_backward", &cxgrad::checked_linear_cross_entropy_double_backward);
}
