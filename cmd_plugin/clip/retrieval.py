"""How often the right embedding is among the nearest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cmd_plugin.clip._checks import embeddings, same_width, unit
from cmd_plugin.clip._rows import Rows
from cmd_plugin.errors import InputError, ShapeError

__all__ = ["ranks_of", "recall_at"]

_BLOCK = 1024


def ranks_of(
    queries: Rows, gallery: Rows, targets: Tensor | None = None, leave_out: Tensor | None = None
) -> Tensor:
    """Rank of each query's target among the gallery by cosine: 1 is the nearest.

    Args:
        queries: Shape [Q, d].
        gallery: Shape [G, d].
        targets: Row of the gallery that is right for each query, shape [Q], int64; query i wants
            row i if not given.
        leave_out: Row of the gallery that does not count for each query, such as the query itself,
            shape [Q], int64.

    Returns:
        Shape [Q], int64, from 1. Rows as near as the target count as nearer, so duplicates never
        flatter.

    Raises:
        ShapeError: If shapes do not fit.
        InputError: If a target is no row of the gallery or is left out, or a row is zero.
        NonFiniteError: If a row holds NaN or infinite values.
    """
    asked, offered = embeddings(queries, "queries"), embeddings(gallery, "gallery")
    same_width(asked, offered, ("queries", "gallery"))
    asked, offered = unit(asked, "queries"), unit(offered, "gallery")
    right = torch.arange(len(asked)) if targets is None else targets
    right = _index("targets", right, len(asked), len(offered)).to(asked.device)
    skipped = None
    if leave_out is not None:
        skipped = _index("leave_out", leave_out, len(asked), len(offered)).to(asked.device)
        if bool((skipped == right).any()):
            raise InputError("leave_out names the target of a query: it could never be found.")
    ranks = []
    for start in range(0, len(asked), _BLOCK):
        rows = slice(start, start + _BLOCK)
        cosines = asked[rows] @ offered.T
        target = cosines.gather(1, right[rows, None])
        nearer = cosines >= target
        if skipped is not None:
            nearer.scatter_(1, skipped[rows, None], False)
        ranks.append(nearer.sum(dim=1))
    return torch.cat(ranks)


def recall_at(
    queries: Rows,
    gallery: Rows,
    k: Sequence[int] = (1, 5, 10),
    targets: Tensor | None = None,
    leave_out: Tensor | None = None,
) -> dict[int, float]:
    """Share of queries whose target is among the k nearest, for each k; see :func:`ranks_of`.

    Raises:
        ShapeError: If shapes do not fit.
        InputError: If a k is below 1, or what :func:`ranks_of` refuses.
        NonFiniteError: If a row holds NaN or infinite values.
    """
    if not len(k) or min(k) < 1:
        raise InputError(f"k must be whole numbers from 1, it is {list(k)}.")
    ranks = ranks_of(queries, gallery, targets, leave_out)
    return {number: float((ranks <= number).double().mean()) for number in k}


def _index(name: str, index: Tensor, count: int, size: int) -> Tensor:
    if index.shape != (count,) or index.is_floating_point():
        raise ShapeError(f"{name} must be whole numbers [{count}], got {tuple(index.shape)}.")
    if int(index.min()) < 0 or int(index.max()) >= size:
        raise InputError(f"{name} must be rows of the gallery, 0 to {size - 1}.")
    return index.long()
