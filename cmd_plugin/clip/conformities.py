"""Conformity: how common an embedding is among others, the mean cosine to them.

Source: Levi and Gilboa, "The Double-Ellipsoid Geometry of CLIP" (ICML 2025), section 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cmd_plugin.clip._checks import embeddings, unit
from cmd_plugin.clip._rows import Rows, row_blocks
from cmd_plugin.errors import InputError, ShapeError

__all__ = [
    "ConformityEstimate",
    "conformity",
    "conformity_to",
    "estimate_conformity",
    "unit_mean",
]

_CHUNK = 65536  # rows in float64 at a time
_ROUNDING = 1e-14  # of a cosine


def unit_mean(x: Rows) -> Tensor:
    """Mean of the unit vectors of embeddings, itself not normalised: all that conformity needs.

    Args:
        x: Shape [N, d], N at least 1; an array on disk is read in blocks.

    Returns:
        Shape [d], float64, of norm at most 1.

    Raises:
        ShapeError: If ``x`` is no matrix.
        InputError: If there are no rows, or one is zero.
        NonFiniteError: If a row holds NaN or infinite values.
    """
    if x.ndim != 2 or not len(x):
        embeddings(x, "x")  # says what is wrong
    sums = [unit(embeddings(part, "x"), "x").sum(dim=0) for part in row_blocks(x, _CHUNK)]
    return torch.stack(sums).sum(dim=0) / len(x)


def conformity_to(x: Rows, mean: Tensor) -> Tensor:
    """Mean cosine of embeddings to a set they are no part of, exactly: <x / ||x||, mean>.

    Args:
        x: Shape [B, d].
        mean: Mean unit vector of the set, shape [d], from :func:`unit_mean`.

    Returns:
        Shape [B], float64, in [-1, 1].

    Raises:
        ShapeError: If shapes do not fit.
        InputError: If a row is zero.
        NonFiniteError: If a row holds NaN or infinite values.
    """
    if mean.ndim != 1 or x.ndim != 2 or mean.shape[0] != x.shape[1]:
        raise ShapeError(f"x {tuple(x.shape)} and mean {tuple(mean.shape)} must be [B, d] and [d].")
    if not len(x):
        return mean.new_zeros(0, dtype=torch.float64)
    parts = []
    for part in row_blocks(x, _CHUNK):
        wide = unit(embeddings(part, "x"), "x")
        parts.append(wide @ mean.to(wide))
    return torch.cat(parts)


def conformity(x: Rows, reference: Rows | None = None) -> Tensor:
    """Mean cosine of each embedding to the others, or to those of a reference, in O(N d).

    With unit vectors u and their mean m (not normalised), C_j = (N <u_j, m> - 1) / (N - 1) is the
    mean over k != j of cos(x_j, x_k), exactly. High means common, low means rare. Values of two
    sets compare only with the same reference, or with equal N.

    Args:
        x: Shape [N, d], N at least 2 without a reference.
        reference: Other embeddings of the same model and modality, shape [M, d].

    Returns:
        Shape [N], float64, in [-1, 1].

    Raises:
        ShapeError: If shapes do not fit.
        InputError: If there are too few rows, or one is zero.
        NonFiniteError: If a row holds NaN or infinite values.
    """
    if reference is not None:
        return conformity_to(x, unit_mean(reference))
    count = len(x)
    if x.ndim == 2 and count < 2:
        raise InputError(f"x has {count} rows: conformity among them needs at least 2.")
    return (count * conformity_to(x, unit_mean(x)) - 1.0) / (count - 1)


@dataclass(frozen=True)
class ConformityEstimate:
    """Conformity as the paper estimates it, from the cosine to the raw mean, beside the exact one.

    Attributes:
        exact: Conformity of every row, shape [N], float64.
        cosine: Cosine of every row to the mean of the raw rows, shape [N], float64.
        slope: Of the regression of conformity on the cosine; close to the norm of the mean unit
            vector, so at most about 1.
        offset: Of the same regression.
        inverse_slope: Of the regression of the cosine on conformity, the way round in which the
            paper's 1.46 (images) and 1.41 (texts) are possible.
        inverse_offset: Of that regression.
        pearson: Correlation of conformity and cosine.
        scale: The factor a = ||raw mean|| / mean norm with which a * cosine estimates the mean
            cosine (own one included) without looking at conformity.
        error: Largest error of that estimate.
        bound: What it cannot exceed: ||raw mean / mean norm - mean unit vector||.
        norm_variation: Standard deviation of the norms over their mean, which the bound cannot
            exceed.
    """

    exact: Tensor
    cosine: Tensor
    slope: float
    offset: float
    inverse_slope: float
    inverse_offset: float
    pearson: float
    scale: float
    error: float
    bound: float
    norm_variation: float


def estimate_conformity(x: Rows) -> ConformityEstimate:
    """Compare the paper's estimate of conformity with the exact one.

    Args:
        x: Raw embeddings, shape [N, d], N at least 3.

    Raises:
        ShapeError: If ``x`` is no matrix.
        InputError: If there are too few rows, one is zero, or all are equally common.
        NonFiniteError: If a row holds NaN or infinite values.
    """
    wide = embeddings(x, "x", least=3)
    units, norms = unit(wide, "x"), wide.norm(dim=1)
    mean, raw = units.mean(dim=0), wide.mean(dim=0)
    if raw.norm() == 0:
        raise InputError("the mean of x is zero: cosines to it do not exist.")
    with_self = units @ mean
    exact = (len(x) * with_self - 1.0) / (len(x) - 1)
    cosine = units @ (raw / raw.norm())
    c, s = exact - exact.mean(), cosine - cosine.mean()
    if min(float(c.abs().max()), float(s.abs().max())) < _ROUNDING:
        raise InputError("all rows of x are equally common: there is nothing to regress on.")
    slope, inverse = float(c @ s / (s @ s)), float(c @ s / (c @ c))
    scale = float(raw.norm() / norms.mean())
    return ConformityEstimate(
        exact=exact,
        cosine=cosine,
        slope=slope,
        offset=float(exact.mean()) - slope * float(cosine.mean()),
        inverse_slope=inverse,
        inverse_offset=float(cosine.mean()) - inverse * float(exact.mean()),
        pearson=float(c @ s / (c.norm() * s.norm())),
        scale=scale,
        error=float((with_self - scale * cosine).abs().max()),
        bound=float((raw / norms.mean() - mean).norm()),
        norm_variation=float(norms.std(correction=0) / norms.mean()),
    )
