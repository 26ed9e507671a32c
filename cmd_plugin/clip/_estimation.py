"""From statistics to a regularised spectrum, and what that would be without one of its rows."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from cmd_plugin.clip._rows import Rows, check_rows, row_blocks
from cmd_plugin.clip._shrinkage import Shrinkage, fourth_without, ledoit_wolf, oas
from cmd_plugin.clip.statistics import GaussianStatistics, Normalize
from cmd_plugin.errors import InputError

__all__ = ["Spectrum", "estimate", "gather", "replace_correlated", "scores_without"]

_ENOUGH = 10  # rows a feature, from which on a covariance is taken as it is
_CORRELATED = 0.9  # above which the released code replaces the later of two features


class Spectrum(NamedTuple):
    r"""A covariance in its eigenvectors, before and after regularisation.

    Attributes:
        eigenvalues: [d] float64, of the sample covariance (divided by N - 1), descending.
        vectors: [d, r] float64, eigenvectors kept, of each the entry of largest size positive.
        variances: [r] float64, shrunk and floored.
        shrinkage: ``"none"``, ``"oas"``, ``"ledoit-wolf"`` or ``"given"``.
        intensity: Weight of the identity.
        floored: How many variances were raised.
        rows: Number of rows N.
        third: [d] float64, :math:`\sum \lVert z \rVert^2 z` about the mean.
        fourth: :math:`\sum \lVert z \rVert^4`.
    """

    eigenvalues: Tensor
    vectors: Tensor
    variances: Tensor
    shrinkage: str
    intensity: float
    floored: int
    rows: int
    third: Tensor
    fourth: float


def gather(
    x: Rows | GaussianStatistics, normalize: Normalize | None, about: Mapping[str, str] | None
) -> GaussianStatistics:
    """Return the statistics of features, or those given.

    Raises:
        InputError: If statistics were normalised otherwise.
        ShapeError: If features are not floating [N, d].
    """
    if not isinstance(x, GaussianStatistics):
        check_rows(x)
        statistics = GaussianStatistics(x.shape[1], normalize=normalize or "raw", about=about)
        statistics.update(x)
        return statistics
    if normalize not in (None, x.normalize):
        raise InputError(
            f"the statistics were gathered with normalize={x.normalize!r}, not {normalize!r}."
        )
    return x


def replace_correlated(x: Rows | GaussianStatistics) -> tuple[Tensor, Tensor]:
    """Return features as the released code fits them, and the mean of those they were.

    Raises:
        InputError: If these are statistics.
        ShapeError: If features are not floating [N, d].
    """
    if isinstance(x, GaussianStatistics):
        raise InputError("legacy_noise needs the features themselves, not their statistics.")
    check_rows(x)
    wide = torch.cat([block.double().cpu() for block in row_blocks(x, 4096)])
    wide = wide[wide.isfinite().all(dim=1)]
    later = (torch.corrcoef(wide.T).triu(diagonal=1) > _CORRELATED).any(dim=0)
    noise = torch.randn(wide.shape, generator=torch.Generator().manual_seed(0), dtype=wide.dtype)
    return torch.where(later, 0.1 * noise, wide), wide.mean(dim=0)


def estimate(
    statistics: GaussianStatistics, shrinkage: Shrinkage, floor: float, rank: int | None
) -> Spectrum:
    """Return the regularised spectrum; the arguments are those of ``Whitening.fit``.

    Raises:
        InputError: If there are too few rows, or directions without variance and no floor.
    """
    rows, dim = statistics.rows, statistics.dim
    kept = dim if rank is None else rank
    kind = _choose(shrinkage, rows, dim, kept)
    if statistics.normalize == "raw" and abs(statistics.mean_norm - 1.0) < 1e-3:
        warnings.warn(
            "the features look L2-normalised (mean norm 1): a likelihood is of raw features, "
            "before normalisation.",
            stacklevel=3,
        )
    central = statistics.central()
    values, vectors = torch.linalg.eigh(central["second"].cpu() / (rows - 1))
    values, vectors = values.flip(0).clamp_min(0.0), vectors.flip(1)[:, :kept]
    fourth = central["fourth"].cpu()
    intensity = float(shrinkage) if kind == "given" else 0.0
    if kind in ("oas", "ledoit-wolf"):
        scaled = values * ((rows - 1) / rows)
        moments = scaled.sum(), scaled.square().sum(), fourth
        intensity = float(_intensity(kind, rows, dim, *moments))
    variances = _shrunk(values, intensity)[:kept]
    lowest = float(variances[0]) * floor
    nothing = dim * torch.finfo(torch.float64).eps * float(variances[0])
    if float(variances[0]) <= 0.0 or (floor == 0.0 and float(variances[-1]) <= nothing):
        raise InputError(
            "the features have directions without any variance: set a floor, a rank or "
            "shrinkage, or look whether all rows are equal."
        )
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return Spectrum(
        eigenvalues=values,
        vectors=(vectors * torch.where(largest < 0, -1.0, 1.0)).contiguous(),
        variances=variances.clamp_min(lowest),
        shrinkage=kind,
        intensity=intensity,
        floored=int((variances < lowest).sum()),
        rows=rows,
        third=central["third"].cpu(),
        fourth=float(fourth),
    )


def scores_without(z: Tensor, fit: Spectrum) -> Tensor:
    """Return the squared norm of every row in the fit without it, [N] float64.

    See ``Whitening.leave_one_out``. The sample covariance without row i is that of all, scaled,
    minus a multiple of :math:`z z^T`, so that Sherman and Morrison's formula applies.

    Args:
        z: [N, d] float64, rows of the fit minus the mean of all.
        fit: Of all rows.
    """
    n, dim = fit.rows, len(fit.eigenvalues)
    values, vectors = fit.eigenvalues.to(z.device), fit.vectors.to(z.device)
    along = (z @ vectors).square()
    size = z.square().sum(dim=1)
    scale, weight = (n - 1) / (n - 2), n / ((n - 1) * (n - 2))
    total = values.sum()
    trace = scale * total - weight * size
    intensity = torch.full_like(size, fit.intensity)
    if fit.shrinkage in ("oas", "ledoit-wolf") and len(fit.variances) == dim:
        form = along @ values
        energy = scale**2 * values.square().sum() - 2 * scale * weight * form
        energy = energy + (weight * size).square()
        inner = z @ fit.third.to(z.device)
        fourth = fourth_without(n, size, (n - 1) * total, (n - 1) * form, inner, fit.fourth)
        ratio = (n - 2) / (n - 1)  # intensities are defined for covariances divided by N
        intensity = _intensity(fit.shrinkage, n - 1, dim, trace * ratio, energy * ratio**2, fourth)
    raw = values[: len(fit.variances)]
    raised = fit.variances.to(z.device) - _shrunk(values, fit.intensity)[: len(raw)]
    keep = 1.0 - intensity
    diagonal = keep[:, None] * (scale * raw) + (intensity * trace / dim)[:, None] + raised
    distance = (along / diagonal).sum(dim=1)
    left = 1.0 - keep * weight * distance
    # Below zero for no row of the fit.
    distance = torch.where(left > 0.0, distance / left, torch.nan)
    return distance * (n / (n - 1)) ** 2  # the mean moved away from the row as well


def _choose(shrinkage: Shrinkage, rows: int, dim: int, kept: int) -> str:
    """Return the kind of shrinkage, or refuse: a covariance of too few rows has no inverse."""
    if not isinstance(shrinkage, str):
        kind = "given" if shrinkage > 0 else "none"
    elif shrinkage == "auto":
        kind = "none"
        if rows < _ENOUGH * dim:
            kind = "oas"
            warnings.warn(
                f"{rows} rows are less than {_ENOUGH} for each of {dim} features: the covariance "
                "is shrunk (OAS); shrinkage='none' takes it as it is.",
                stacklevel=4,
            )
    else:
        kind = shrinkage
    needed = kept + 3 if kind == "none" else 2
    if rows < needed:
        raise InputError(
            f"{rows} rows are too few for {kept} directions without shrinkage: give at least "
            f"{needed}, a smaller rank, or shrinkage='auto'."
        )
    return kind


def _intensity(
    kind: str, rows: int, dim: int, trace: Tensor, energy: Tensor, fourth: Tensor
) -> Tensor:
    if kind == "oas":
        return oas(rows, dim, trace, energy)
    return ledoit_wolf(rows, dim, trace, energy, fourth)


def _shrunk(values: Tensor, intensity: float) -> Tensor:
    return (1.0 - intensity) * values + intensity * values.mean()
