"""Show modelled weights in a live model, and put the raw ones back bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cmd_plugin.errors import ShapeError
from cmd_plugin.kernels._checks import require_backup, require_pair, require_state
from cmd_plugin.kernels._dispatch import Backend, choose
from cmd_plugin.kernels.flat_view import Weights, as_view, tensors_of
from cmd_plugin.kernels.swap import _blocked

__all__ = ["swap_in", "swap_out"]


def swap_in(
    weights: Weights,
    backup: Weights,
    mode: Tensor,
    slope: Tensor,
    mean: Tensor,
    step: Tensor,
    *,
    total: Tensor | None = None,
    energy: Tensor | None = None,
    backend: Backend = "auto",
) -> None:
    """Copy the weights into ``backup`` and write the modelled ones in their place, in one pass.

    It reads 13 bytes a float32 weight and writes 8. The tensors stay the same, so optimizers,
    compiled graphs and CUDA graphs keep what they hold.

    Args:
        weights: The N weights, overwritten.
        backup: Tensors of the same shapes and dtypes, for example ``weights.empty_like()``; filled
            bit for bit, so :func:`swap_out` brings back even what a NaN carries.
        mode: [N] uint8.
        slope: [N], see :func:`cmd_plugin.kernels.reconstruct`.
        mean: [N], likewise.
        step: [M], likewise.
        total: [N], likewise.
        energy: [M], likewise.
        backend: See :func:`cmd_plugin.kernels.update_affine`.

    Raises:
        ShapeError: If shapes, dtypes or devices do not fit; nothing is changed then.
        InputError: If ``backend`` cannot address these tensors.
        MissingDependency: If ``backend`` needs a package that is not installed.
    """
    if torch.compiler.is_compiling():
        tensors, kept = tensors_of(weights), tensors_of(backup)
        _operator_in(tensors, kept, mode, slope, mean, step, total, energy, backend)
        return
    view, kept_view = as_view(weights, mean.dtype), as_view(backup, mean.dtype)
    if view.numel != mean.numel() or view.dtype != mean.dtype:
        raise ShapeError(
            f"mean must be [{view.numel}] {view.dtype}, got {tuple(mean.shape)} {mean.dtype}."
        )
    arrays = {"slope": slope, "mean": mean, "total": total}
    tables = {"step": step, "energy": energy}
    require_state(view.numel, view.dtype, mode, arrays, tables, view.device)
    require_pair(total, energy)
    require_backup(view, kept_view)
    chosen = choose(
        "swap_in",
        backend,
        view.device,
        view.numel,
        numba=view.pieces() is not None,
        triton=view.addressable and kept_view.addressable,
    )
    if chosen == "triton":
        from cmd_plugin.kernels.swap import _triton

        _triton.swap_in(view, kept_view, mode, slope, mean, step, total, energy)
        return
    # Writing the model reads no weight: on a CPU two passes move as many bytes as one would.
    _blocked.copy(view, kept_view)
    if chosen == "numba":
        from cmd_plugin.kernels.reconstruct import _numba

        _numba.reconstruct(view, mode, slope, mean, step, total, energy)
    else:
        _blocked.reconstruct(view, mode, slope, mean, step, total, energy)


def swap_out(weights: Weights, backup: Weights, backend: Backend = "auto") -> None:
    """Put back what :func:`swap_in` kept, bit for bit: 4 bytes read, 4 written a float32 weight.

    Args:
        weights: The N weights, overwritten.
        backup: What :func:`swap_in` filled.
        backend: ``"auto"``, ``"torch"`` (which copies as fast as a compiled loop would) or
            ``"triton"``, one launch over all tensors.

    Raises:
        ShapeError: If shapes, dtypes or devices do not fit; nothing is changed then.
        InputError: If ``backend`` cannot address these tensors.
        MissingDependency: If ``backend`` needs a package that is not installed.
    """
    if torch.compiler.is_compiling():
        _operator_out(tensors_of(weights), tensors_of(backup), backend)
        return
    view, kept_view = as_view(weights), as_view(backup)
    require_backup(view, kept_view)
    addressable = view.addressable and kept_view.addressable
    chosen = choose("swap_out", backend, view.device, view.numel, triton=addressable)
    if chosen == "triton":
        from cmd_plugin.kernels.swap import _triton

        _triton.swap_out(view, kept_view)
    else:
        _blocked.copy(kept_view, view)


def _run_in(
    weights: Sequence[Tensor],
    backup: Sequence[Tensor],
    mode: Tensor,
    slope: Tensor,
    mean: Tensor,
    step: Tensor,
    total: Tensor | None,
    energy: Tensor | None,
    backend: Backend,
) -> None:
    swap_in(
        weights,
        backup,
        mode,
        slope,
        mean,
        step,
        total=total,
        energy=energy,
        backend=backend,
    )


_operator_in = torch.library.custom_op(
    "cmd_plugin::swap_in",
    _run_in,
    mutates_args=("weights", "backup"),
    schema="(Tensor(a!)[] weights, Tensor(b!)[] backup, Tensor assignment, Tensor slope, "
    "Tensor mean, Tensor step, Tensor? total, Tensor? energy, str backend) -> ()",
)
_operator_out = torch.library.custom_op(
    "cmd_plugin::swap_out",
    swap_out,
    mutates_args=("weights",),
    schema="(Tensor(a!)[] weights, Tensor[] backup, str backend) -> ()",
)


@_operator_in.register_fake
def _fake_in(*arguments: object) -> None:
    """Nothing is returned."""


@_operator_out.register_fake
def _fake_out(*arguments: object) -> None:
    """Nothing is returned."""
