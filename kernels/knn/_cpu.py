"""Neighbours of one cloud: scipy's k-d tree, or blocks of rows in PyTorch.

Both find a few candidates more than asked for, measure them again in float64, and sort by
(distance, position). Where the last one kept is as far as the first one left out, the candidates do
not tell which of the equally far ones come first: those rows are sorted whole.

With many axes measuring again costs more than the search. There the float64 product of float32
points is taken at its word wherever its rounding can change neither the order nor the result.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["by_rows", "by_tree"]

_ENTRIES = 1 << 22  # distances held at once: 32 MiB
_EXACT_AXES = 8  # up to here differences, above a matrix product of centred coordinates
_ROUNDING = 8 * 2.0**-52  # of a product, for each axis and in units of the squared norms, with room
_NEAR = 1e-5  # of the squared norms; below, products of float64 are no exact float32


def by_tree(points: Tensor, queries: Tensor, k: int, exclude_self: bool) -> tuple[Tensor, Tensor]:
    """Return ([M, k] positions, [M, k] float64 squared distances) by a k-d tree.

    Args:
        points: [N, C].
        queries: [M, C].
        k: Number of neighbours.
        exclude_self: Whether row m leaves out point m.
    """
    from scipy.spatial import cKDTree

    wide, asked = points.detach().double(), queries.detach().double()
    count = min(len(points), k + 1 + exclude_self)
    tree = cKDTree(wide.numpy(), compact_nodes=False, balanced_tree=False)
    found = tree.query(asked.numpy(), k=range(1, count + 1), workers=torch.get_num_threads())[1]
    return _settle(wide, asked, torch.from_numpy(found).long(), k, exclude_self)


def by_rows(points: Tensor, queries: Tensor, k: int, exclude_self: bool) -> tuple[Tensor, Tensor]:
    """Return the same as :func:`by_tree`, by distances to all points, a block of rows at a time."""
    wide, asked = points.detach().double(), queries.detach().double()
    centre = wide.mean(dim=0)
    if points.shape[1] > _EXACT_AXES and points.dtype != torch.float64:
        taken = _by_products(wide - centre, asked - centre, k, exclude_self)
        if taken is not None:
            return taken
    count = min(len(points), k + 1 + exclude_self)
    found = [
        _distances(wide - centre, asked[block] - centre).topk(count, largest=False).indices
        for block in _blocks(len(asked), len(wide))
    ]
    return _settle(wide, asked, torch.cat(found), k, exclude_self)


def _by_products(
    points: Tensor, queries: Tensor, k: int, exclude_self: bool
) -> tuple[Tensor, Tensor] | None:
    """Return the same from one product of centred float64; None if many of the distances tie."""
    count = min(len(points), k + 1)
    parts = []
    for block in _blocks(len(queries), len(points)):
        distance = _distances(points, queries[block])
        if exclude_self:
            distance.diagonal(block.start).fill_(torch.inf)
        parts.append(distance.topk(count, largest=False))
    squared = torch.cat([part.values for part in parts])
    index = torch.cat([part.indices for part in parts])
    reach = queries.square().sum(dim=1) + points.square().sum(dim=1).amax()
    slack = (_ROUNDING * points.shape[1] * reach)[:, None]
    doubtful = (squared.diff(dim=1) <= 2.0 * slack).any(dim=1).nonzero()[:, 0]
    if len(doubtful) > len(queries) // 8:
        return None
    index, squared = index[:, :k].contiguous(), squared[:, :k].contiguous()
    row, place = (squared <= _NEAR * reach[:, None]).nonzero(as_tuple=True)
    squared[row, place] = (queries[row] - points[index[row, place]]).square().sum(dim=1)
    _sort_whole(points, queries, doubtful, exclude_self, index, squared)
    return index, squared


def _distances(points: Tensor, queries: Tensor) -> Tensor:
    """Return [M, N] squared distances; for many axes up to the rounding of a matrix product."""
    if points.shape[1] > _EXACT_AXES:
        norms = queries.square().sum(dim=1)[:, None] + points.square().sum(dim=1)
        return norms.addmm_(queries, points.T, alpha=-2.0)
    return _exact(points, queries)


def _settle(
    points: Tensor, queries: Tensor, found: Tensor, k: int, exclude_self: bool
) -> tuple[Tensor, Tensor]:
    """Measure, sort and cut the candidates [M, count]; sort the rows where they fall short."""
    found = found.sort(dim=1).values
    squared = torch.zeros(found.shape, dtype=points.dtype, device=points.device)
    for query, point in zip(queries.T, points.T, strict=True):
        offset = query[:, None] - point[found]
        squared.addcmul_(offset, offset)
    if exclude_self:
        row = torch.arange(len(found), device=found.device)[:, None]
        squared.masked_fill_(found == row, torch.inf)
    squared, order = squared.sort(dim=1, stable=True)
    index = found.gather(1, order)
    if found.shape[1] == len(points):
        return index[:, :k], squared[:, :k]
    # The last finite candidate is one too many, unless the row's own point was not among them.
    last = squared[:, -1].where(squared[:, -1].isfinite(), squared[:, -2])
    doubtful = (squared[:, k - 1] >= last).nonzero()[:, 0]
    index, squared = index[:, :k].contiguous(), squared[:, :k].contiguous()
    _sort_whole(points, queries, doubtful, exclude_self, index, squared)
    return index, squared


def _sort_whole(
    points: Tensor,
    queries: Tensor,
    doubtful: Tensor,
    exclude_self: bool,
    index: Tensor,
    squared: Tensor,
) -> None:
    """Write the rows ``doubtful`` of [M, k] ``index`` and ``squared`` from all their distances."""
    k = index.shape[1]
    for block in _blocks(len(doubtful), len(points)):
        rows = doubtful[block]
        whole = _exact(points, queries[rows])
        if exclude_self:
            whole.scatter_(1, rows[:, None], torch.inf)
        values, positions = whole.sort(dim=1, stable=True)
        index[rows], squared[rows] = positions[:, :k], values[:, :k]


def _exact(points: Tensor, queries: Tensor) -> Tensor:
    """Return [M, N] squared distances summed axis by axis, as the candidates are measured."""
    squared = torch.zeros(len(queries), len(points), dtype=points.dtype, device=points.device)
    for query, point in zip(queries.T, points.T, strict=True):
        offset = query[:, None] - point
        squared.addcmul_(offset, offset)
    return squared


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _ENTRIES // columns)
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))
