"""Compiled CPU path of ``apply_embedding``: reads a byte a weight, and more where it is set."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cmd_plugin.kernels._numba import exact, numbers
from cmd_plugin.kernels._threads import in_threads

__all__ = ["apply_embedding"]


@exact
def _apply(weights, embedded, mode, scale, offset, profile):
    for i in range(weights.size):
        if embedded[i]:
            weights[i] = scale[i] * profile[mode[i]] + offset[i]


def apply_embedding(
    pieces: Sequence[tuple[Tensor, int, int]],
    embedded: Tensor,
    mode: Tensor,
    scale: Tensor,
    offset: Tensor,
    profile: Tensor,
) -> None:
    """See :func:`cmd_plugin.kernels.apply_embedding`; ``pieces`` are (values, start, stop)."""
    arrays = [tensor.numpy() for tensor in (embedded, mode, scale, offset)]
    values = numbers(profile, scale)

    def run(piece: tuple[Tensor, int, int]) -> None:
        weights, start, stop = piece
        _apply(weights.numpy(), *(array[start:stop] for array in arrays), values)

    in_threads(run, pieces, len(scale))
