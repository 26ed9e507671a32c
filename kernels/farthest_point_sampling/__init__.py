"""Spread-out points of a cloud: each pick is the point farthest from those picked before."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from cmd_plugin.errors import ShapeError
from cmd_plugin.kernels._checks import require_clouds
from cmd_plugin.kernels._dispatch import choose
from cmd_plugin.kernels.farthest_point_sampling import reference

__all__ = ["farthest_point_sampling"]

_TRITON_POINTS, _TRITON_AXES = 16384, 3  # coordinates and distances stay in a program's registers


def farthest_point_sampling(
    points: Tensor,
    count: int,
    start: int | Tensor = 0,
    *,
    backend: Literal["auto", "torch", "fpsample", "triton"] = "auto",
) -> Tensor:
    r"""Return the positions of a greedy farthest point sample.

    .. math:: i_0 = start, \qquad i_s = \arg\max_n \min_{r < s} \|p_n - p_{i_r}\|^2

    (Eldar, Lindenbaum, Porat, Zeevi 1997; Gonzalez 1985.) No position is picked twice: of a cloud
    with fewer than ``count`` different points, duplicates come after all the different ones. Of
    equally far points ``"torch"`` and ``"triton"`` take the lowest position; ``"fpsample"`` takes
    the last one it meets, so ask for ``"torch"`` where a result must not depend on what is
    installed.

    Args:
        points: [B, N, C], floating point, finite. Distances are taken in float32, for float64
            clouds in float64 (``"fpsample"``: always float32).
        count: Number of points, 1..N.
        start: First pick, one position or one per cloud [B].
        backend: ``"fpsample"`` (CPU, extra ``points``), ``"triton"`` (CUDA,
            N <= 16384, C = 3), ``"torch"`` (anywhere), or ``"auto"``.

    Returns:
        [B, count] int64, in the order of picking.

    Raises:
        ShapeError: If shapes or dtypes do not fit, or count or start are out of range.
        NonFiniteError: If a coordinate is NaN or infinite.
        InputError: If the backend cannot run on these clouds.
    """
    require_clouds("points", points)
    batch, size, axes = points.shape
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= size:
        raise ShapeError(f"count must be in 1..{size} for clouds of {size} points, got {count!r}.")
    first = _first(start, batch, size, points.device)
    used = choose(
        "farthest_point_sampling",
        backend,
        points.device,
        library="fpsample",
        triton=axes == _TRITON_AXES and size <= _TRITON_POINTS,
        triton_limit=f"takes up to {_TRITON_POINTS} points of {_TRITON_AXES} axes there",
    )
    if used == "fpsample":
        from cmd_plugin.kernels.farthest_point_sampling import _fpsample

        return _fpsample.farthest_point_sampling(points, count, first)
    if used == "triton":
        # Imported here: only who has a GPU needs Triton.
        from cmd_plugin.kernels.farthest_point_sampling import _triton

        return _triton.farthest_point_sampling(points, count, first)
    return reference.farthest_point_sampling(points, count, first)


def _first(start: int | Tensor, batch: int, size: int, device: torch.device) -> Tensor:
    first = torch.as_tensor(start, device=device)
    if first.is_floating_point() or first.dtype == torch.bool or first.shape not in ((), (batch,)):
        raise ShapeError(f"start must be one position or [{batch}] of them, got {start!r}.")
    first = first.to(torch.int64).expand(batch)
    if batch and not 0 <= int(first.min()) <= int(first.max()) < size:
        raise ShapeError(f"start must be in 0..{size - 1}, got {first.tolist()}.")
    return first
