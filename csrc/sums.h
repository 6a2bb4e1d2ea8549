// Additions of tensors alike, many in one call: what traced programs make of gradients that meet (engine/simplify.py).
#pragma once

#include <ATen/ATen.h>

#include <vector>

namespace cxgrad {

// ((a + b) + c) + ... of each group of `terms`, contiguous tensors of one type; `counts` terms in a group, in order
std::vector<at::Tensor> sums(at::TensorList terms, at::IntArrayRef counts);

}  // namespace cxgrad
