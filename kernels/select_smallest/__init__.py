"""Choose exactly so many of the smallest values, without sorting."""

from __future__ import annotations

import torch
from torch import Tensor

from cmd_plugin.errors import InputError, ShapeError
from cmd_plugin.kernels.select_smallest import _blocked

__all__ = ["select_smallest"]


def select_smallest(values: Tensor, num: int) -> Tensor:
    """Return a mask of the ``num`` smallest values; of equal ones the first are taken.

    It marks the same positions as the first ``num`` of ``values.argsort(stable=True)``. The bits of
    a float, read as an integer, are ordered like the float, so three histograms of 11, 11 and 10
    bits find the boundary value (six for float64): a few passes over the values and no sort.

    Args:
        values: [N] float16, bfloat16, float32 or float64; infinities are allowed.
        num: How many, at least 0; all N if there are not so many.

    Returns:
        [N] bool, exactly ``min(num, N)`` of them True.

    Raises:
        ShapeError: If ``values`` is not a floating vector.
        InputError: If ``num`` is negative or a value is NaN, which has no place in the order.
    """
    if values.ndim != 1 or not values.is_floating_point():
        raise ShapeError(
            f"values must be a floating vector [N], got {tuple(values.shape)} {values.dtype}."
        )
    if isinstance(num, bool) or not isinstance(num, int) or num < 0:
        raise InputError(f"num must be a whole number of at least 0, got {num!r}.")
    chosen = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    if num and len(values):
        _blocked.select_smallest(values, min(num, len(values)), chosen)
    return chosen
