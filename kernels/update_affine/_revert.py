"""Take a snapshot out of the state again when it turns out not to be finite."""

from __future__ import annotations

import torch
from torch import Tensor

from cmd_plugin.kernels.flat_view import FlatView
from cmd_plugin.kernels.mode_table import ModeTable

__all__ = ["CHECKED_FIRST", "revert_update"]

# Up to this many weights they are looked at first: that costs little, and a refused snapshot leaves
# the state bit for bit. Longer vectors are read once.
CHECKED_FIRST = 1 << 16


def revert_update(
    view: FlatView,
    mode: Tensor,
    slope: Tensor,
    mean: Tensor,
    gain: Tensor,
    blend: float,
    decay: float,
    total: Tensor | None,
) -> None:
    r"""Undo :func:`cmd_plugin.kernels.update_affine`, called with the same arguments, in place.

    .. math:: \bar w_i \leftarrow \frac{\bar w_i - w_i/n'}{1 - 1/n'}, \quad
              \sigma_i \leftarrow \frac{\sigma_i - e_i\, g_{m(i)}}{\lambda}

    with :math:`e_i` the innovation against the mean before the update, 0 for the weights that it
    left out. The state is what it was up to rounding. This is the rare path, so it is plain PyTorch
    for all devices.
    """
    table = ModeTable(gain.to(mean.device, mean.dtype), view.block)
    values, gains = view.scratch(), view.scratch()
    for number, start, stop in view.blocks():
        at = slice(start, stop)
        w = view.read(number, values)
        before = (mean[at] - blend * w) / (1.0 - blend)
        innovation = w - before
        left_out = ~innovation.square().isfinite()
        innovation.masked_fill_(left_out, 0.0)
        torch.where(left_out, mean[at], before, out=mean[at])
        factor = table.lookup(mode[at], gains[: stop - start])
        slope[at].sub_(innovation * factor).div_(decay)
        if total is not None:
            part = total[at].sub_((1.0 - blend) * innovation.square())
            part.div_(decay).clamp_(min=0.0)
