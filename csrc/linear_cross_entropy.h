// A linear layer and the cross-entropy of its logits, of all tasks, with both derivatives (docs/math.md).
//
// x is [T, S, ...], all axes behind S are the D features; weight [T, N, D], bias [T, N], labels [T, S] Long from 0 to
// N - 1, logits [T, S, N], and probabilities are their softmax in float64, from which the derivatives start. Images,
// [T, S, C, H, W], are summed and handed back channels last, as conv_block has them, however they lie: the same bits.
// What is not asked for is an empty vector.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

namespace cxgrad {

// losses [T], logits, probabilities
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_cross_entropy(const at::Tensor& x, const at::Tensor& weight,
                                                                    const at::Tensor& bias, const at::Tensor& labels);

// gradients of x, weight and bias for those of losses and logits, of which one is there
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_cross_entropy_backward(
    const std::optional<at::Tensor>& losses_gradient, const std::optional<at::Tensor>& logits_gradient,
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& labels, const at::Tensor& probabilities,
    bool need_x, bool need_weight);

// gradients of x, weight, bias, losses_gradient and logits_gradient for cotangents of the backward's three results
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_cross_entropy_double_backward(
    const std::optional<at::Tensor>& on_x, const std::optional<at::Tensor>& on_weight,
    const std::optional<at::Tensor>& on_bias, const std::optional<at::Tensor>& losses_gradient,
    const std::optional<at::Tensor>& logits_gradient, const at::Tensor& x, const at::Tensor& weight,
    const at::Tensor& labels, const at::Tensor& probabilities, bool need_x, bool need_weight);

}  // namespace cxgrad
