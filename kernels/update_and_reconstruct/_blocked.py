"""PyTorch path of ``update_and_reconstruct``: the second half finds a block in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from cmd_plugin.kernels.flat_view import FlatView
from cmd_plugin.kernels.reconstruct._blocked import BlockReconstructor
from cmd_plugin.kernels.update_affine._blocked import BlockUpdater

__all__ = ["update_and_reconstruct"]


def update_and_reconstruct(
    weights: FlatView,
    mode: Tensor,
    slope: Tensor,
    mean: Tensor,
    gain: Tensor,
    step: Tensor,
    blend: float,
    decay: float,
    total: Tensor | None,
    energy: Tensor | None,
    out: Tensor,
) -> Tensor:
    """See :func:`cmd_plugin.kernels.update_and_reconstruct`."""
    update = BlockUpdater(weights, mode, slope, mean, gain, blend, decay, total)
    shrunk = total if energy is not None else None
    model = BlockReconstructor(mode, slope, mean, step, weights.block, shrunk, energy)
    squares = torch.zeros((), dtype=torch.float64, device=mean.device)
    for number, start, stop in weights.blocks():
        squares += update.block(number, start, stop)
        model.fill(start, stop, out[start:stop])
    return squares
