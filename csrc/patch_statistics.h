// Mean and covariance of zero-padded 3x3 patches (MATH.md 2).
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace cxgrad {

// x [T, S, C, H, W] of any strides -> mean [T, K], covariance [T, K, K] in float64; K = 9 C, ordered (C, row, column)
std::tuple<at::Tensor, at::Tensor> patch_statistics(const at::Tensor& x);

}  // namespace cxgrad
