"""CPU path of ``point_importance``: the features are read as rarely as torch allows, in parts.

Parts, so that intermediate results stay in the cache: written to fresh memory for a whole batch,
they cost more than the sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["norms", "wins"]

_SCRATCH = 1 << 18  # numbers of an intermediate result: a megabyte in single precision
_GROUP = 16  # channels whose sum torch takes before it adds up such sums
_BLOCK = 64  # tokens whose maximum is found at once


def norms(
    features: Tensor, mask: Tensor | None, order: float, *, nonnegative: bool = False
) -> Tensor:
    """See :func:`cmd_plugin.kernels.point_importance.reference.norms`.

    Args:
        features: [B, F, M].
        mask: [B, M] bool or None.
        order: 1, 2 or inf.
        nonnegative: No feature is below zero: then these are plain sums and maxima, read once.
    """
    batch, channels, tokens = features.shape
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    result = torch.empty(batch, tokens, dtype=dtype)
    direct = nonnegative and order != 2.0 and features.dtype == dtype
    # torch sums groups of channels first, but column by column: by groups in the order of memory
    # the same numbers are added in the same order, and the reading takes two thirds of the time.
    grouped = (
        order != float("inf")
        and channels % _GROUP == 0
        and tokens % _BLOCK == 0  # torch sums what fills no vector in another order
        and features[0].is_contiguous()
    )
    height = channels
    if grouped and not direct:
        height = min(channels, max(_GROUP, _SCRATCH // tokens // _GROUP * _GROUP))
    scratch = None if direct else torch.empty_like(features[0, :height], dtype=dtype)
    sums = torch.empty(channels // _GROUP, tokens, dtype=dtype) if grouped else None
    for cloud, out in zip(features, result, strict=True):
        for start in range(0, channels, height):
            part = cloud[start : start + height]
            if scratch is not None:
                part = _sizes(part, scratch[: len(part)], order)
            if sums is not None:
                groups = part.view(-1, _GROUP, tokens)
                first = start // _GROUP
                torch.sum(groups, dim=1, out=sums[first : first + len(groups)])
            elif order == float("inf"):
                torch.amax(part, dim=0, out=out)
            else:
                torch.sum(part, dim=0, out=out)
        if sums is not None:
            torch.sum(sums, dim=0, out=out)
    if order == 2.0:
        result.sqrt_()
    return result if mask is None else result.masked_fill_(~mask, 0.0)


def _sizes(part: Tensor, scratch: Tensor, order: float) -> Tensor:
    """Absolute values or squares of ``part``, in ``scratch``."""
    wide = part if part.dtype == scratch.dtype else scratch.copy_(part)
    if order == 2.0:
        return torch.mul(wide, wide, out=scratch)
    return torch.abs(wide, out=scratch)


def wins(features: Tensor, mask: Tensor | None) -> Tensor:
    """See :func:`cmd_plugin.kernels.point_importance.reference.wins`, ``ties="first"``.

    On a CPU, torch returns the first of several equal maxima.
    """
    batch, _, tokens = features.shape
    result = torch.empty(batch, tokens, dtype=torch.int64)
    for number, cloud in enumerate(features):
        real = cloud if mask is None else cloud.masked_fill(~mask[number], -torch.inf)
        result[number] = _winners(real).bincount(minlength=tokens)
    return result


def _winners(cloud: Tensor) -> Tensor:
    """``cloud.argmax(dim=1)`` of [F, M], of equal maxima the first.

    torch finds positions of maxima one number at a time, but maxima themselves with vector
    instructions: so find the block with the maximum first, and the position within it.
    """
    channels, tokens = cloud.shape
    blocks = tokens // _BLOCK
    if blocks < 4 or cloud.stride() != (tokens, 1):
        return cloud.argmax(dim=1)
    top = cloud.new_empty(channels, -(-tokens // _BLOCK))
    whole = blocks * _BLOCK
    torch.amax(cloud[:, :whole].view(channels, blocks, _BLOCK), dim=2, out=top[:, :blocks])
    if whole < tokens:
        torch.amax(cloud[:, whole:], dim=1, out=top[:, blocks])
    # The last block may begin before its first token: what precedes it is no maximum, or the block
    # it belongs to had been found.
    start = (top.argmax(dim=1) * _BLOCK).clamp_max_(tokens - _BLOCK)
    places = start.unsqueeze(1) + torch.arange(_BLOCK)
    return start + cloud.gather(1, places).argmax(dim=1)
