// The end of a residual block: x + shortcut -> LeakyReLU -> 2x2 max-pool. Piecewise linear: which piece is one byte an
// element of the output, and both derivatives need nothing else.
#pragma once

#include <ATen/ATen.h>

#include <tuple>

namespace cxgrad {

// x, shortcut [T, S, C, H, W] -> out and codes (uint8), [T, S, C, H', W'] with H' = (H + 2 padding) / 2, H without pool.
// A code is norm.h's: the arg-max's corner in bits 0 and 1, whether the slope applies in bit 2.
std::tuple<at::Tensor, at::Tensor> residual_end(const at::Tensor& x, const at::Tensor& shortcut, double slope, bool pool,
                                                int64_t padding);

// the gradient of x, which is that of shortcut, [T, S, C, height, width], for the gradient q of out
at::Tensor residual_end_backward(const at::Tensor& q, const at::Tensor& codes, int64_t height, int64_t width,
                                 double slope, bool pool, int64_t padding);

// the gradient of q for a cotangent of residual_end_backward's result
at::Tensor residual_end_double_backward(const at::Tensor& cotangent, const at::Tensor& codes, double slope, bool pool,
                                        int64_t padding);

}  // namespace cxgrad
