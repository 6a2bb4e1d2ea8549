// scale_weights and normalize_weights, for all layers and tasks at once (MATH.md 3).
//
// A weight is [T, ...], or [1, ...] shared by all tasks; gammas and norms are [T, L]. Arguments are checked by the
// caller; results have the layout of a fresh tensor.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>
#include <vector>

namespace cxgrad {

using Tensors = std::vector<at::Tensor>;

Tensors scale_weights(at::TensorList weights, const at::Tensor& gammas);

// v [T, ...] on the scaled weights -> gradients of weights, gammas
std::tuple<Tensors, at::Tensor> scale_weights_backward(at::TensorList weights, const at::Tensor& gammas,
                                                       at::TensorList v);

// a on the gradients of weights, c on that of gammas -> gradients of weights, gammas, v
std::tuple<Tensors, at::Tensor, Tensors> scale_weights_double_backward(at::TensorList weights, const at::Tensor& gammas,
                                                                       at::TensorList v, at::TensorList a,
                                                                       const at::Tensor& c);

// units, norms
std::tuple<Tensors, at::Tensor> normalize_weights(at::TensorList weights);

// v on the units, n on the norms -> gradients of weights
Tensors normalize_weights_backward(at::TensorList weights, at::TensorList v, const at::Tensor& n);

// a on the gradients of weights -> gradients of weights, v, n
std::tuple<Tensors, Tensors, at::Tensor> normalize_weights_double_backward(at::TensorList weights, at::TensorList v,
                                                                           const at::Tensor& n, at::TensorList a);

}  // namespace cxgrad
