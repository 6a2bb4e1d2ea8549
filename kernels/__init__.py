"""The fused operators: the only door to them.

Everything here takes task-batched tensors, task first, and is differentiable twice (the PyTorch references: any number
of times). Which backend computes is decided in :mod:`cxgrad_fast.kernels.backends`; callers never know.
"""

from cxgrad_fast.kernels.backends import release_buffers, use_backend, use_precision
from cxgrad_fast.kernels.conv_block.op import conv_block
from cxgrad_fast.kernels.gradient_step.op import gradient_step
from cxgrad_fast.kernels.linear_cross_entropy.op import linear_cross_entropy
from cxgrad_fast.kernels.normalize_weights.op import normalize_weights
from cxgrad_fast.kernels.patch_statistics.op import PatchStatistics, patch_statistics
from cxgrad_fast.kernels.residual_end.op import residual_end
from cxgrad_fast.kernels.scale_weights.op import scale_weights
from cxgrad_fast.kernels.scaling_factors.op import scaling_factors

__all__ = [
    "PatchStatistics",
    "conv_block",
    "gradient_step",
    "linear_cross_entropy",
    "normalize_weights",
    "patch_statistics",
    "release_buffers",
    "residual_end",
    "scale_weights",
    "scaling_factors",
    "use_backend",
    "use_precision",
]
