"""How far every weight's coefficients have moved since the last embedding event."""

from __future__ import annotations

import torch
from torch import Tensor

from cmd_plugin.errors import ShapeError
from cmd_plugin.kernels._checks import require_vector
from cmd_plugin.kernels._dispatch import Backend, choose
from cmd_plugin.kernels.coefficient_drift import _blocked

__all__ = ["coefficient_drift"]


def coefficient_drift(
    scale: Tensor,
    offset: Tensor,
    old_scale: Tensor,
    old_offset: Tensor,
    *,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""Return :math:`\sqrt{(a_i - a_i^{old})^2 + (b_i - b_i^{old})^2}` of every weight.

    It reads 16 bytes a float32 weight and writes 4. Squares are rounded before they are added, so
    backends differ by the last bit of the root at most, which PyTorch does not round exactly.

    Args:
        scale: [N] float32 or float64, :math:`a`.
        offset: [N] of the same dtype, :math:`b`.
        old_scale: [N] of the same dtype.
        old_offset: [N] of the same dtype.
        out: [N] of the same dtype, filled and returned when given; it may be one of the arguments.
        backend: See :func:`cmd_plugin.kernels.update_affine`.

    Raises:
        ShapeError: If shapes, dtypes or devices differ, or one is not contiguous.
        InputError: If ``backend`` cannot address these tensors.
        MissingDependency: If ``backend`` needs a package that is not installed.
    """
    if out is None:
        out = torch.empty_like(scale)
    if torch.compiler.is_compiling():
        _operator(scale, offset, old_scale, old_offset, out, backend)
        return out
    if scale.ndim != 1 or scale.dtype not in (torch.float32, torch.float64):
        raise ShapeError(
            f"scale must be [N] float32 or float64, got {tuple(scale.shape)} {scale.dtype}."
        )
    arrays = {
        "scale": scale,
        "offset": offset,
        "old_scale": old_scale,
        "old_offset": old_offset,
        "out": out,
    }
    for name, array in arrays.items():
        require_vector(name, array, len(scale), scale.dtype, scale.device)
    chosen = choose(
        "coefficient_drift",
        backend,
        scale.device,
        len(scale),
        numba=scale.device.type == "cpu",
    )
    if chosen == "triton":
        from cmd_plugin.kernels.coefficient_drift import _triton

        _triton.coefficient_drift(scale, offset, old_scale, old_offset, out)
    elif chosen == "numba":
        from cmd_plugin.kernels.coefficient_drift import _numba

        _numba.coefficient_drift(scale, offset, old_scale, old_offset, out)
    else:
        _blocked.coefficient_drift(scale, offset, old_scale, old_offset, out)
    return out


def _run(
    scale: Tensor,
    offset: Tensor,
    old_scale: Tensor,
    old_offset: Tensor,
    out: Tensor,
    backend: Backend,
) -> None:
    coefficient_drift(scale, offset, old_scale, old_offset, out=out, backend=backend)


_operator = torch.library.custom_op(
    "cmd_plugin::coefficient_drift",
    _run,
    mutates_args=("out",),
    schema="(Tensor scale, Tensor offset, Tensor old_scale, Tensor old_offset, Tensor(a!) out, "
    "str backend) -> ()",
)


@_operator.register_fake
def _fake(*arguments: object) -> None:
    """Nothing is returned."""
