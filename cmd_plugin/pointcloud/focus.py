"""How unusual a cloud is to a network: its focus against that on clean clouds, and other scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmd_plugin.errors import InputError, NonFiniteError, ShapeError, StateMismatch
from cmd_plugin.pointcloud.importance import PointImportance
from cmd_plugin.runs.tensors import Schema

__all__ = ["FocusReference", "focus_alarms", "gini", "unusual_scores"]

_BINS = 1 << 16
_SCHEMA = Schema("focus-reference", 1, "a FocusReference")


class FocusReference:
    """Distribution of the normalised entropy H on clean clouds, and distances from it.

    H depends on the number of points, so a reference serves clouds of one size only. It is a
    histogram: its memory does not grow with the clouds seen, and two of them merge exactly. Median
    and spread are exact to 1/65536.

    Args:
        points: Number of points N of the clouds.
    """

    def __init__(self, points: int) -> None:
        if points < 1:
            raise InputError(f"points must be at least 1, got {points}.")
        self.points = points
        self.histogram = torch.zeros(_BINS, dtype=torch.int64)

    def update(self, entropy: Tensor) -> None:
        """Take clean clouds in.

        Args:
            entropy: [B] normalised entropies in [0, 1].

        Raises:
            NonFiniteError: If one is NaN.
        """
        if not bool(torch.isfinite(entropy).all()):
            raise NonFiniteError("an entropy is NaN or infinite: leave that cloud out.")
        place = (entropy.detach().cpu().double() * _BINS).long().clamp_(0, _BINS - 1)
        self.histogram += torch.bincount(place, minlength=_BINS)

    @property
    def clouds(self) -> int:
        """Number of clouds taken in."""
        return int(self.histogram.sum())

    @property
    def median(self) -> float:
        """Median entropy."""
        return _median(_CENTRES, self.histogram)

    @property
    def spread(self) -> float:
        """Median absolute deviation from the median; at least half a bin."""
        distance = (_CENTRES - self.median).abs()
        order = distance.argsort()
        return max(_median(distance[order], self.histogram[order]), 0.5 / _BINS)

    def uncertainty(self, entropy: Tensor, points: int) -> Tensor:
        """Distance of H from the median in units of the spread, [B] float64; large is unusual.

        Args:
            entropy: [B] normalised entropies.
            points: Number of points of these clouds.

        Raises:
            InputError: If the reference is empty, or for clouds of another size.
        """
        if points != self.points:
            raise InputError(
                f"this reference is for clouds of {self.points} points, not {points}: entropies "
                "compare at equal size only."
            )
        if self.clouds == 0:
            raise InputError("the reference is empty: update it with clean clouds first.")
        return (entropy.double() - self.median).abs() / self.spread

    def merge(self, other: FocusReference) -> None:
        """Take in the clouds of another reference.

        Raises:
            StateMismatch: If it is for clouds of another size.
        """
        if other.points != self.points:
            raise StateMismatch(
                f"references for {self.points} and {other.points} points cannot be merged."
            )
        self.histogram += other.histogram

    def state_dict(self) -> dict[str, Any]:
        """The state, tensors and numbers only."""
        return {"points": self.points, "histogram": self.histogram.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state of another reference.

        Raises:
            StateMismatch: If it does not fit; nothing has changed then.
        """
        points, histogram = state.get("points"), state.get("histogram")
        if (
            not isinstance(points, int)
            or points < 1
            or not isinstance(histogram, Tensor)
            or histogram.shape != (_BINS,)
            or histogram.dtype != torch.int64
            or bool((histogram < 0).any())
        ):
            raise StateMismatch("this is not the state of a FocusReference.")
        self.points, self.histogram = points, histogram.cpu().clone()

    def save(self, path: str | Path) -> None:
        """Write a safetensors file.

        Raises:
            InputError: If it cannot be written.
        """
        _SCHEMA.save(path, {"histogram": self.histogram}, {"points": str(self.points)})

    @classmethod
    def load(cls, path: str | Path) -> FocusReference:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: If the file is missing, damaged or something else.
        """
        tensors, about = _SCHEMA.load(path)
        points = about.get("points", "")
        reference = cls(1)
        try:
            reference.load_state_dict({"points": int(points), **tensors})
        except ValueError as error:  # StateMismatch is one, and what int() raises
            raise InputError(f"{path} is damaged ({error}): make it again.") from error
        return reference


_CENTRES = (torch.arange(_BINS, dtype=torch.float64) + 0.5) / _BINS


def _median(values: Tensor, counts: Tensor) -> float:
    """Lower median of ascending values with these counts."""
    running = counts.cumsum(0)
    half = (running[-1] + 1) // 2
    return float(values[int(torch.searchsorted(running, half))])


def focus_alarms(entropy: Tensor, limit: float = 5.0) -> Tensor:
    """Which clouds of a batch have an entropy far from the others', [B] bool.

    Far is more than ``limit`` median absolute deviations from the median; without a reference this
    finds single odd clouds, not a batch that is odd as a whole.

    Args:
        entropy: [B] normalised entropies.
        limit: In median absolute deviations.
    """
    distance = (entropy.double() - entropy.double().median()).abs()
    return distance > limit * distance.median().clamp_min(0.5 / _BINS)


def gini(scores: Tensor) -> Tensor:
    r"""Gini coefficient of each cloud: 0 if its scores are equal, near 1 if one of them is all.

    .. math:: G = \frac{2 \sum_i i \, s_{(i)}}{N \sum_i s_i} - \frac{N + 1}{N}, \qquad
              s_{(1)} \le \dots \le s_{(N)}

    Args:
        scores: [B, N], none negative. A cloud of zeros has 0.

    Returns:
        [B] float64.

    Raises:
        ShapeError: If they are not [B, N].
        InputError: If one is negative or NaN.
    """
    if scores.ndim != 2 or not scores.shape[1]:
        raise ShapeError(f"scores must be [B, N], got {tuple(scores.shape)}.")
    if not bool((scores >= 0).all()):
        raise InputError(
            "scores hold negative values or NaN: their Gini coefficient means nothing."
        )
    ordered = scores.detach().double().sort(dim=1).values
    count = scores.shape[1]
    rank = torch.arange(1, count + 1, dtype=torch.float64, device=scores.device)
    total = ordered.sum(dim=1)
    share = (ordered * rank).sum(dim=1) / total.clamp_min(1e-300)
    return torch.where(total > 0, 2.0 * share / count - (count + 1) / count, 0.0)


def unusual_scores(seen: PointImportance, reference: FocusReference) -> dict[str, Tensor]:
    r"""Scores of whole clouds that may tell unusual ones from clean ones, [B] float64 each.

    - ``"mean"``, ``"max"`` and ``"Gini"`` of the FBI scores of the cloud's points; whether unusual
      clouds have larger or smaller ones depends on what is unusual about them;
    - ``"uncertainty"``: :meth:`FocusReference.uncertainty`, larger for unusual clouds;
    - ``"1 - max softmax"`` and ``"energy"``, :math:`-\log \sum_c e^{z_c}`, of the class scores: the
      baselines, larger for unusual clouds.

    Entropies, means and maxima depend on the number of points, so only clouds of the reference's
    size are taken: compare what this returns for clean and for other clouds with
    :func:`cmd_plugin.pointcloud.score_metrics.separation`.

    Args:
        seen: From :func:`point_importance` with a measure that counts, such as ``"critical++"``,
            of a classifier whose output is [B, classes].
        reference: Of clean clouds, other ones than those compared.

    Raises:
        InputError: If clouds are ragged or of another size than the reference's, nothing was
            counted, or the reference is empty.
        ShapeError: If the output is not [B, classes].
    """
    if seen.mask is not None or seen.entropy is None:
        what = "counts (measure='critical++')" if seen.mask is None else "clouds of equal size"
        raise InputError(f"unusual clouds are told by {what} only.")
    if seen.output.ndim != 2 or len(seen.output) != len(seen.norm):
        raise ShapeError(f"the output must be [B, classes], got {tuple(seen.output.shape)}.")
    norm, logits = seen.norm.double(), seen.output.double()
    return {
        "mean": norm.mean(dim=1),
        "max": norm.amax(dim=1),
        "Gini": gini(seen.norm),
        "uncertainty": reference.uncertainty(seen.entropy, norm.shape[1]),
        "1 - max softmax": 1.0 - logits.softmax(dim=1).amax(dim=1),
        "energy": -logits.logsumexp(dim=1),
    }
