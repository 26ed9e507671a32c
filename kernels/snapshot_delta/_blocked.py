"""Cache-blocked PyTorch path of ``snapshot_delta``: 8 bytes read and 2 written per weight."""

from __future__ import annotations

import torch
from torch import Tensor

from cmd_plugin.kernels.flat_view import FlatView

__all__ = ["snapshot_delta"]


def snapshot_delta(weights: FlatView, base: Tensor | None, out: Tensor) -> None:
    """See :func:`cmd_plugin.kernels.snapshot_delta`."""
    scratch = weights.scratch()
    difference = scratch if base is None else weights.scratch()
    for number, start, stop in weights.blocks():
        values = weights.read(number, scratch)
        if base is not None:
            first = base[start:stop].to(values.device, non_blocking=True)
            values = torch.sub(values, first, out=difference[: stop - start])
        out[start:stop].copy_(values)
