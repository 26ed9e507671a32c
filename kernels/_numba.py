"""What the compiled CPU paths share: loops over a chunk of weights that stays in the first cache.

Needs numba (extra ``fast``). Look-ups by mode and arithmetic are separate loops, because only the
second vectorise. Functions get empty arrays for what is not asked for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from torch import Tensor

__all__ = ["CHUNK", "array", "compiled", "exact", "model_chunk", "nothing", "numbers"]

CHUNK = 2048

# Sums may be reordered (reassoc) so that they vectorise; nothing else is relaxed: NaN and Inf
# count.
compiled: Any = njit(
    nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"}
)
# Products are rounded before they are added, as PyTorch does: both paths give the same bits.
exact: Any = njit(nogil=True, cache=True, error_model="numpy")


def nothing(like: Tensor) -> np.ndarray:
    """Return an empty array of the dtype of a tensor, for an argument that is not asked for."""
    return like[:0].numpy()


def array(tensor: Tensor | None, like: Tensor) -> np.ndarray:
    """Return a CPU tensor as an array without a copy, an empty one for None."""
    return nothing(like) if tensor is None else tensor.numpy()


def numbers(table: Tensor | None, like: Tensor) -> np.ndarray:
    """Return a small table as an array of the dtype of ``like``, an empty one for None."""
    return nothing(like) if table is None else table.to("cpu", like.dtype).numpy()


@exact
def model_chunk(mode, slope, mean, total, step, energy, moved, out):
    """Fill ``out`` [n] with modelled weights; ``moved`` is scratch of at least n."""
    zero, one = mean.dtype.type(0.0), mean.dtype.type(1.0)
    for i in range(mode.size):
        moved[i] = step[mode[i]]
    if energy.size:
        for i in range(mode.size):
            share = energy[mode[i]] * slope[i] * slope[i] / total[i]
            if share > one:
                share = one
            if not share > zero:  # NaN too: 0 / 0 of a weight that never moved
                share = zero
            moved[i] *= share
    for i in range(mode.size):
        out[i] = mean[i] + moved[i] * slope[i]
