"""Whether features are normally distributed: Anderson-Darling and D'Agostino-Pearson.

Both judge each feature alone. Features may pass one by one while their joint law is far from
normal, and averages over small groups pass more often than the whole: the group size belongs to
every pass rate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cmd_plugin.clip._checks import embeddings
from cmd_plugin.clip._rows import Rows
from cmd_plugin.errors import InputError

__all__ = ["Normality", "normality"]

_CRITICAL = 0.752  # Anderson-Darling at 5 %, mean and variance estimated (Stephens 1974)
_LEVEL = 0.05
_LEAST = 20  # the kurtosis test of D'Agostino-Pearson warns below


@dataclass(frozen=True)
class Normality:
    """Tests of normality of each feature, averaged over groups of rows.

    Attributes:
        anderson: Anderson-Darling statistic, shape [d], float64; about 0.387 for normal data.
        dagostino: p value of D'Agostino-Pearson's K^2, shape [d], float64, in [0, 1].
        group_size: Rows in a group.
        groups: Number of groups; 1 is the whole sample.
    """

    anderson: Tensor
    dagostino: Tensor
    group_size: int
    groups: int

    @property
    def anderson_pass(self) -> float:
        """Share of features whose mean statistic is below 0.752."""
        return float((self.anderson < _CRITICAL).double().mean())

    @property
    def dagostino_pass(self) -> float:
        """Share of features whose mean p value is above 0.05."""
        return float((self.dagostino > _LEVEL).double().mean())


def normality(x: Rows, group_size: int | None = None, seed: int = 0) -> Normality:
    """Test each feature for normality.

    Args:
        x: Embeddings, whitened ones as a rule, shape [N, d], N at least 20. Their basis matters
            (the paper tests principal components).
        group_size: Rows of a group, at least 20; results are means over the groups of a random
            split, rows that fill no group left out. None takes all rows as one group.
        seed: Of the split.

    Raises:
        ShapeError: If ``x`` is no matrix.
        InputError: If there are too few rows, or a feature is constant in a group.
        NonFiniteError: If a row holds NaN or infinite values.
    """
    wide = embeddings(x, "x", least=_LEAST).cpu()
    size = len(wide) if group_size is None else group_size
    if not _LEAST <= size <= len(wide):
        raise InputError(f"group_size must be {_LEAST} to {len(wide)} (the rows), it is {size!r}.")
    groups = len(wide) // size
    if groups > 1:
        generator = torch.Generator().manual_seed(seed)
        wide = wide[torch.randperm(len(wide), generator=generator)]
    parts = wide[: groups * size].view(groups, size, -1)
    spread = parts.std(dim=1, keepdim=True)
    constant = int((spread == 0).any(dim=0).sum())
    if constant:
        raise InputError(f"{constant} features do not vary in a group: leave them out.")
    standard = (parts - parts.mean(dim=1, keepdim=True)) / spread
    return Normality(
        anderson=_anderson_darling(standard).mean(dim=0),
        dagostino=_dagostino(standard).mean(dim=0),
        group_size=size,
        groups=groups,
    )


def _anderson_darling(z: Tensor) -> Tensor:
    """A^2 of standardised samples [G, n, d], shape [G, d]."""
    ordered, count = z.sort(dim=1).values, z.shape[1]
    # log(1 - Phi(z)) as log Phi(-z), which does not cancel in the upper tail.
    both = torch.special.log_ndtr(ordered) + torch.special.log_ndtr(-ordered.flip(1))
    weights = 2.0 * torch.arange(count, dtype=z.dtype).view(1, -1, 1) + 1.0
    statistic: Tensor = -count - (weights * both).sum(dim=1) / count
    return statistic


def _dagostino(z: Tensor) -> Tensor:
    """P value of K^2 of samples [G, n, d], shape [G, d]."""
    from scipy.stats import normaltest

    return torch.from_numpy(normaltest(z.numpy(), axis=1).pvalue)
