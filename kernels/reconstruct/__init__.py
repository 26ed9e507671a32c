"""Evaluate the model: every weight from its mode's current profile value."""

from __future__ import annotations

import torch
from torch import Tensor

from cmd_plugin.errors import ShapeError
from cmd_plugin.kernels._checks import require_state
from cmd_plugin.kernels.flat_view import BLOCK, FlatView
from cmd_plugin.kernels.reconstruct._blocked import BlockReconstructor

__all__ = ["reconstruct", "reconstruct_into"]


def _reconstructor(
    mode: Tensor,
    slope: Tensor,
    mean: Tensor,
    step: Tensor,
    block: int,
    total: Tensor | None,
    energy: Tensor | None,
) -> BlockReconstructor:
    arrays = {"slope": slope, "mean": mean, "total": total}
    require_state(mean.numel(), mean.dtype, mode, arrays, {"step": step, "energy": energy})
    if (total is None) != (energy is None):
        raise ShapeError("total and energy are given together or not at all.")
    return BlockReconstructor(mode, slope, mean, step, block, total, energy)


def reconstruct(
    mode: Tensor,
    slope: Tensor,
    mean: Tensor,
    step: Tensor,
    *,
    total: Tensor | None = None,
    energy: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    r"""Return the modelled weights of one snapshot.

    .. math:: \hat w_i = \bar w_i + \rho_i^2\, \sigma_i h_{m(i)}

    Without shrinking :math:`\rho^2 = 1`.

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

    Raises:
        ShapeError: If shapes or dtypes do not fit.
    """
    if out is None:
        out = torch.empty_like(mean)
    if out.shape != mean.shape or out.dtype != mean.dtype:
        raise ShapeError(
            f"out must be {tuple(mean.shape)} {mean.dtype}, got {tuple(out.shape)} {out.dtype}."
        )
    block = _reconstructor(mode, slope, mean, step, BLOCK, total, energy)
    for start in range(0, mean.numel(), BLOCK):
        stop = min(mean.numel(), start + BLOCK)
        block.fill(start, stop, out[start:stop])
    return out


def reconstruct_into(
    weights: FlatView,
    mode: Tensor,
    slope: Tensor,
    mean: Tensor,
    step: Tensor,
    *,
    total: Tensor | None = None,
    energy: Tensor | None = None,
) -> None:
    """Write the modelled weights into ``weights``, in place, without a vector of size N.

    Arguments as for :func:`reconstruct`.

    Raises:
        ShapeError: If shapes or dtypes do not fit.
    """
    if weights.numel != mean.numel() or weights.dtype != mean.dtype:
        raise ShapeError(
            f"mean must be [{weights.numel}] {weights.dtype}, got {tuple(mean.shape)} {mean.dtype}."
        )
    block = _reconstructor(mode, slope, mean, step, weights.block, total, energy)
    values = weights.scratch()
    for number, start, stop in weights.blocks():
        weights.write(number, block.fill(start, stop, values[: stop - start]))
