"""Squared Mahalanobis distances of rows: centred, whitened and summed without writing either."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from cmd_plugin.errors import ShapeError
from cmd_plugin.kernels._dispatch import choose
from cmd_plugin.kernels._precision import ieee_float32
from cmd_plugin.kernels.mahalanobis import _blocked

__all__ = ["mahalanobis"]


def mahalanobis(
    x: Tensor,
    mean: Tensor,
    matrix: Tensor,
    *,
    triangular: bool = False,
    backend: Literal["auto", "torch", "triton"] = "auto",
) -> Tensor:
    r"""Return :math:`\lVert (x_i - \mu) W \rVert^2` of every row.

    Rows are centred before they are multiplied, in float32 (float64 for float64 rows): half
    precision enters as it is, and products are never taken in fewer bits than float32's.

    Args:
        x: [N, d] rows, any floating dtype and strides. Rows with NaN or infinite values give either
            of the two; nothing is checked here.
        mean: [d].
        matrix: [d, r], r <= d with ``triangular``.
        triangular: A promise that ``matrix[i, j]`` is zero where i - j > d - r: half of the work is
            left out. A broken promise gives wrong distances.
        backend: ``"triton"`` reads the rows and writes N numbers (CUDA, no float64), ``"torch"``
            works everywhere; ``"auto"`` takes the first where it can.

    Returns:
        [N] float32, float64 for float64 rows.

    Raises:
        ShapeError: If shapes, dtypes or devices do not fit.
        InputError: If the backend cannot run on these.
        MissingDependency: If ``backend="triton"`` and Triton is not installed.
    """
    _check(x, mean, matrix, triangular)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, mean, matrix = x.detach(), mean.detach().to(dtype), matrix.detach().to(dtype).contiguous()
    used = choose(
        "mahalanobis",
        backend,
        x.device,
        triton=dtype == torch.float32,
        triton_limit="takes no float64 there",
    )
    if used == "triton":
        # Imported here: only who has a GPU needs Triton.
        from cmd_plugin.kernels.mahalanobis import _triton

        return _triton.mahalanobis(x, mean, matrix, triangular)
    with ieee_float32():
        return _blocked.mahalanobis(x, mean, matrix, triangular)


def _check(x: Tensor, mean: Tensor, matrix: Tensor, triangular: bool) -> None:
    if x.ndim != 2 or not x.is_floating_point() or not x.shape[1]:
        raise ShapeError(f"x must be floating [N, d], got {tuple(x.shape)} {x.dtype}.")
    dim = x.shape[1]
    if mean.shape != (dim,) or not mean.is_floating_point():
        raise ShapeError(f"mean must be floating [{dim}], got {tuple(mean.shape)} {mean.dtype}.")
    if matrix.ndim != 2 or len(matrix) != dim or not matrix.is_floating_point():
        raise ShapeError(
            f"matrix must be floating [{dim}, r], got {tuple(matrix.shape)} {matrix.dtype}."
        )
    if not matrix.shape[1] >= 1 or (triangular and matrix.shape[1] > dim):
        raise ShapeError(f"a matrix of {tuple(matrix.shape)} has too few or too many columns.")
    if not x.device == mean.device == matrix.device:
        raise ShapeError(
            f"x, mean and matrix are on {x.device}, {mean.device} and {matrix.device}: bring them "
            "to one device."
        )
