"""Store a snapshot as differences to the first one."""

from __future__ import annotations

import torch
from torch import Tensor

from cmd_plugin.errors import ShapeError
from cmd_plugin.kernels._checks import require_vector
from cmd_plugin.kernels._dispatch import Backend, choose
from cmd_plugin.kernels.flat_view import Weights, as_view, tensors_of
from cmd_plugin.kernels.snapshot_delta import _blocked

__all__ = ["snapshot_delta"]


def snapshot_delta(
    weights: Weights,
    base: Tensor | None = None,
    *,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""Return :math:`w_i - w_i(0)`, rounded to the dtype of ``out``.

    Correlation does not see the shift, and a difference needs far fewer bits than a weight: with
    bfloat16 differences 0.3 % of real weights change modes, with bfloat16 weights 1.5 %. The
    difference is taken in the dtype of ``base`` and rounded once, to nearest even. It reads 8 bytes
    a float32 weight and writes 2.

    Args:
        weights: The N weights of the snapshot.
        base: [N] float32 (float64 if all weights are), the first snapshot; None copies the weights.
        out: [N] of any floating dtype, filled and returned when given; it may lie on another
            device, and then ``base`` does too. None makes one of bfloat16.
        backend: See :func:`cmd_plugin.kernels.update_affine`.

    Raises:
        ShapeError: If shapes, dtypes or devices do not fit.
        InputError: If ``backend`` cannot address these tensors.
        MissingDependency: If ``backend`` needs a package that is not installed.
    """
    if out is None:
        first = tensors_of(weights)[0]
        numel = sum(tensor.numel() for tensor in tensors_of(weights))
        out = torch.empty(numel, dtype=torch.bfloat16, device=first.device)
    if torch.compiler.is_compiling():
        _operator(tensors_of(weights), base, out, backend)
        return out
    view = as_view(weights)
    if not out.is_floating_point():
        raise ShapeError(f"out must be floating, got {out.dtype}.")
    require_vector("out", out, view.numel, out.dtype, out.device)
    require_vector("base", base, view.numel, view.dtype, out.device)
    cpu = view.device.type == "cpu" and out.device.type == "cpu"
    here = view.device == out.device
    chosen = choose(
        "snapshot_delta",
        backend,
        view.device if here else torch.device("cpu"),
        view.numel,
        numba=view.pieces() is not None
        and cpu
        and base is not None
        and out.dtype == torch.bfloat16,
        triton=view.addressable,
    )
    if chosen == "triton":
        from cmd_plugin.kernels.snapshot_delta import _triton

        _triton.snapshot_delta(view, base, out)
    elif chosen == "numba" and base is not None:
        from cmd_plugin.kernels.snapshot_delta import _numba

        _numba.snapshot_delta(view, base, out)
    else:
        _blocked.snapshot_delta(view, base, out)
    return out


def _run(weights: list[Tensor], base: Tensor | None, out: Tensor, backend: Backend) -> None:
    snapshot_delta(weights, base, out=out, backend=backend)


_operator = torch.library.custom_op(
    "cmd_plugin::snapshot_delta",
    _run,
    mutates_args=("out",),
    schema="(Tensor[] weights, Tensor? base, Tensor(a!) out, str backend) -> ()",
)


@_operator.register_fake
def _fake(*arguments: object) -> None:
    """Nothing is returned."""
