// conv_block and its two derivatives: convolution -> BatchNorm -> LeakyReLU -> 2x2 max-pool (MATH.md 1 and 2).
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

#include "rounding.h"

namespace cxgrad {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// (out, y, selected, corners, moments)
//   y         [T, S, C, H, W] the convolution, none [0] in the first layer
//   selected  [T, S, C, H / 2, W / 2] its normalised value at the arg-max, corners (uint8) which that is; [0] without pool
//   moments   [T, 2, C] float64: mean and biased variance
// Images lie channels last. Without an activation `slope` is 1. `precision`: of the products of float32 values.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv_block(const Tensor& x, const Tensor& weight,
                                                              const Tensor& scale, const Tensor& bias,
                                                              const Tensor& eps, double slope, bool pool,
                                                              const OptionalTensor& patch_mean,
                                                              const OptionalTensor& patch_covariance,
                                                              Precision precision);

// (dx, dweight, dscale, dbias, deps, sparse) for the gradient q of `out` and `y_gradient` of `y`; what is not needed is
// [0]. sparse [T, taps, C] float64 is the first layer's D, which its second derivative wants again.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv_block_backward(
    const Tensor& q, const OptionalTensor& y_gradient, const Tensor& x, const Tensor& weight, const Tensor& scale,
    const Tensor& bias, const Tensor& eps, const Tensor& y, const Tensor& selected, const Tensor& corners,
    const Tensor& moments, double slope, bool pool, const OptionalTensor& patch_mean,
    const OptionalTensor& patch_covariance, bool need_x, bool need_weight, Precision precision);

// (q, x, weight, scale, eps, y): the gradients of the first derivative's inputs for cotangents on its outputs dx, dweight,
// dscale, dbias and deps; what is not needed is [0]
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv_block_double_backward(
    const OptionalTensor& on_x, const OptionalTensor& on_weight, const OptionalTensor& on_scale,
    const OptionalTensor& on_bias, const OptionalTensor& on_eps, const Tensor& q, const Tensor& x,
    const Tensor& weight, const Tensor& scale, const Tensor& bias, const Tensor& eps, const Tensor& y,
    const Tensor& selected, const Tensor& corners, const Tensor& moments, const Tensor& dscale, const Tensor& dbias,
    const Tensor& sparse, double slope, bool pool, const OptionalTensor& patch_mean,
    const OptionalTensor& patch_covariance, bool need_x, bool need_weight, Precision precision);

// y and, without pooling, out again from what they were made of: what autograd need not keep (kernels/conv_block/cpp.py)
Tensor conv_block_convolution(const Tensor& x, const Tensor& weight, Precision precision);
Tensor conv_block_activation(const Tensor& y, const Tensor& scale, const Tensor& bias, const Tensor& eps,
                             const Tensor& moments, double slope);

// convolution work done since the last call, in multiply-adds of the direct form with zero padding (a quarter of that
// for what is done at the arg-max alone): what the test of MATH.md 1's six units reads
int64_t take_convolution_count();

}  // namespace cxgrad
