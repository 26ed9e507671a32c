"""What dividing embeddings by their norms does to their likelihood."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cmd_plugin.clip._checks import embeddings
from cmd_plugin.clip._shrinkage import Shrinkage
from cmd_plugin.clip.whitening import Whitening
from cmd_plugin.errors import InputError

__all__ = ["NormalizationEffect", "normalization_effect"]


@dataclass(frozen=True)
class NormalizationEffect:
    """Leave-one-out scores of rows as they are, and divided by their norms (Mahalanobis++).

    Attributes:
        raw: Squared whitened norm of each row as it is, shape [N], float64.
        l2: Of the unit vectors, shape [N], float64.
        rank_correlation: Spearman's, of the two; 1 where both rank alike.
        rarest_in_common: Share of the rarest rows by one that are among the rarest by the other.
        rarest: How many rows that were.
        norm_variation: Standard deviation of the norms over their mean; 0 for normalised rows.
    """

    raw: Tensor
    l2: Tensor
    rank_correlation: float
    rarest_in_common: float
    rarest: int
    norm_variation: float


def normalization_effect(
    x: Tensor, *, shrinkage: Shrinkage = "auto", floor: float = 1e-6, rarest: float = 0.05
) -> NormalizationEffect:
    """Score rows by whitenings fitted to them as they are and divided by their norms.

    Args:
        x: Raw embeddings, shape [N, d].
        shrinkage: Of both, see :meth:`Whitening.fit`.
        floor: Of both.
        rarest: Share of the rows that counts as rarest, in (0, 1].

    Raises:
        ShapeError: If ``x`` is no matrix.
        InputError: If there are too few rows, or one is zero.
        NonFiniteError: If a row holds NaN or infinite values.
    """
    if not 0.0 < rarest <= 1.0:
        raise InputError(f"rarest must be above 0 and at most 1, it is {rarest!r}.")
    wide = embeddings(x, "x", least=3)
    raw, l2 = (
        Whitening.fit(
            wide,
            shrinkage=shrinkage,
            floor=floor,
            normalize=normalize,
        ).leave_one_out(wide)
        for normalize in ("raw", "l2")
    )
    count = max(1, round(rarest * len(wide)))
    common = torch.isin(raw.topk(count).indices, l2.topk(count).indices)
    norms = wide.norm(dim=1)
    return NormalizationEffect(
        raw=raw,
        l2=l2,
        rank_correlation=float(torch.corrcoef(torch.stack([_ranks(raw), _ranks(l2)]))[0, 1]),
        rarest_in_common=float(common.double().mean()),
        rarest=count,
        norm_variation=float(norms.std() / norms.mean()),
    )


def _ranks(values: Tensor) -> Tensor:
    return values.argsort(stable=True).argsort(stable=True).double()
