"""Compiled CPU path of ``reconstruct``: one pass, 9 bytes read and 4 written per weight."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from cmd_plugin.kernels._numba import CHUNK, array, exact, model_chunk, numbers
from cmd_plugin.kernels._threads import in_threads

__all__ = ["reconstruct"]


@exact
def _fill(mode, slope, mean, total, step, energy, out):
    moved = np.empty(CHUNK, dtype=mean.dtype)
    for start in range(0, mode.size, CHUNK):
        stop = min(start + CHUNK, mode.size)
        model_chunk(
            mode[start:stop],
            slope[start:stop],
            mean[start:stop],
            total[start:stop],
            step,
            energy,
            moved,
            out[start:stop],
        )


def reconstruct(
    pieces: Sequence[tuple[Tensor, int, int]],
    mode: Tensor,
    slope: Tensor,
    mean: Tensor,
    step: Tensor,
    total: Tensor | None,
    energy: Tensor | None,
) -> None:
    """See :func:`cmd_plugin.kernels.reconstruct`; ``pieces`` are (values, start, stop)."""
    modes, slopes, means = mode.numpy(), slope.numpy(), mean.numpy()
    totals, steps, energies = array(total, mean), numbers(step, mean), numbers(energy, mean)

    def run(piece: tuple[Tensor, int, int]) -> None:
        values, start, stop = piece
        at = slice(start, stop)
        _fill(modes[at], slopes[at], means[at], totals[at], steps, energies, values.numpy())

    in_threads(run, pieces, mean.numel())
