"""Cache-blocked PyTorch path of ``reconstruct``: 9 bytes read per weight, 4 written."""

from __future__ import annotations

import torch
from torch import Tensor

from cmd_plugin.kernels.flat_view import FlatView
from cmd_plugin.kernels.mode_table import ModeTable

__all__ = ["BlockReconstructor", "reconstruct"]


class BlockReconstructor:
    """The modelled weights, one block at a time; see :func:`cmd_plugin.kernels.reconstruct`."""

    def __init__(
        self,
        mode: Tensor,
        slope: Tensor,
        mean: Tensor,
        step: Tensor,
        block: int,
        total: Tensor | None,
        energy: Tensor | None,
    ) -> None:
        self._mode, self._slope, self._mean, self._total = mode, slope, mean, total
        self._step = ModeTable(step.to(mean.device, mean.dtype), block)
        self._scratch = torch.empty(min(block, mean.numel()), dtype=mean.dtype, device=mean.device)
        self._energy = None
        if total is not None and energy is not None:
            self._energy = ModeTable(energy.to(mean.device, mean.dtype), block)

    def fill(self, start: int, stop: int, out: Tensor) -> Tensor:
        """Fill ``out`` [stop - start] with the modelled weights start..stop, and return it."""
        block = slice(start, stop)
        slope = self._slope[block]
        self._step.lookup(self._mode[block], out)
        if self._energy is not None and self._total is not None:
            share = self._energy.lookup(self._mode[block], self._scratch[: stop - start])
            share.mul_(slope).mul_(slope).div_(self._total[block])
            out.mul_(share.nan_to_num_(0.0).clamp_(0.0, 1.0))
        return out.mul_(slope).add_(self._mean[block])


def reconstruct(
    weights: FlatView,
    mode: Tensor,
    slope: Tensor,
    mean: Tensor,
    step: Tensor,
    total: Tensor | None,
    energy: Tensor | None,
) -> None:
    """See :func:`cmd_plugin.kernels.reconstruct_into`."""
    block = BlockReconstructor(mode, slope, mean, step, weights.block, total, energy)
    values = weights.scratch()
    for number, start, stop in weights.blocks():
        weights.write(number, block.fill(start, stop, values[: stop - start]))
