from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error

from cxgrad_fast.kernels import conv_block, patch_statistics, use_backend


@pytest.fixture(autouse=True, params=["reference", "cpp"])
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with use_backend(request.param):
        yield


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 3, 3), (2, 3, 3, 7, 5), (3, 11, 1, 4, 6), (2, 9, 3, 8, 8), (1, 2, 6, 17, 1), (2, 1, 2, 1, 40)],
)
def test_equals_every_patch_listed(shape: tuple[int, ...]) -> None:
    x = torch.rand(shape, dtype=torch.float64)
    mean, covariance = patch_statistics(x)
    for task in range(len(x)):
        padded = F.pad(x[task], (1, 1, 1, 1))
        patches = torch.stack(
            [
                padded[image, :, row : row + 3, column : column + 3].flatten()
                for image in range(shape[1])
                for row in range(shape[3])
                for column in range(shape[4])
            ]
        )
        torch.testing.assert_close(mean[task], patches.mean(0), rtol=1e-13, atol=1e-15)
        torch.testing.assert_close(covariance[task], torch.cov(patches.T, correction=0), rtol=1e-11, atol=1e-15)


def test_high_pass_filter_on_smooth_images() -> None:
    """The variance that float32 arithmetic would lose (MATH.md 2), from float32 images, against float64."""
    ramp = torch.linspace(0, 1, 40)
    x = (0.5 + 0.4 * torch.sin(3 * ramp)[:, None] * torch.cos(2 * ramp)).expand(1, 4, 3, 40, 40).contiguous()
    laplace = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).expand(1, 1, 3, 3, 3)
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)

    def variance(images: torch.Tensor, fast: bool) -> torch.Tensor:
        dtype = images.dtype
        patches = patch_statistics(images) if fast else None
        affine = (one.to(dtype), zero.to(dtype))
        _, (_, found) = conv_block(
            images,
            laplace.to(dtype),
            *affine,
            1e-5,
            slope=None,
            pool=True,
            patch_statistics=patches,
            return_statistics=True,
        )
        return found

    expected = variance(x.double(), fast=False)
    assert relative_error(variance(x.double(), fast=True), expected) < 1e-11
    assert relative_error(variance(x, fast=True), expected) < 2e-7  # the rounding of the result alone


def test_float64_whatever_comes() -> None:
    assert patch_statistics(torch.rand(1, 2, 3, 4, 4)).covariance.dtype == torch.float64


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"x must be \[T, S, C, H, W\], got \[2, 3, 4, 4\]"):
        patch_statistics(torch.rand(2, 3, 4, 4))
    with pytest.raises(ValueError, match="x must not require a gradient"):
        patch_statistics(torch.rand(1, 2, 3, 4, 4, requires_grad=True))
