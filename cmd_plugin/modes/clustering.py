"""Group sampled trajectories into modes and pick a reference weight for each."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "choose_references",
    "cluster_correlations",
    "correlation_matrix",
    "row_distances",
]

_ROWS = 128  # rows of a block in row_distances: its scratch is 128 K values


def correlation_matrix(rows: Tensor) -> Tensor:
    """Return the absolute Pearson correlations of trajectories.

    Args:
        rows: [K, T], none constant; computed in float64.

    Returns:
        [K, K] float64 in [0, 1], with ones on the diagonal.
    """
    centred = rows.double() - rows.double().mean(dim=1, keepdim=True)
    unit = centred / centred.norm(dim=1, keepdim=True)
    correlation: Tensor = (unit @ unit.T).abs_().clamp_(max=1.0)
    return correlation.fill_diagonal_(1.0)


def row_distances(correlation: Tensor) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return the Euclidean distances between rows of C, in scipy's condensed order.

    The distance is of second order: two weights are close when they correlate alike with all
    others. Computed from the Gram matrix, D^2 = G_pp + G_qq - 2 G_pq, a block of rows at a time and
    only above the diagonal: K^3 multiply-adds in matrix products instead of K^2/2 passes over K
    coordinates, and no second matrix of size K^2.

    Returns:
        [K (K-1) / 2] float64.
    """
    count, device = correlation.shape[0], correlation.device
    if device.type != "cpu":  # a matrix product there, and one copy of what is above the diagonal
        squares = torch.linalg.vector_norm(correlation, dim=1).square()
        gram = (correlation @ correlation.T).mul_(-2.0).add_(squares[:, None]).add_(squares)
        above = torch.ones(count, count, dtype=torch.bool, device=device).triu_(1)
        distances: np.ndarray[tuple[int], np.dtype[np.float64]]
        distances = gram.clamp_(min=0.0).sqrt_()[above].cpu().numpy()
        return distances
    squares = torch.linalg.vector_norm(correlation, dim=1).square()  # no second K x K matrix
    condensed = torch.empty(count * (count - 1) // 2, dtype=torch.float64)
    at = 0
    for start in range(0, count, _ROWS):
        stop = min(count, start + _ROWS)
        gram = correlation[start:stop] @ correlation[start:].T
        gram.mul_(-2.0).add_(squares[start:stop, None]).add_(squares[None, start:])
        gram.clamp_(min=0.0).sqrt_()
        for row in range(stop - start):
            width = count - start - row - 1
            condensed[at : at + width] = gram[row, row + 1 :]
            at += width
    return condensed.numpy()


def cluster_correlations(correlation: Tensor, modes: int) -> Tensor:
    """Cluster the rows of C into at most ``modes`` groups, [K] int64; group 0 is the largest.

    Complete linkage on :func:`row_distances`, cut by scipy's ``maxclust``: ties can give fewer
    groups. Groups of equal size are ordered by their first member.
    """
    count = correlation.shape[0]
    if count == 1 or modes == 1:
        return torch.zeros(count, dtype=torch.int64)
    from scipy.cluster import hierarchy  # takes most of a second to import

    tree = hierarchy.linkage(row_distances(correlation), method="complete")
    labels = torch.from_numpy(
        hierarchy.fcluster(tree, t=modes, criterion="maxclust").astype(np.int64) - 1
    )
    sizes = torch.bincount(labels).tolist()
    firsts = [int((labels == group).nonzero()[0, 0]) for group in range(len(sizes))]
    order = sorted(range(len(sizes)), key=lambda group: (-sizes[group], firsts[group]))
    rank = torch.empty(len(sizes), dtype=torch.int64)
    rank[torch.tensor(order)] = torch.arange(len(sizes))
    return rank[labels]


def choose_references(correlation: Tensor, labels: Tensor) -> Tensor:
    """Return for each cluster the member of highest mean |correlation| with the whole cluster.

    The member itself is included, and the first of equals wins.

    Returns:
        [M] int64, rows of C.
    """
    clusters = int(labels.max()) + 1
    membership = torch.nn.functional.one_hot(labels, clusters).double()
    means = (correlation @ membership.to(correlation.device)).cpu() / membership.sum(dim=0)
    own = means.gather(1, labels[:, None])[:, 0]
    references = []
    for cluster in range(clusters):
        members = (labels == cluster).nonzero()[:, 0]
        references.append(members[own[members].argmax()])
    return torch.stack(references)
