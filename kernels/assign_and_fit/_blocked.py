"""Cache-blocked PyTorch path of ``assign_and_fit``: each block of weights is read once."""

from __future__ import annotations

import torch
from torch import Tensor

from cmd_plugin.kernels._precision import ieee_float32
from cmd_plugin.kernels.assign_and_fit.reference import UNIT_ROUNDOFF
from cmd_plugin.kernels.mode_table import ModeTable

__all__ = ["assign_and_fit"]

# Values of one [T, n] block: about 2 MB of float32, a share of the last-level cache.
_BLOCK_VALUES = 1 << 19


def assign_and_fit(
    trajectory: Tensor, profiles: Tensor, base: Tensor | None, out: tuple[Tensor, ...]
) -> None:
    """Fill ``out`` = (mode, scale, mean, total); see :func:`cmd_plugin.kernels.assign_and_fit`.

    Rows are made relative to their first snapshot, which takes away a mean far larger than the
    movement without rounding it, and then centred, because the first snapshot of a training lies
    far from the others.
    """
    stored, numel = trajectory.shape
    snapshots = stored + (base is not None)
    modes, dtype, device = profiles.shape[0], out[1].dtype, trajectory.device
    roundoff = UNIT_ROUNDOFF[trajectory.dtype if base is None else base.dtype]
    reference = profiles.to(device, torch.float64)
    reference = reference - reference.mean(dim=1, keepdim=True)
    norm = reference.norm(dim=1, keepdim=True)
    unit = (reference / norm).to(dtype)
    part = -(-snapshots // 3)  # products are summed in three parts: shorter sums round less

    width = min(numel, max(256, _BLOCK_VALUES // snapshots // 2 * 2))
    inverse_norm = ModeTable((1.0 / norm[:, 0]).to(dtype), width)
    column = torch.arange(width, dtype=torch.int32, device=device)
    rows = torch.empty(snapshots * width, dtype=dtype, device=device)
    products = torch.empty(modes * width, dtype=dtype, device=device)
    magnitude = torch.empty(modes * width, dtype=dtype, device=device)
    hit = torch.empty(modes * width, dtype=torch.uint8, device=device)
    rank = torch.arange(255, 255 - modes, -1, device=device).to(torch.uint8)[:, None]
    with ieee_float32():
        for start in range(0, numel, width):
            block = slice(start, min(numel, start + width))
            n = block.stop - start
            mode, scale, mean, total = (array[block] for array in out)
            x = rows[: snapshots * n].view(snapshots, n)
            pivot = _pivot(trajectory[:, block], None if base is None else base[block], x)
            shift = torch.mean(x, dim=0, out=total)
            x.sub_(shift)
            torch.add(pivot, shift, out=mean)
            product = products[: modes * n].view(modes, n)
            torch.mm(unit[:, :part], x[:part], out=product)
            for low in range(part, snapshots, part):
                product.addmm_(unit[:, low : low + part], x[low : low + part])
            torch.sum(x.square_(), dim=0, out=total)

            # argmax |product|, ties to the lowest mode: of the modes that reach the maximum, the
            # one of highest rank.
            size = torch.abs(product, out=magnitude[: modes * n].view(modes, n))
            reached = hit[: modes * n].view(modes, n)
            torch.eq(size, size.amax(dim=0), out=reached.view(torch.bool))
            torch.amax(reached.mul_(rank), dim=0, out=mode)
            # 255 - rank in bytes; a row that reaches nothing (NaN) stays in range.
            mode.neg_().sub_(1).clamp_(max=modes - 1)
            chosen = torch.add(column[:n], mode, alpha=n)
            torch.index_select(product.view(-1), 0, chosen, out=scale)
            scale.mul_(inverse_norm.lookup(mode, magnitude[:n]))
            constant = total <= mean.square().mul_(snapshots * (4 * roundoff) ** 2)
            mode.masked_fill_(constant, 0)
            scale.masked_fill_(constant, 0.0)


def _pivot(trajectory: Tensor, base: Tensor | None, x: Tensor) -> Tensor:
    """Fill ``x`` [T, n] with a block's rows relative to their first snapshot; return that."""
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
