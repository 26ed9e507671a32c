"""The specification of :func:`cmd_plugin.kernels.update_and_reconstruct`: one after the other."""

from __future__ import annotations

from torch import Tensor

from cmd_plugin.kernels.reconstruct.reference import reconstruct
from cmd_plugin.kernels.update_affine.reference import update_affine

__all__ = ["update_and_reconstruct"]


def update_and_reconstruct(
    weights: Tensor,
    mode: Tensor,
    slope: Tensor,
    mean: Tensor,
    gain: Tensor,
    step: Tensor,
    blend: float,
    decay: float = 1.0,
    total: Tensor | None = None,
    energy: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ([] sum of squared innovations, [N] modelled weights); changes the state in place."""
    squares = update_affine(weights, mode, slope, mean, gain, blend, decay, total)
    shrunk = total if energy is not None else None
    return squares, reconstruct(mode, slope, mean, step, shrunk, energy)
