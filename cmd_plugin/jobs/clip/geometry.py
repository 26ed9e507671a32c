"""What a report measures: of each set of embeddings its shape, of pairs also their gap."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cmd_plugin.clip import (
    AlphaCurve,
    Ellipsoid,
    GaussianStatistics,
    ModalityGap,
    Normality,
    NormalizationEffect,
    Whitening,
    alpha_curve,
    fit_ellipsoid,
    modality_gap,
    normality,
    normalization_effect,
    recall_at,
    score_rows,
    separability,
    separating_accuracy,
)
from cmd_plugin.errors import InputError
from cmd_plugin.jobs.clip.fitting import fit_whitening, gather, shrinkage_of, spread_rows
from cmd_plugin.jobs.clip.inputs import Rows
from cmd_plugin.jobs.clip.options import ReportOptions
from cmd_plugin.runs.job import Job
from cmd_plugin.runs.result import finite

__all__ = ["ALPHAS", "PairGeometry", "SetGeometry", "measure_pairs", "measure_set"]

ALPHAS = (*(step / 8 for step in range(-8, 8)), 0.95)
"""Offsets of the curves; 0 is among them, and at 1, where all is centred, the curves end."""

_SAMPLE = 10_000  # rows whose distributions are drawn, at most
_PIECE = 16384
_DEGENERATE = 1e-9  # share of the largest eigenvalue below which a direction holds no data
_FEWEST = 40  # rows, of which a whole report can be made
_SHOWN = 15  # features that separate best


@dataclass(frozen=True)
class SetGeometry:
    """Embeddings of one kind, and their shape.

    Attributes:
        name: ``"image"``, ``"text"`` or ``"embedding"``.
        rows: The rows.
        statistics: Of all rows.
        whitening: Fitted to all rows.
        sample: Some rows, evenly spread, [n, d].
        inside: Their scores as rows of the fit.
        outside: Their scores as if each had not been in the fit; None if there is no such fit.
        shape: Of the sample.
        normality: Tests of the whitened sample, whole and in groups.
        effect: Of dividing rows by their norms; None as ``outside``.
        lowest: Numbers of the least likely of all rows, least first.
        highest: Numbers of the most likely rows, most first.
    """

    name: str
    rows: Rows
    statistics: GaussianStatistics
    whitening: Whitening
    sample: Tensor
    inside: Mapping[str, Tensor]
    outside: Mapping[str, Tensor] | None
    shape: Ellipsoid
    normality: tuple[Normality, ...]
    effect: NormalizationEffect | None
    lowest: tuple[int, ...] = ()
    highest: tuple[int, ...] = ()
    scores: Mapping[int, float] = field(default_factory=dict)

    @property
    def best(self) -> Mapping[str, Tensor]:
        """Scores of the sample that are not optimistic, if there are some."""
        return self.inside if self.outside is None else self.outside

    def metrics(self) -> dict[str, Any]:
        """What was found, as JSON types."""
        whitening, shape = self.whitening, self.shape
        norms = self.best["norm"]
        conformity = self.best["conformity"]
        likelihood = self.best["log_likelihood"]
        together = torch.corrcoef(torch.stack([conformity, likelihood]))[0, 1]
        found: dict[str, Any] = {
            "rows": self.statistics.rows,
            "skipped_rows": self.statistics.skipped,
            "dimension": whitening.dim,
            "rank": whitening.rank,
            "floored": whitening.floored,
            "shrinkage": whitening.shrinkage,
            "intensity": whitening.intensity,
            "mean_norm": self.statistics.mean_norm,
            "radius": shape.radius,
            "thickness": shape.thickness,
            "offset": shape.offset,
            "anisotropy": shape.anisotropy,
            "diagonal_share": shape.diagonal_share,
            "conformity": {
                "mean": float(conformity.mean()),
                "std": float(conformity.std()),
                "correlation_with_likelihood": finite(float(together)),
            },
            "squared_norm": {
                "in_sample": float(self.inside["squared_norm"].mean()),
                "leave_one_out": None
                if self.outside is None
                else float(self.outside["squared_norm"].mean()),
            },
            "norm": {"mean": float(norms.mean()), "std": float(norms.std())},
            "normality": [
                {
                    "group_size": test.group_size,
                    "groups": test.groups,
                    "anderson": float(test.anderson.mean()),
                    "anderson_pass": test.anderson_pass,
                    "dagostino": float(test.dagostino.mean()),
                    "dagostino_pass": test.dagostino_pass,
                }
                for test in self.normality
            ],
            "normalization": None,
        }
        if self.effect is not None:
            found["normalization"] = {
                "norm_variation": self.effect.norm_variation,
                "rank_correlation": finite(self.effect.rank_correlation),
                "rarest": self.effect.rarest,
                "rarest_in_common": self.effect.rarest_in_common,
            }
        return found


def measure_set(job: Job, options: ReportOptions, rows: Rows, before: float, total: float) -> Any:
    """Measure embeddings of one kind.

    Args:
        job: Told how far it is.
        options: How to fit and what to show.
        rows: The embeddings.
        before: Rows the job is done with.
        total: Rows it is to measure.

    Returns:
        A :class:`SetGeometry`.

    Raises:
        InputError: If there are too few rows.
    """
    if len(rows) < _FEWEST:
        raise InputError(
            f"{options.input} holds {len(rows)} rows, and a report needs at least {_FEWEST}."
        )
    statistics = gather(job, rows, options.normalize, before, total)
    whitening = fit_whitening(statistics, options, [rows])
    mean = statistics.unit_mean
    sample = spread_rows([rows], _SAMPLE)
    sample = sample[sample.isfinite().all(dim=1)]
    own = whitening.leaves_one_out
    job.report("scoring", before + len(rows) / 2, total)
    inside = score_rows(sample, whitening, mean)
    outside = score_rows(sample, whitening, mean, leave_one_out=True) if own else None
    found = SetGeometry(
        name=rows.modality or "embedding",
        rows=rows,
        statistics=statistics,
        whitening=whitening,
        sample=sample,
        inside=inside,
        outside=outside,
        shape=fit_ellipsoid(sample),
        normality=_normality(options, whitening, sample),
        effect=_effect(options, sample) if own else None,
    )
    return _with_extremes(found, options.shown)


def _normality(
    options: ReportOptions, whitening: Whitening, sample: Tensor
) -> tuple[Normality, ...]:
    """Test principal components, in which there is data at all, whole and in groups."""
    values = whitening.eigenvalues[: whitening.vectors.shape[1]]
    filled = values > values[0] * _DEGENERATE
    components = replace(whitening, basis="pca").transform(sample.double())[:, filled]
    sizes = {len(sample): None, options.group_size: options.group_size}
    fitting = {size: given for size, given in sizes.items() if size <= len(sample)}
    return tuple(normality(components, given, options.seed) for given in fitting.values())


def _effect(options: ReportOptions, sample: Tensor) -> NormalizationEffect | None:
    if not bool((sample.norm(dim=1) > 0).all()):
        return None  # a row without direction cannot be put on the sphere
    shrinkage = shrinkage_of(options.shrinkage)
    return normalization_effect(sample, shrinkage=shrinkage, floor=options.floor)


def _with_extremes(found: SetGeometry, count: int) -> SetGeometry:
    """Look for the least and most likely among all rows, a piece at a time."""
    own = found.whitening.leaves_one_out
    ends: list[tuple[float, int]] = []
    first = 0
    for piece in found.rows.pieces(_PIECE):
        scores = score_rows(piece, found.whitening, leave_one_out=own)["log_likelihood"]
        good = scores.isfinite().nonzero().flatten().tolist()
        ends = sorted([*ends, *((float(scores[row]), first + row) for row in good)])
        if len(ends) > 2 * count:
            ends = ends[:count] + ends[-count:] if count else []
        first += len(piece)
    lowest, highest = ends[:count], ends[::-1][:count]
    return replace(
        found,
        lowest=tuple(row for _, row in lowest),
        highest=tuple(row for _, row in highest),
        scores={row: value for value, row in (*lowest, *highest)},
    )


@dataclass(frozen=True)
class PairGeometry:
    """Pairs of images and texts.

    Attributes:
        gap: Between the modalities.
        curve: Loss and divergence over the offset.
        recall: At 1, 5 and 10 by direction, among the other modality.
        pairs: How many pairs the curve and retrieval are of.
        features: Numbers of the features that separate best, from 0.
        separability: Of these.
        accuracy: Balanced accuracy of one threshold on each of these.
    """

    gap: ModalityGap
    curve: AlphaCurve
    recall: dict[str, dict[int, float]]
    pairs: int
    features: list[int]
    separability: list[float]
    accuracy: list[float]

    def metrics(self) -> dict[str, Any]:
        """What was found, as JSON types."""
        gap, curve = self.gap, self.curve
        return {
            "pairs": self.pairs,
            "gap": gap.l2m,
            "rmg": gap.rmg,
            "paired_cosine": gap.paired_cosine,
            "image_cosine": gap.image_cosine,
            "text_cosine": gap.text_cosine,
            "recall": {
                name: {str(k): value for k, value in found.items()}
                for name, found in self.recall.items()
            },
            "alpha": {
                "alphas": curve.alphas.tolist(),
                "loss": curve.loss.tolist(),
                "divergence": curve.divergence.tolist(),
                "alignment": curve.alignment.tolist(),
                "best": curve.best,
                "temperature": curve.temperature,
                "shift": curve.shift,
                "kl": curve.kl,
            },
            "separability": [
                {"feature": feature, "separability": finite(value), "accuracy": accuracy}
                for feature, value, accuracy in zip(
                    self.features, self.separability, self.accuracy, strict=True
                )
            ],
        }


def measure_pairs(job: Job, options: ReportOptions, images: Rows, texts: Rows) -> PairGeometry:
    """Measure what lies between images and texts.

    Args:
        job: Told what is being done.
        options: What to show.
        images: The images.
        texts: Row i the text of image i.
    """
    job.report("pairs", 0, 1)
    left, right = (spread_rows([rows], options.most_pairs) for rows in (images, texts))
    good = left.isfinite().all(dim=1) & right.isfinite().all(dim=1)
    left, right = left[good], right[good]
    apart = separability(left, right)
    best = apart.argsort(descending=True, stable=True)[:_SHOWN]
    return PairGeometry(
        gap=modality_gap(left, right),
        curve=alpha_curve(
            left,
            right,
            ALPHAS,
            temperature=options.temperature,
            shift=options.shift,  # type: ignore[arg-type]
        ),
        recall={
            "image_to_text": recall_at(left, right),
            "text_to_image": recall_at(right, left),
        },
        pairs=len(left),
        features=best.tolist(),
        separability=apart[best].tolist(),
        accuracy=separating_accuracy(left, right)[best].tolist(),
    )
