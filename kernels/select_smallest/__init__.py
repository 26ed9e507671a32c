"""Choose exactly so many of the smallest values, without sorting."""

from __future__ import annotations

import torch
from torch import Tensor

from cmd_plugin.errors import InputError, ShapeError
from cmd_plugin.kernels._dispatch import Backend, choose
from cmd_plugin.kernels.select_smallest import _blocked

__all__ = ["select_smallest"]


def select_smallest(values: Tensor, num: int, backend: Backend = "auto") -> Tensor:
    """Return a mask of the ``num`` smallest values; of equal ones the first are taken.

    It marks the same positions as the first ``num`` of ``values.argsort(stable=True)``. The bits of
    a float, read as an integer, are ordered like the float, so histograms of its digits find the
    boundary value: a few passes over the values and no sort.

    Args:
        values: [N] float16, bfloat16, float32 or float64; infinities are allowed.
        num: How many, at least 0; all N if there are not so many.
        backend: See :func:`cmd_plugin.kernels.update_affine`.

    Returns:
        [N] bool, exactly ``min(num, N)`` of them True.

    Raises:
        ShapeError: If ``values`` is not a floating vector.
        InputError: If ``num`` is negative or a value is NaN, which has no place in the order;
            or ``backend`` cannot address these tensors.
        MissingDependency: If ``backend`` needs a package that is not installed.
    """
    if torch.compiler.is_compiling():
        mask: Tensor = _operator(values, num, backend)
        return mask
    if values.ndim != 1 or not values.is_floating_point():
        raise ShapeError(
            f"values must be a floating vector [N], got {tuple(values.shape)} {values.dtype}."
        )
    if isinstance(num, bool) or not isinstance(num, int) or num < 0:
        raise InputError(f"num must be a whole number of at least 0, got {num!r}.")
    chosen = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    if not num or not len(values):
        return chosen
    compiled = values.is_contiguous() and values.dtype in (torch.float32, torch.float64)
    path = choose(
        "select_smallest",
        backend,
        values.device,
        len(values),
        numba=values.device.type == "cpu" and compiled,
    )
    num = min(num, len(values))
    if path == "triton":
        from cmd_plugin.kernels.select_smallest import _triton

        _triton.select_smallest(values.contiguous(), num, chosen)
    elif path == "numba":
        from cmd_plugin.kernels.select_smallest import _numba

        _numba.select_smallest(values, num, chosen)
    else:
        _blocked.select_smallest(values, num, chosen)
    return chosen


_operator = torch.library.custom_op(
    "cmd_plugin::select_smallest",
    select_smallest,
    mutates_args=(),
    schema="(Tensor values, int num, str backend) -> Tensor",
)


@_operator.register_fake
def _fake(values: Tensor, num: int, backend: str) -> Tensor:  # noqa: ARG001 the signature
    return torch.empty_like(values, dtype=torch.bool)
