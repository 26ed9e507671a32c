"""The specification of :func:`cmd_plugin.kernels.curve_walk`: one walk, one step at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from cmd_plugin.kernels.counter_random import philox

__all__ = ["PURPOSE", "curve_walk"]

PURPOSE = 0x57414C4B  # keeps the walks' numbers apart from everybody else's


def curve_walk(neighbours: Tensor, start: Tensor, length: int, seed: int, index: Tensor) -> Tensor:
    """Return [B, A, length] int64 positions; see the public function for the arguments.

    The counter of a draw has the words (step / 4, low half of the sample's number, walk xor
    PURPOSE, high half of the sample's number); step modulo 4 picks one of its four results.
    """
    batch, walks = start.shape
    choices = neighbours.shape[2]
    result = torch.zeros(batch, walks, length, dtype=torch.int64)
    for sample in range(batch):
        for walk in range(walks):
            here = int(start[sample, walk])
            for step in range(length):
                result[sample, walk, step] = here
                number = int(index[sample])
                counter = (step // 4, number & 0xFFFFFFFF, walk ^ PURPOSE, number >> 32)
                drawn = philox(seed, *(torch.tensor(word) for word in counter))[step % 4]
                here = int(neighbours[sample, here, (int(drawn) * choices) >> 32])
    return result
