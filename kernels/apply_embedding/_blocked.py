"""Cache-blocked PyTorch path of ``apply_embedding``: blocks without embedded weights are skipped.

Masked writes of whole blocks beat lists of positions beyond a few percent of embedded weights:
scattered ones touch most cache lines anyway.
"""

from __future__ import annotations

from torch import Tensor

from cmd_plugin.kernels.flat_view import FlatView
from cmd_plugin.kernels.mode_table import ModeTable

__all__ = ["apply_embedding"]


def apply_embedding(
    weights: FlatView,
    embedded: Tensor,
    mode: Tensor,
    scale: Tensor,
    offset: Tensor,
    profile: Tensor,
) -> None:
    """See :func:`cmd_plugin.kernels.apply_embedding`."""
    table = ModeTable(profile.to(scale.device, scale.dtype), weights.block)
    scratch = weights.scratch()
    on_cpu = scale.device.type == "cpu"  # elsewhere the question would wait for the device
    for number, start, stop in weights.blocks():
        block = slice(start, stop)
        if on_cpu and not bool(embedded[block].any()):
            continue
        values = table.lookup(mode[block], scratch[: stop - start])
        values.mul_(scale[block]).add_(offset[block])
        weights.write(number, values, embedded[block])
