"""How far the branches of a sum, and what speaks for different classes, are different things.

Of branches after JonathanBrok/branched-nn (2023): with c the n x n covariance of their outputs over
all images and places, ``specialization = (n - sum c_ij^2 / sum c_ii^2) / (n - 1)``: 1 if no two are
correlated, 0 if all are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from cmd_plugin.errors import ShapeError

__all__ = ["branch_covariance", "class_cosine", "importance", "specialization"]


def branch_covariance(branches: Tensor) -> Tensor:
    """Return the covariance of branches [B, n, ...] over images and places, [n, n] float64."""
    if branches.ndim < 3:
        raise ShapeError(f"branches must be [B, n, ...], got {tuple(branches.shape)}.")
    rows = branches.detach().double().transpose(0, 1).flatten(1)
    rows = rows - rows.mean(dim=1, keepdim=True)
    return rows @ rows.T / rows.shape[1]


def specialization(covariance: Tensor) -> float:
    """Return how decorrelated branches are; 0 of branches that are all silent.

    Args:
        covariance: [n, n] of :func:`branch_covariance`, n at least 2.

    Raises:
        ShapeError: If it is no such matrix.
    """
    count = len(covariance)
    if covariance.shape != (count, count) or count < 2:
        raise ShapeError(f"covariance must be [n, n], n from 2 on, got {tuple(covariance.shape)}.")
    power = covariance.diagonal().square().sum()
    if not power:
        return 0.0
    return float((count - covariance.square().sum() / power) / (count - 1))


def importance(covariance: Tensor) -> Tensor:
    """Return each branch's share of the power, ``c_ii / sqrt(sum c_jj^2)``: [n] float64."""
    power = covariance.diagonal()
    return power / power.square().sum().sqrt().clamp_min(torch.finfo(power.dtype).tiny)


def class_cosine(distinct: Tensor) -> float:
    """Return how alike the parts for different classes are: the mean cosine over pairs of classes.

    1 says that a map is the same whichever class is asked for, and so speaks for none.

    Args:
        distinct: [B, k, C, H, W] of :func:`cmd_plugin.distinction.distinct_of_every_class`.

    Raises:
        ShapeError: If there are not two classes or more.
    """
    if distinct.ndim < 3 or distinct.shape[1] < 2:
        raise ShapeError(f"distinct must be [B, k, ...], k from 2, got {tuple(distinct.shape)}.")
    rows = normalize(distinct.detach().double().flatten(2), dim=2)
    count = rows.shape[1]
    cosines = (rows @ rows.mT).sum(dim=(1, 2)) - rows.square().sum(dim=(1, 2))
    return float(cosines.mean()) / (count * (count - 1))
