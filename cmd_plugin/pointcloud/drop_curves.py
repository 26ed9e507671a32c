"""How good scores are: what a network loses when points go in their order, and how rough they are.

A score that finds what the network needs makes accuracy fall fast when the highest points go first
(*high-drop*, a small area), and slowly when the lowest go first (*low-drop*, a large area); their
difference is one number for the score. Random scores are the baseline that belongs to every curve.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from cmd_plugin.errors import InputError, NonFiniteError, ShapeError
from cmd_plugin.kernels import knn
from cmd_plugin.kernels.counter_random import CounterRandom, sample_index

__all__ = ["FRACTIONS", "DropCurve", "perturbed_logits", "random_scores", "roughness"]

FRACTIONS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_PURPOSE = 0x44524F50

Order = Literal["high", "low", "insertion"]


def random_scores(points: Tensor, *, seed: int = 0, index: Tensor | None = None) -> Tensor:
    """Return [B, N] float64 random scores in (0, 1) for clouds [B, N, 3]: the baseline to beat.

    Args:
        points: [B, N, 3].
        seed: In [0, 2^63).
        index: [B] sample numbers, by default 0..B-1.
    """
    number = sample_index(index, len(points), points.device)
    return CounterRandom(seed, number, _PURPOSE + 1).uniform(points.shape[1])


def roughness(points: Tensor, scores: Tensor, neighbours: int = 16) -> Tensor:
    r"""How much scores jump from a point to its neighbours, [B] float64; lower is smoother.

    .. math:: \frac{1}{N} \sum_i \frac{|s_i - \frac{1}{k} \sum_{j \in kNN(i)} s_j|}{\sigma(s)}

    with the standard deviation over all N points of the cloud, so that the unit of the scores does
    not matter. Random scores are between 0.8 and 0.9, constant ones 0. (Definition of our own: the
    papers name smoothness and give no formula.)

    Args:
        points: [B, N, 3 or more]; the first three channels are coordinates.
        scores: [B, N].
        neighbours: k; at most N - 1 are taken.

    Raises:
        ShapeError: If shapes do not fit, or a cloud has one point only.
        NonFiniteError: If a coordinate or a score is NaN or infinite.
    """
    if points.ndim != 3 or points.shape[2] < 3 or scores.shape != points.shape[:2]:
        raise ShapeError(
            f"points must be [B, N, 3 or more] and scores [B, N], got {tuple(points.shape)} and "
            f"{tuple(scores.shape)}."
        )
    if points.shape[1] < 2 or neighbours < 1:
        raise ShapeError(
            f"a point needs a neighbour, got {points.shape[1]} points and {neighbours} neighbours."
        )
    if not bool(scores.isfinite().all()):
        raise NonFiniteError("scores hold NaN or infinite values.")
    near = knn(points[..., :3], min(neighbours, points.shape[1] - 1), exclude_self=True).positions
    wide = scores.detach().double()
    around = wide.gather(1, near.flatten(1)).view(near.shape).mean(dim=2)
    jumps = (wide - around).abs().mean(dim=1)
    deviation = wide.std(dim=1, correction=0)
    return torch.where(deviation > 0, jumps / deviation.clamp_min(1e-300), 0.0)


@torch.no_grad()
def perturbed_logits(
    model: Callable[[Tensor], Tensor],
    points: Tensor,
    score: Tensor | Callable[[Tensor], Tensor],
    order: Order = "high",
    *,
    fractions: Sequence[float] = FRACTIONS,
    seed: int = 0,
    index: Tensor | None = None,
) -> Tensor:
    """Return the network's scores while points are dropped, or put in, in the order of a score.

    Points of equal score go in a random order: a count or a gradient ties at 0 for most points, so
    average over several seeds.

    Args:
        model: Maps clouds [B, N, 3] to class scores [B, C]; in eval mode.
        points: [B, N, 3].
        score: [B, N] importance of every point; or a function from clouds [B, N', 3] to [B, N'],
            which is asked again on what is left after every fraction.
        order: ``"high"`` drops the highest scores first, ``"low"`` the lowest. ``"insertion"``
            starts with every point in the cloud's centroid and moves the highest scores to their
            places first.
        fractions: Shares of the points that are dropped (put in for insertion), rising, in [0, 1);
            insertion allows 1.
        seed: In [0, 2^63), for the order of ties.
        index: [B] sample numbers, by default 0..B-1.

    Returns:
        [F, B, C] class scores, one row per fraction; update a :class:`DropCurve` with it.

    Raises:
        ShapeError: If shapes do not fit.
        NonFiniteError: If a score is NaN.
        InputError: If fractions or order are none.
    """
    _check_fractions(fractions)
    if order not in ("high", "low", "insertion"):
        raise InputError(f"order must be high, low or insertion, got {order!r}.")
    if order != "insertion" and fractions[-1] >= 1.0:
        raise InputError("a fraction of 1 leaves no point to classify: stay below 1.")
    if points.ndim != 3 or points.shape[2] != 3:
        raise ShapeError(f"points must be [B, N, 3], got {tuple(points.shape)}.")
    if order == "insertion" and not isinstance(score, Tensor):
        raise InputError("insertion needs the scores of the whole cloud: give a tensor.")
    number = sample_index(index, len(points), points.device)
    size = points.shape[1]
    # The tie order is a shuffle of the cloud itself, so that it stays with the points.
    shuffle = CounterRandom(seed, number, _PURPOSE).permutation(size)
    left = _rows(points, shuffle)
    values = None
    if isinstance(score, Tensor):
        if score.shape != points.shape[:2]:
            raise ShapeError(f"score must be {tuple(points.shape[:2])}, got {tuple(score.shape)}.")
        order_once = _rank(score.gather(1, shuffle), order)
        left = _rows(left, order_once)
        values = left
    results = []
    for fraction in fractions:
        count = round(size * fraction)
        if order == "insertion":
            centre = left.mean(dim=1, keepdim=True).expand(-1, size - count, -1)
            results.append(model(torch.cat([left[:, :count], centre], dim=1)))
            continue
        if values is not None:
            left = values[:, count:]
        elif not isinstance(score, Tensor):
            gone = count - (size - left.shape[1])
            if gone:
                left = _rows(left, _rank(score(left), order))[:, gone:]
        results.append(model(left))
    return torch.stack(results)


def _rank(score: Tensor, order: Order) -> Tensor:
    """Return the order in which points go (or come), [B, N]; equal scores keep their order."""
    if bool(score.isnan().any()):
        raise NonFiniteError(f"score holds {int(score.isnan().sum())} NaN values.")
    return score.argsort(dim=1, descending=order != "low", stable=True)


def _rows(points: Tensor, order: Tensor) -> Tensor:
    return points.gather(1, order[:, :, None].expand(-1, -1, 3))


def _check_fractions(fractions: Sequence[float]) -> None:
    rising = all(a < b for a, b in itertools.pairwise(fractions))
    if len(fractions) < 2 or not rising or not 0.0 <= fractions[0] <= fractions[-1] <= 1.0:
        raise InputError(f"fractions must rise from two shares on within [0, 1], got {fractions}.")


class DropCurve(Metric):
    """Accuracy and probability of the true class against the share of points dropped.

    ``compute()`` gives the curves ``accuracy`` and ``probability`` [F] and the areas below them,
    ``accuracy_auc`` and ``probability_auc``, by the trapezoid rule over the fractions and without
    normalisation (over 0 to 0.9 a perfect network has 0.9). Memory does not grow.

    Args:
        fractions: Those of :func:`perturbed_logits`.
    """

    is_differentiable = False
    full_state_update = False
    correct: Tensor
    probability: Tensor
    seen: Tensor

    def __init__(self, fractions: Sequence[float] = FRACTIONS) -> None:
        super().__init__()
        _check_fractions(fractions)
        self.fractions = tuple(fractions)
        zeros = torch.zeros(len(fractions), dtype=torch.float64)
        self.add_state("correct", zeros.clone(), dist_reduce_fx="sum")
        self.add_state("probability", zeros.clone(), dist_reduce_fx="sum")
        self.add_state("seen", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add one batch; several tie orders of the same clouds are several batches.

        Args:
            logits: [F, B, C] class scores before softmax.
            target: [B] labels, int64.

        Raises:
            ShapeError: If shapes do not fit.
        """
        if logits.ndim != 3 or logits.shape[:2] != (len(self.fractions), *target.shape):
            raise ShapeError(
                f"logits must be [{len(self.fractions)}, B, C] and target [B], got "
                f"{tuple(logits.shape)} and {tuple(target.shape)}."
            )
        hits = (logits.argmax(dim=2) == target).double().sum(dim=1)
        chosen = target.expand(len(logits), -1)[:, :, None]
        likely = logits.double().softmax(dim=2).gather(2, chosen)[:, :, 0].sum(dim=1)
        self.correct += hits.to(self.correct.device)
        self.probability += likely.to(self.probability.device)
        self.seen += len(target)

    def compute(self) -> dict[str, Tensor]:
        """Return the two curves [F] and their areas, float64.

        Raises:
            InputError: If nothing was seen.
        """
        if not int(self.seen):
            raise InputError("no clouds were seen: call update() first.")
        share = torch.tensor(self.fractions, dtype=torch.float64, device=self.correct.device)
        accuracy, probability = self.correct / self.seen, self.probability / self.seen
        return {
            "accuracy": accuracy,
            "probability": probability,
            "accuracy_auc": torch.trapezoid(accuracy, share),
            "probability_auc": torch.trapezoid(probability, share),
        }
