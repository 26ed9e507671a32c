"""torchmetrics faces: the Gaussian of features over batches and processes, and their likelihood."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from cmd_plugin.clip._shrinkage import Shrinkage
from cmd_plugin.clip.statistics import Gaussian, GaussianStatistics, Normalize, sums_size
from cmd_plugin.clip.whitening import Basis, Whitening
from cmd_plugin.errors import InputError

__all__ = ["FeatureGaussian", "WhitenedLikelihood"]


class FeatureGaussian(Metric):
    """Mean and covariance of features, exact over batches and processes.

    The state is that of :class:`GaussianStatistics`, one vector of float64 whose reduction adds the
    sums of processes after bringing them to one shift. It stays float64 whatever the dtype of the
    module it is in; a device without float64 cannot hold it. A ``DistributedSampler`` pads with
    repeated rows, which count as rows: drop them, or the last batch.

    Args:
        dim: Number of features d.
        normalize: ``"raw"``, or ``"l2"`` to divide every row by its norm first.
        **kwargs: Passed to torchmetrics' ``Metric``.
    """

    full_state_update = False
    higher_is_better = None
    is_differentiable = False
    state: Tensor

    def __init__(self, dim: int, *, normalize: Normalize = "raw", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        GaussianStatistics(1, normalize=normalize)  # refuses what it does not know
        if dim < 1:
            raise InputError(f"dim must be at least 1, got {dim}.")
        self.dim, self.normalize = dim, normalize
        empty = torch.zeros(2 + sums_size(dim), dtype=torch.float64)
        self.add_state("state", empty, dist_reduce_fx=partial(_join, dim=dim))

    def update(self, x: Tensor) -> None:
        """Take rows in.

        Args:
            x: [B, d], floating; rows that are not finite are skipped and counted.

        Raises:
            ShapeError: If they are not floating [B, d].
        """
        statistics = self._statistics()
        statistics.update(x)
        self.state[0], self.state[1] = statistics.rows, statistics.skipped

    def compute(self) -> Gaussian:
        """Return mean and covariance.

        Raises:
            InputError: If there are fewer than two rows.
        """
        return self._statistics().compute()

    def whitening(self, basis: Basis = "pca", *, shrinkage: Shrinkage = "auto") -> Whitening:
        """Return the whitening of all rows, of all processes if they are in step.

        Args:
            basis: Of its coordinates.
            shrinkage: As of :meth:`Whitening.fit`.

        Raises:
            InputError: If there are too few rows.
        """
        with self.sync_context(should_sync=self._to_sync, should_unsync=self._should_unsync):
            total = self.state.clone()
        statistics = GaussianStatistics.over(total, self.dim, normalize=self.normalize)
        return Whitening.fit(statistics, basis, shrinkage=shrinkage)

    def _statistics(self) -> GaussianStatistics:
        """Return the statistics over the state, whose sums they update in place."""
        return GaussianStatistics.over(self.state, self.dim, normalize=self.normalize)

    def set_dtype(self, dst_type: str | torch.dtype) -> FeatureGaussian:  # noqa: ARG002
        """Do nothing: sums in fewer bits than float64 have negative eigenvalues."""
        return self


class WhitenedLikelihood(Metric):
    """Mean log-likelihood of features under a whitening, such as of generated images.

    Args:
        whitening: Fitted to features of the same network and modality.
        **kwargs: Passed to torchmetrics' ``Metric``.

    Attributes:
        whitening: As given.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    total: Tensor
    rows: Tensor

    def __init__(self, whitening: Whitening, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.whitening = whitening
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("rows", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, x: Tensor) -> None:
        """Score rows.

        Args:
            x: [B, d], floating; rows that are not finite are skipped.

        Raises:
            ShapeError: If they are not floating [B, d].
        """
        scores = self.whitening.log_likelihood(x).double()
        good = ~scores.isnan()
        self.total += scores[good].sum().to(self.total.device)
        self.rows += good.sum().to(self.rows.device)

    def compute(self) -> Tensor:
        """Return the mean, float64; NaN if there are no rows."""
        return self.total / self.rows

    def set_dtype(self, dst_type: str | torch.dtype) -> WhitenedLikelihood:  # noqa: ARG002
        """Do nothing: sums stay float64."""
        return self


def _join(states: Tensor, dim: int) -> Tensor:
    """Return the state of all rows of several states [n, L]; the last one's shift is kept."""
    total: Tensor = states[-1].clone()
    statistics = GaussianStatistics.over(total, dim)
    for state in states[:-1]:
        statistics.merge(GaussianStatistics.over(state, dim))
    total[0], total[1] = statistics.rows, statistics.skipped
    return total
