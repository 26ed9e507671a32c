"""Whether one set of embeddings comes from where another does: a permutation test, a classifier.

Sources: Gretton et al., "A Kernel Two-Sample Test" (JMLR 2012); Lopez-Paz and Oquab, "Revisiting
Classifier Two-Sample Tests" (ICLR 2017).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cmd_plugin.clip._checks import embeddings, same_width
from cmd_plugin.clip._rows import Rows
from cmd_plugin.errors import InputError

__all__ = ["DomainAUC", "MMDTest", "domain_auc", "mmd_test"]

_BATCH = 64  # permutations at a time


@dataclass(frozen=True)
class MMDTest:
    """Result of the permutation test of equal distributions.

    Attributes:
        statistic: Unbiased estimate of the squared maximum mean discrepancy; may be below 0.
        p_value: Share of relabelled sets, the real one included, at least as far apart, in (0, 1].
            Exact: at level q it is below or equal q at most a share q of the time when both sets
            come from one distribution.
        permutations: How many relabellings were drawn.
        bandwidth: Of the Gaussian kernel, in units of the embeddings.
        rows: Rows used of each set.
    """

    statistic: float
    p_value: float
    permutations: int
    bandwidth: float
    rows: tuple[int, int]


def mmd_test(
    a: Rows,
    b: Rows,
    *,
    permutations: int = 500,
    seed: int = 0,
    bandwidth: float | None = None,
    limit: int = 2000,
) -> MMDTest:
    """Test whether two sets of embeddings come from one distribution.

    Args:
        a: Shape [N, d], N at least 2.
        b: Shape [M, d], M at least 2, of the same model and modality.
        permutations: Relabellings of the pooled rows; the p value is no finer than
            1 / (permutations + 1).
        seed: Of relabellings and of the choice of rows.
        bandwidth: Of the kernel exp(-||x - y||^2 / (2 bandwidth^2)); the median distance of pooled
            rows if not given, which does not depend on the labels.
        limit: Most rows taken of each set, at random; the kernel needs (2 limit)^2 numbers.

    Raises:
        ShapeError: If shapes do not fit.
        InputError: If there are too few rows, all are equal, or an option is out of range.
        NonFiniteError: If a row holds NaN or infinite values.
    """
    if permutations < 19 or limit < 2:
        raise InputError(
            f"permutations must be at least 19 and limit at least 2, they are {permutations!r} and "
            f"{limit!r}."
        )
    generator = torch.Generator().manual_seed(seed)
    left, right = (_choose(embeddings(x, n, 2), limit, generator) for x, n in ((a, "a"), (b, "b")))
    same_width(left, right, ("a", "b"))
    pooled = torch.cat((left, right))
    squares = _squared_distances(pooled)
    if bandwidth is None:
        above = torch.triu_indices(len(pooled), len(pooled), 1, device=pooled.device)
        bandwidth = float(squares[above[0], above[1]].median().sqrt())
    if not bandwidth > 0.0:
        raise InputError("most rows of a and b are equal: give bandwidth, above 0.")
    kernel = (squares / (-2.0 * bandwidth**2)).exp_()
    kernel.fill_diagonal_(0.0)
    first = torch.zeros(permutations + 1, len(pooled), dtype=torch.float64)
    first[0, : len(left)] = 1.0
    for row in first[1:]:
        row[torch.randperm(len(pooled), generator=generator)[: len(left)]] = 1.0
    values = torch.cat([_unbiased(kernel, part) for part in torch.split(first.to(kernel), _BATCH)])
    # A relabelling that repeats the real one must not fall below it by rounding.
    reached = values[1:] >= values[0] - 1e-12
    return MMDTest(
        statistic=float(values[0]),
        p_value=(1 + int(reached.sum())) / (permutations + 1),
        permutations=permutations,
        bandwidth=bandwidth,
        rows=(len(left), len(right)),
    )


def _choose(x: Tensor, limit: int, generator: torch.Generator) -> Tensor:
    if len(x) <= limit:
        return x
    return x[torch.randperm(len(x), generator=generator)[:limit].sort().values.to(x.device)]


def _squared_distances(x: Tensor) -> Tensor:
    centred = x - x.mean(dim=0)  # distances stay, and the products below cancel less
    norms = centred.square().sum(dim=1)
    squares = norms[:, None] + norms[None] - 2.0 * centred @ centred.T
    return squares.clamp_min_(0.0).fill_diagonal_(0.0)


def _unbiased(kernel: Tensor, first: Tensor) -> Tensor:
    """Unbiased squared MMD for labels [P, N], 1 for the first set; the kernel's diagonal is 0."""
    second = 1.0 - first
    to_first = first @ kernel
    total = kernel.sum(dim=1)
    m, n = first.sum(dim=1), second.sum(dim=1)
    inside = (to_first * first).sum(dim=1)
    across = (to_first * second).sum(dim=1)
    outside = second @ total - across
    return inside / (m * (m - 1)) + outside / (n * (n - 1)) - 2.0 * across / (m * n)


@dataclass(frozen=True)
class DomainAUC:
    """How well a linear classifier tells two sets apart.

    Attributes:
        auc: Mean over the folds of the area under the ROC curve on rows it was not fitted to; 0.5
            is chance.
        folds: Of each fold.
        rows: Rows of each set.
    """

    auc: float
    folds: tuple[float, ...]
    rows: tuple[int, int]


def domain_auc(a: Rows, b: Rows, *, folds: int = 5, seed: int = 0) -> DomainAUC:
    """Cross-validate a logistic regression that tells the rows of two sets apart.

    Args:
        a: Shape [N, d], N at least ``folds``.
        b: Shape [M, d], M at least ``folds``.
        folds: Of the cross-validation, at least 2.
        seed: Of the split into folds.

    Raises:
        ShapeError: If shapes do not fit.
        InputError: If there are too few rows, or ``folds`` is below 2.
        NonFiniteError: If a row holds NaN or infinite values.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if folds < 2:
        raise InputError(f"folds must be at least 2, it is {folds!r}.")
    left, right = embeddings(a, "a", folds), embeddings(b, "b", folds)
    same_width(left, right, ("a", "b"))
    rows = torch.cat((left, right)).cpu().numpy()
    labels = torch.cat((torch.zeros(len(left)), torch.ones(len(right)))).long().numpy()
    found = []
    for train, test in StratifiedKFold(folds, shuffle=True, random_state=seed).split(rows, labels):
        # Few rows for many features: a strong penalty ranks better than none.
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
        model.fit(rows[train], labels[train])
        found.append(float(roc_auc_score(labels[test], model.decision_function(rows[test]))))
    return DomainAUC(sum(found) / folds, tuple(found), (len(left), len(right)))
