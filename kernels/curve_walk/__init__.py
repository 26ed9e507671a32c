"""Random walks over a table of neighbours, reproducible walk by walk."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from cmd_plugin.errors import InputError, ShapeError
from cmd_plugin.kernels._dispatch import choose
from cmd_plugin.kernels.counter_random import check_seed, sample_index
from cmd_plugin.kernels.curve_walk import _torch

__all__ = ["curve_walk"]


def curve_walk(
    neighbours: Tensor,
    start: Tensor,
    length: int,
    *,
    seed: int = 0,
    index: Tensor | None = None,
    backend: Literal["auto", "torch", "triton"] = "auto",
) -> Tensor:
    r"""Walk from every start, each step to a uniformly drawn neighbour of where the walk is.

    .. math:: c_0 = start, \qquad c_{t+1} = neighbours[c_t, \lfloor u_t K \rfloor]

    Points may be visited again. The draw :math:`u_t` of a walk is a function of (seed, number of
    its sample, number of its walk, t): the same on every backend, in any batch, to the last bit.

    Args:
        neighbours: [B, N, K] int64, positions in the cloud; see
            :func:`cmd_plugin.kernels.knn` with ``exclude_self``.
        start: [B, A] int64, where the A walks of every cloud begin.
        length: Number of points of a walk, its start included; at least 1.
        seed: In [0, 2^63).
        index: [B] sample numbers, by default 0..B-1.
        backend: ``"triton"`` (CUDA), ``"torch"`` (anywhere), or ``"auto"``.

    Returns:
        [B, A, length] int64 positions.

    Raises:
        ShapeError: If shapes or dtypes do not fit, or a position lies outside the cloud.
        InputError: If seed, length or backend cannot be used.
    """
    if neighbours.ndim != 3 or neighbours.dtype != torch.int64 or not neighbours.shape[2]:
        raise ShapeError(
            f"neighbours must be [B, N, K] int64, got {tuple(neighbours.shape)} {neighbours.dtype}."
        )
    batch, size, _ = neighbours.shape
    if start.ndim != 2 or len(start) != batch or start.dtype != torch.int64:
        raise ShapeError(
            f"start must be [{batch}, A] int64, got {tuple(start.shape)} {start.dtype}."
        )
    for name, positions in (("neighbours", neighbours), ("start", start)):
        if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < size:
            raise ShapeError(f"{name} must hold positions in 0..{size - 1}.")
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise InputError(f"length must be an integer of at least 1, got {length!r}.")
    number = sample_index(index, batch, neighbours.device)
    used = choose("curve_walk", backend, neighbours.device)
    if used == "triton":
        # Imported here: only who has a GPU needs Triton.
        from cmd_plugin.kernels.curve_walk import _triton

        return _triton.curve_walk(neighbours, start, length, check_seed(seed), number)
    return _torch.curve_walk(neighbours, start, length, check_seed(seed), number)
