"""Cache-blocked PyTorch path of ``assign_and_fit``: every block of weights is read once, nothing of size T N is made."""

from __future__ import annotations

import torch
from torch import Tensor

from cmd_plugin.kernels.assign_and_fit.reference import UNIT_ROUNDOFF

__all__ = ["assign_and_fit"]

# Values of one [T, n] block: about 2 MB of float32, a share of the last-level cache.
_BLOCK_VALUES = 1 << 19


def assign_and_fit(
    trajectory: Tensor, profiles: Tensor, base: Tensor | None, out: tuple[Tensor, ...]
) -> None:
    """Fill ``out`` = (mode, scale, mean, total); see :func:`cmd_plugin.kernels.assign_and_fit`."""
    stored, numel = trajectory.shape
    snapshots = stored + (base is not None)
    modes, dtype, device = profiles.shape[0], out[1].dtype, trajectory.device
    roundoff = UNIT_ROUNDOFF[trajectory.dtype if base is None else base.dtype]
    reference = profiles.to(device, torch.float64)
    reference = reference - reference.mean(dim=1, keepdim=True)
    norm = reference.norm(dim=1, keepdim=True)
    inverse_norm = (1.0 / norm[:, 0]).to(dtype)
    # One product gives the M normalised correlations and, in the last row, the mean of the pivoted
    # weight.
    unit = torch.cat([reference / norm, torch.full_like(reference[:1], 1.0 / snapshots)])
    unit = unit.to(dtype)

    width = min(numel, max(256, _BLOCK_VALUES // snapshots))
    rows = torch.empty(snapshots * width, dtype=dtype, device=device)
    products = torch.empty((modes + 1) * width, dtype=dtype, device=device)
    magnitude = torch.empty(modes * width, dtype=dtype, device=device)
    hit = torch.empty(modes * width, dtype=torch.uint8, device=device)
    rank = torch.arange(255, 255 - modes, -1, device=device).to(torch.uint8)[:, None]
    for start in range(0, numel, width):
        block = slice(start, min(numel, start + width))
        n = block.stop - start
        mode, scale, mean, total = (array[block] for array in out)
        x = rows[: snapshots * n].view(snapshots, n)
        pivot = _pivot(trajectory[:, block], None if base is None else base[block], x)
        product = torch.mm(unit, x, out=products[: (modes + 1) * n].view(modes + 1, n))
        torch.sum(x.square_(), dim=0, out=total)
        torch.add(pivot, product[modes], out=mean)
        total.addcmul_(product[modes], product[modes], value=-float(snapshots)).clamp_(min=0.0)

        # argmax |product|, ties to the lowest mode: of the modes that reach the maximum, the one of
        # highest rank.
        size = torch.abs(product[:modes], out=magnitude[: modes * n].view(modes, n))
        reached = hit[: modes * n].view(modes, n)
        torch.eq(size, size.amax(dim=0), out=reached.view(torch.bool))
        torch.amax(reached.mul_(rank), dim=0, out=mode)
        # 255 - rank in bytes; a row that reaches nothing (NaN) stays in range.
        mode.neg_().sub_(1).clamp_(max=modes - 1)
        index = mode.long()
        torch.gather(product, 0, index[None], out=scale[None])
        scale.mul_(inverse_norm[index])
        constant = total <= mean.square().mul_(snapshots * (4 * roundoff) ** 2)
        mode.masked_fill_(constant, 0)
        scale.masked_fill_(constant, 0.0)


def _pivot(trajectory: Tensor, base: Tensor | None, x: Tensor) -> Tensor:
    """Fill ``x`` [T, n] with the rows of a block relative to their first snapshot, which is returned.

    The first value of every pivoted row is 0, so T mean^2 <= T sum (x - mean)^2: single-pass
    moments of pivoted rows lose at most a
    factor T to cancellation, however large the weight is against its movement.
    """
    if base is not None:
        x[0].zero_()
        x[1:].copy_(trajectory)
        return base
    if trajectory.dtype == x.dtype:
        torch.sub(trajectory, trajectory[0], out=x)
        return trajectory[0]
    x.copy_(trajectory)
    pivot = x[0].clone()
    x.sub_(pivot)
    return pivot
