"""PyTorch path of ``curve_walk``: all draws at once, then two small operations per step.

The table is rewritten so that an entry is already the row of the next look-up: a step of all walks
of all clouds is one addition and one gather of B x A numbers, and waits for no other device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cmd_plugin.kernels.counter_random import philox
from cmd_plugin.kernels.curve_walk.reference import PURPOSE

__all__ = ["curve_walk"]


def curve_walk(neighbours: Tensor, start: Tensor, length: int, seed: int, index: Tensor) -> Tensor:
    """Return [B, A, length] int64 positions; see the public function for the arguments."""
    batch, size, choices = neighbours.shape
    walks, device = start.shape[1], start.device
    step = torch.arange(-(-length // 4), device=device)[:, None, None]
    walk = torch.arange(walks, device=device)[None, None, :] ^ PURPOSE
    number = index[None, :, None]
    words = philox(seed, step, number & 0xFFFFFFFF, walk, number >> 32)
    # [steps, B * A], in the order of the steps
    choice = (torch.stack(words, dim=1).flatten(0, 1).flatten(1) * choices) >> 32
    first = torch.arange(batch, device=device) * size
    table = ((neighbours + first[:, None, None]) * choices).flatten()
    here = ((start + first[:, None]) * choices).flatten()
    path = torch.empty(length, batch * walks, dtype=torch.int64, device=device)
    for number_of_step in range(length):
        path[number_of_step] = here
        here = table.take(here + choice[number_of_step])
    return (path // choices).view(length, batch, walks).permute(1, 2, 0) - first[:, None, None]
