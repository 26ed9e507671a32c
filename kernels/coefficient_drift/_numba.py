"""Compiled CPU path of ``coefficient_drift``: one pass, 16 bytes read and 4 written per weight."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from cmd_plugin.kernels._numba import exact
from cmd_plugin.kernels._threads import in_threads, shares

__all__ = ["coefficient_drift"]


@exact
def _drift(scale, offset, old_scale, old_offset, out):
    for i in range(scale.size):
        a, b = scale[i] - old_scale[i], offset[i] - old_offset[i]
        out[i] = np.sqrt(a * a + b * b)


def coefficient_drift(
    scale: Tensor, offset: Tensor, old_scale: Tensor, old_offset: Tensor, out: Tensor
) -> None:
    """See :func:`cmd_plugin.kernels.coefficient_drift`; fills ``out``."""
    arrays = [tensor.numpy() for tensor in (scale, offset, old_scale, old_offset, out)]

    def run(at: slice) -> None:
        _drift(*(array[at] for array in arrays))

    in_threads(run, shares(len(scale)), len(scale))
