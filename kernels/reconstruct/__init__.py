"""Evaluate the model: every weight from its mode's current profile value."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cmd_plugin.errors import ShapeError
from cmd_plugin.kernels._checks import require_pair, require_state
from cmd_plugin.kernels._dispatch import Backend, choose
from cmd_plugin.kernels.flat_view import Weights, as_view, tensors_of
from cmd_plugin.kernels.reconstruct import _blocked

__all__ = ["reconstruct", "reconstruct_into"]


def reconstruct(
    mode: Tensor,
    slope: Tensor,
    mean: Tensor,
    step: Tensor,
    *,
    total: Tensor | None = None,
    energy: Tensor | None = None,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""Return the modelled weights of one snapshot.

    .. math:: \hat w_i = \bar w_i + \rho_i^2\, \sigma_i h_{m(i)}

    Without shrinking :math:`\rho^2 = 1`. It reads 9 bytes a float32 weight and writes 4. Products
    are rounded before they are added, so all backends give the same bits.

    Args:
        mode: [N] uint8.
        slope: [N] :math:`\sigma`.
        mean: [N] :math:`\bar w`.
        step: [M] :math:`h_m`: the profile's value relative to its mean, in the unit of ``slope``.
        total: [N] sum of squared deviations of each weight; with ``energy`` it shrinks each
            weight's movement by the squared correlation with its profile,
            :math:`\rho_i^2 = \sigma_i^2 q_{m(i)} / V_i`, clamped to [0, 1].
        energy: [M] :math:`q_m`: the profile's sum of squares, in the unit of ``slope``.
        out: [N] of the dtype of ``mean``, filled and returned when given.
        backend: See :func:`cmd_plugin.kernels.update_affine`.

    Raises:
        ShapeError: If shapes, dtypes or devices do not fit.
        InputError: If ``backend`` cannot address these tensors.
        MissingDependency: If ``backend`` needs a package that is not installed.
    """
    if out is None:
        out = torch.empty_like(mean)
    if out.shape != mean.shape or out.dtype != mean.dtype:
        raise ShapeError(
            f"out must be {tuple(mean.shape)} {mean.dtype}, got {tuple(out.shape)} {out.dtype}."
        )
    reconstruct_into([out], mode, slope, mean, step, total=total, energy=energy, backend=backend)
    return out


def reconstruct_into(
    weights: Weights,
    mode: Tensor,
    slope: Tensor,
    mean: Tensor,
    step: Tensor,
    *,
    total: Tensor | None = None,
    energy: Tensor | None = None,
    backend: Backend = "auto",
) -> None:
    """Write the modelled weights into ``weights``, in place, without a vector of size N.

    Arguments and errors as for :func:`reconstruct`.
    """
    if torch.compiler.is_compiling():
        _operator(tensors_of(weights), mode, slope, mean, step, total, energy, backend)
        return
    view = as_view(weights, mean.dtype)
    if view.numel != mean.numel() or view.dtype != mean.dtype:
        raise ShapeError(
            f"mean must be [{view.numel}] {view.dtype}, got {tuple(mean.shape)} {mean.dtype}."
        )
    arrays = {"slope": slope, "mean": mean, "total": total}
    tables = {"step": step, "energy": energy}
    require_state(view.numel, view.dtype, mode, arrays, tables, view.device)
    require_pair(total, energy)
    chosen = choose(
        "reconstruct",
        backend,
        view.device,
        view.numel,
        numba=view.pieces() is not None,
        triton=view.addressable,
    )
    if chosen == "triton":
        from cmd_plugin.kernels.reconstruct import _triton

        alone = view.tensors[0] if len(view.tensors) == 1 else None
        if alone is not None and alone.is_contiguous() and alone.dtype == mean.dtype:
            arguments = (mode, slope, mean, step, total, energy)
            _triton.reconstruct_vector(alone.view(-1), *arguments)
        else:
            _triton.reconstruct(view, mode, slope, mean, step, total, energy)
    elif chosen == "numba":
        from cmd_plugin.kernels.reconstruct import _numba

        _numba.reconstruct(view, mode, slope, mean, step, total, energy)
    else:
        _blocked.reconstruct(view, mode, slope, mean, step, total, energy)


def _run(
    weights: Sequence[Tensor],
    mode: Tensor,
    slope: Tensor,
    mean: Tensor,
    step: Tensor,
    total: Tensor | None,
    energy: Tensor | None,
    backend: Backend,
) -> None:
    reconstruct_into(weights, mode, slope, mean, step, total=total, energy=energy, backend=backend)


_operator = torch.library.custom_op(
    "cmd_plugin::reconstruct",
    _run,
    mutates_args=("weights",),
    schema="(Tensor(a!)[] weights, Tensor assignment, Tensor slope, Tensor mean, Tensor step, "
    "Tensor? total, Tensor? energy, str backend) -> ()",
)


@_operator.register_fake
def _fake(*arguments: object) -> None:
    """Nothing is returned."""
