"""The specification of :func:`cmd_plugin.kernels.assign_and_fit`: plain PyTorch, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["UNIT_ROUNDOFF", "assign_and_fit"]

# Unit roundoff u of the dtype the weights came in: a row that varies by a few u is constant.
UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-9,
}


def assign_and_fit(
    trajectory: Tensor,
    profiles: Tensor,
    base: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`cmd_plugin.kernels.assign_and_fit`; ``dtype`` is what it computes in."""
    if base is not None:
        zero = torch.zeros_like(trajectory[:1], dtype=dtype)
        rows = torch.cat([zero, trajectory.to(dtype)]) + base.to(dtype)
        roundoff = UNIT_ROUNDOFF[base.dtype]
    else:
        rows = trajectory.to(dtype)
        roundoff = UNIT_ROUNDOFF[trajectory.dtype]
    snapshots = rows.shape[0]
    mean = rows.mean(dim=0)
    centred = rows - mean
    total = centred.square().sum(dim=0)
    constant = total <= snapshots * (4 * roundoff * mean).square()

    reference = profiles.to(dtype)
    reference = reference - reference.mean(dim=1, keepdim=True)
    norm = reference.norm(dim=1, keepdim=True)
    products = (reference / norm) @ centred  # rho * |centred row|
    mode = products.abs().argmax(dim=0)
    mode[constant] = 0
    scale = products.gather(0, mode[None])[0] / norm[mode, 0]
    scale[constant] = 0.0
    return mode.to(torch.uint8), scale, mean, total
