"""How differently the members of an ensemble err, and what averaging them gains.

The EPiC paper's own diversity formula could not be found; these are the standard pairwise measures
(Kuncheva, Whitaker: *Measures of Diversity in Classifier Ensembles*, 2003) and the ambiguity
decomposition (Krogh, Vedelsby 1995) of the Brier score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric

from cmd_plugin.errors import InputError, ShapeError

__all__ = ["Diversity", "EnsembleDiversity"]


@dataclass(frozen=True)
class Diversity:
    """Diversity of M members over the clouds seen; NaN where a measure is not defined.

    Attributes:
        views: View of every member.
        accuracy: [M] accuracy of every member.
        ensemble_accuracy: Accuracy of the mean raw logit.
        disagreement: [M, M] share of clouds on which exactly one of the two is right.
        double_fault: [M, M] share on which both are wrong; the diagonal is a member's error.
        yule_q: [M, M] Yule's Q, in [-1, 1]; 0 for independent errors, 1 when never exactly one of
            them errs alone in both directions.
        error_correlation: [M, M] Pearson correlation of being wrong.
        member_brier: Mean over members of the Brier score of their softmax.
        ambiguity: Mean squared distance of the members' softmax from their mean. The Brier score of
            the mean softmax is exactly ``member_brier - ambiguity``.
    """

    views: tuple[str, ...]
    accuracy: Tensor
    ensemble_accuracy: float
    disagreement: Tensor
    double_fault: Tensor
    yule_q: Tensor
    error_correlation: Tensor
    member_brier: float
    ambiguity: float

    @property
    def mean_accuracy(self) -> float:
        """Mean accuracy of the members."""
        return float(self.accuracy.mean())

    @property
    def gap(self) -> float:
        """What the vote gains over its mean member, in accuracy."""
        return self.ensemble_accuracy - self.mean_accuracy

    def between(self, first: str, second: str) -> dict[str, float]:
        """Return the pairwise measures averaged over pairs of two views (or within one).

        Pairs for which a measure is not defined are left out of its mean.

        Raises:
            InputError: If there is no pair of different members with these views.
        """
        rows = torch.tensor([view == first for view in self.views])
        columns = torch.tensor([view == second for view in self.views])
        pairs = (rows[:, None] & columns).fill_diagonal_(False)
        if not bool(pairs.any()):
            raise InputError(f"there is no pair of members {first!r} and {second!r}.")
        return self._mean(pairs)

    def overall(self) -> dict[str, float]:
        """Return the pairwise measures averaged over all pairs of different members."""
        return self._mean(~torch.eye(len(self.views), dtype=torch.bool))

    def _mean(self, pairs: Tensor) -> dict[str, float]:
        measures = ("disagreement", "double_fault", "yule_q", "error_correlation")
        return {name: float(getattr(self, name)[pairs].nanmean()) for name in measures}


class EnsembleDiversity(Metric):
    """Accumulates what :class:`Diversity` reports; memory is M x M whatever is seen.

    ``compute()`` gives scalars for logging, ``summary()`` everything.

    Args:
        views: View of every member, as in :attr:`cmd_plugin.pointcloud.EPiC.views`.
    """

    is_differentiable = False
    full_state_update = False
    both_wrong: Tensor
    wrong: Tensor
    vote_correct: Tensor
    brier: Tensor
    spread: Tensor
    seen: Tensor

    def __init__(self, views: Sequence[str]) -> None:
        super().__init__()
        if len(views) < 2:
            raise InputError("diversity is between members: at least two are needed.")
        self.views = tuple(views)
        members = len(self.views)
        for name, shape, dtype in (
            ("both_wrong", (members, members), torch.int64),
            ("wrong", (members,), torch.int64),
            ("vote_correct", (), torch.int64),
            ("seen", (), torch.int64),
            ("brier", (), torch.float64),
            ("spread", (), torch.float64),
        ):
            self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            logits: [B, M, C] raw scores of all members.
            target: [B] labels, int64.

        Raises:
            ShapeError: If shapes do not fit.
        """
        if logits.ndim != 3 or logits.shape[:2] != (*target.shape, len(self.views)):
            raise ShapeError(
                f"logits must be [B, {len(self.views)}, C] and target [B], got "
                f"{tuple(logits.shape)} and {tuple(target.shape)}."
            )
        device = self.wrong.device
        wrong = (logits.argmax(dim=2) != target[:, None]).double()
        # Whole numbers below 2^53: the float64 product is exact.
        self.both_wrong += (wrong.T @ wrong).round().long().to(device)
        self.wrong += wrong.sum(dim=0).long().to(device)
        self.vote_correct += (logits.mean(dim=1).argmax(dim=1) == target).sum().to(device)
        likely = logits.double().softmax(dim=2)
        mean = likely.mean(dim=1, keepdim=True)
        self.spread += (likely - mean).square().sum(dim=2).mean(dim=1).sum().to(device)
        likely.scatter_add_(
            2, target[:, None, None].expand(-1, likely.shape[1], 1), -torch.ones_like(likely)
        )
        self.brier += likely.square().sum(dim=2).mean(dim=1).sum().to(device)
        self.seen += len(target)

    def summary(self) -> Diversity:
        """Return all measures.

        Raises:
            InputError: If nothing was seen.
        """
        count = int(self.seen)
        if not count:
            raise InputError("no clouds were seen: call update() first.")
        n00 = self.both_wrong.double().cpu()
        wrong = self.wrong.double().cpu()
        n01, n10 = wrong[:, None] - n00, wrong[None] - n00  # exactly one of the two wrong
        n11 = count - n00 - n01 - n10
        share = wrong / count
        deviation = (share * (1 - share)).sqrt()
        covariance = n00 / count - share[:, None] * share
        return Diversity(
            views=self.views,
            accuracy=1 - share,
            ensemble_accuracy=int(self.vote_correct) / count,
            disagreement=(n01 + n10) / count,
            double_fault=n00 / count,
            yule_q=(n11 * n00 - n01 * n10) / (n11 * n00 + n01 * n10),
            error_correlation=covariance / (deviation[:, None] * deviation),
            member_brier=float(self.brier) / count,
            ambiguity=float(self.spread) / count,
        )

    def compute(self) -> dict[str, Tensor]:
        """Return the scalars, float64: accuracies, their gap, Brier parts, means over pairs.

        Raises:
            InputError: If nothing was seen.
        """
        result = self.summary()
        named = {
            "ensemble_accuracy": result.ensemble_accuracy,
            "mean_accuracy": result.mean_accuracy,
            "gap": result.gap,
            "member_brier": result.member_brier,
            "ambiguity": result.ambiguity,
            **result.overall(),
        }
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in named.items()}
