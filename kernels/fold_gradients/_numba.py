"""Compiled CPU path of ``fold_gradients``: one pass, sums by share, then over shares."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cmd_plugin.kernels._numba import exact
from cmd_plugin.kernels._threads import in_threads, shares

__all__ = ["fold_gradients"]


@exact
def _fold(gradient, embedded, mode, scale, modes):
    sums = np.zeros(modes, dtype=np.float64)
    for i in range(gradient.size):
        if embedded[i]:
            sums[mode[i]] += np.float64(scale[i]) * np.float64(gradient[i])
            gradient[i] = 0
    return sums


def fold_gradients(
    gradient: Tensor, embedded: Tensor, mode: Tensor, scale: Tensor, modes: int
) -> Tensor:
    """See :func:`cmd_plugin.kernels.fold_gradients`."""
    arrays = [tensor.numpy() for tensor in (gradient, embedded, mode, scale)]

    def run(at: slice) -> np.ndarray:
        sums: np.ndarray = _fold(*(array[at] for array in arrays), modes)
        return sums

    parts = in_threads(run, shares(len(gradient)), len(gradient))
    return torch.from_numpy(np.sum([np.zeros(modes), *parts], axis=0))
