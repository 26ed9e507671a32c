"""Cache-blocked PyTorch path of ``update_affine``: 13 bytes read and 8 written per weight."""

from __future__ import annotations

import torch
from torch import Tensor

from cmd_plugin.kernels.flat_view import FlatView
from cmd_plugin.kernels.mode_table import ModeTable

__all__ = ["BlockUpdater", "update_affine"]


class BlockUpdater:
    """The recursive update, one block at a time; see :func:`cmd_plugin.kernels.update_affine`."""

    def __init__(
        self,
        weights: FlatView,
        mode: Tensor,
        slope: Tensor,
        mean: Tensor,
        gain: Tensor,
        blend: float,
        decay: float,
        total: Tensor | None,
    ) -> None:
        self._weights, self._mode, self._slope, self._mean = weights, mode, slope, mean
        self._blend, self._decay, self._total = blend, decay, total
        self._table = ModeTable(gain.to(mean.device, mean.dtype), weights.block)
        self._values, self._innovation, self._gains = (weights.scratch() for _ in range(3))

    def block(self, number: int, start: int, stop: int) -> Tensor:
        """Update the weights of one block; return [] the sum of their squared innovations."""
        at = slice(start, stop)
        slope, mean = self._slope[at], self._mean[at]
        difference = self._innovation[: stop - start]
        torch.sub(self._weights.read(number, self._values), mean, out=difference)
        squares = torch.dot(difference, difference)
        mean.add_(difference, alpha=self._blend)
        if self._decay != 1.0:
            slope.mul_(self._decay)
        slope.addcmul_(difference, self._table.lookup(self._mode[at], self._gains[: stop - start]))
        if self._total is not None:
            total = self._total[at]
            total.mul_(self._decay).addcmul_(difference, difference, value=1.0 - self._blend)
        return squares


def update_affine(
    weights: FlatView,
    mode: Tensor,
    slope: Tensor,
    mean: Tensor,
    gain: Tensor,
    blend: float,
    decay: float,
    total: Tensor | None,
) -> Tensor:
    """See :func:`cmd_plugin.kernels.update_affine`."""
    weights = weights.packed()
    update = BlockUpdater(weights, mode, slope, mean, gain, blend, decay, total)
    squares = torch.zeros((), dtype=torch.float64, device=mean.device)
    for number, start, stop in weights.blocks():
        squares += update.block(number, start, stop)
    return squares
