// The scaling factors of all layers and tasks, and the norms' epsilons that go with them (docs/math.md): with
//
//     h = relu(c W0' + b0)    s = h W2' + b2    gamma = max(softplus(s), least)    eps = norm_eps / gamma^2
//
// where the derivative of gamma is softplus's even where `least` is larger. Sizes: context c [T, D], W0 [H, D], b0 [H],
// W2 [L, H], b2 [L]; gamma and eps [T, L]. All sums are float64. Arguments are checked by the caller.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace cxgrad {

struct Scaler {
  at::Tensor context, w0, b0, w2, b2;
  double norm_eps, least;
};

// gamma, eps
std::tuple<at::Tensor, at::Tensor> scaling_factors(const Scaler& scaler);

// v on gamma, e on eps -> gradients of context, W0, b0, W2, b2; [0] for one that is not needed
std::array<at::Tensor, 5> scaling_factors_backward(const std::optional<at::Tensor>& v,
                                                   const std::optional<at::Tensor>& e, const Scaler& scaler,
                                                   const std::array<bool, 5>& needed);

// cotangents of those five gradients -> gradients of v, e, context, W0, b0, W2, b2; [0] for one that is not needed
std::array<at::Tensor, 7> scaling_factors_double_backward(const std::array<std::optional<at::Tensor>, 5>& on,
                                                          const std::optional<at::Tensor>& v,
                                                          const std::optional<at::Tensor>& e, const Scaler& scaler,
                                                          const std::array<bool, 7>& needed);

}  // namespace cxgrad
