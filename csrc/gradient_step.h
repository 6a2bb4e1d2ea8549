// One step of gradient descent for all tensors of all tasks: moved = f w - (r / d) g with numbers a task and tensor.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>
#include <vector>

namespace cxgrad {

// weights, gradients [T, ...]; rates [T or 1, K], else `rate` for all; factors, divisors [T, L] of the first L of K
// tensors, 1 for the others -> moved weights
std::vector<at::Tensor> gradient_step(at::TensorList weights, at::TensorList gradients, double rate,
                                      const std::optional<at::Tensor>& rates, const std::optional<at::Tensor>& factors,
                                      const std::optional<at::Tensor>& divisors);

// v on the moved weights -> gradients of the first L weights, of all gradients, of rates, factors and divisors; what
// `needs` does not ask for, in this order, is empty
std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>, at::Tensor, at::Tensor, at::Tensor> gradient_step_backward(
    at::TensorList weights, at::TensorList gradients, double rate, const std::optional<at::Tensor>& rates,
    const std::optional<at::Tensor>& factors, const std::optional<at::Tensor>& divisors, at::TensorList v,
    at::ArrayRef<bool> needs);

}  // namespace cxgrad
