"""The scikit-learn face of whitening."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from cmd_plugin.clip._shrinkage import Shrinkage
from cmd_plugin.clip.statistics import GaussianStatistics, Normalize
from cmd_plugin.clip.whitening import Basis, Whitening

__all__ = ["Whitener"]

_Array = NDArray[np.floating[Any]]


class Whitener(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """:class:`Whitening` as a transformer and density of scikit-learn.

    ``fit`` also gathers the reference of :meth:`percentile`. After ``partial_fit`` the whitening is
    made when it is first asked for.

    Args:
        basis: ``"pca"``, ``"zca"`` or ``"cholesky"``.
        shrinkage: ``"auto"``, ``"none"``, ``"oas"``, ``"ledoit-wolf"`` or an intensity.
        floor: Least variance of a direction as a share of the largest.
        n_components: How many directions are kept; None keeps all.
        normalize: ``"raw"``, or ``"l2"`` to divide every row by its norm first.

    Attributes:
        statistics_: :class:`GaussianStatistics` of all rows.
        whitening_: The :class:`Whitening`.
        mean_: [d].
        components_: [r, d] directions kept.
        eigenvalues_: [d] of the sample covariance.
        intensity_: Weight of the identity in the shrunk covariance.
        noise_floor_count_: How many variances were raised to the floor.
        n_samples_seen_: Number of rows.
    """

    _whitening: Whitening | None

    def __init__(
        self,
        basis: Basis = "pca",
        *,
        shrinkage: Shrinkage = "auto",
        floor: float = 1e-6,
        n_components: int | None = None,
        normalize: Normalize = "raw",
    ) -> None:
        self.basis = basis
        self.shrinkage = shrinkage
        self.floor = floor
        self.n_components = n_components
        self.normalize = normalize

    def fit(self, X: ArrayLike, y: object = None) -> Whitener:  # noqa: ARG002
        """Fit to rows [N, d].

        Raises:
            ValueError: If they cannot be used, or are too few.
        """
        rows = self._rows(X, reset=True, ensure_min_samples=2)
        self._gather(rows, afresh=True)
        fitted = self.whitening_
        self._whitening = fitted.calibrate(rows) if fitted.leaves_one_out else fitted
        return self

    def partial_fit(self, X: ArrayLike, y: object = None) -> Whitener:  # noqa: ARG002
        """Take more rows [N, d] in.

        Raises:
            ValueError: If they cannot be used.
        """
        afresh = not hasattr(self, "statistics_")
        self._gather(self._rows(X, reset=afresh), afresh=afresh)
        return self

    def transform(self, X: ArrayLike) -> _Array:
        """Return the coordinates of rows, [N, k]."""
        check_is_fitted(self)
        coordinates: _Array = self.whitening_.transform(self._rows(X)).numpy()
        return coordinates

    def inverse_transform(self, X: ArrayLike) -> _Array:
        """Return the rows of coordinates [N, k].

        Raises:
            ValueError: If directions were dropped.
        """
        check_is_fitted(self)
        coordinates = np.asarray(X)
        if not np.issubdtype(coordinates.dtype, np.floating):
            coordinates = coordinates.astype(np.float64)
        rows: _Array = self.whitening_.inverse(torch.from_numpy(np.array(coordinates))).numpy()
        return rows

    def score_samples(self, X: ArrayLike) -> _Array:
        """Return the log-density of every row within the directions kept, [N].

        Where all are kept it is :meth:`Whitening.log_density`.
        """
        check_is_fitted(self)
        fitted = self.whitening_
        likelihood: _Array = fitted.log_likelihood(self._rows(X)).numpy()
        return likelihood - 0.5 * fitted.logdet

    def score(self, X: ArrayLike, y: object = None) -> float:  # noqa: ARG002
        """Return the mean log-density of rows, by which shrinkage can be chosen."""
        return float(self.score_samples(X).mean())

    def squared_norm(self, X: ArrayLike) -> _Array:
        """Return the squared Mahalanobis distance of every row, [N]."""
        check_is_fitted(self)
        squared: _Array = self.whitening_.squared_norm(self._rows(X)).numpy()
        return squared

    def leave_one_out(self, X: ArrayLike) -> _Array:
        """Return the squared distance of every row of the fit to the others, [N]."""
        check_is_fitted(self)
        squared: _Array = self.whitening_.leave_one_out(self._rows(X)).numpy()
        return squared

    def percentile(self, X: ArrayLike) -> _Array:
        """Return how usual rows are that were not in the fit, in percent; 100 is the most usual.

        Raises:
            ValueError: If the whitening has no reference, as after ``partial_fit``.
        """
        check_is_fitted(self)
        fitted = self.whitening_
        share: _Array = fitted.percentile(fitted.squared_norm(self._rows(X))).numpy()
        return share

    @property
    def whitening_(self) -> Whitening:
        """The whitening of all rows so far."""
        check_is_fitted(self, "statistics_")
        if self._whitening is None:
            self._whitening = Whitening.fit(
                self.statistics_,
                self.basis,
                shrinkage=self.shrinkage,
                floor=self.floor,
                rank=self.n_components,
            )
        return self._whitening

    @property
    def mean_(self) -> _Array:
        """Mean of the rows, [d]."""
        mean: _Array = self.whitening_.mean.numpy()
        return mean

    @property
    def components_(self) -> _Array:
        """Directions kept, [r, d]."""
        components: _Array = self.whitening_.vectors.T.numpy()
        return components

    @property
    def eigenvalues_(self) -> _Array:
        """Eigenvalues of the sample covariance, [d]."""
        values: _Array = self.whitening_.eigenvalues.numpy()
        return values

    @property
    def intensity_(self) -> float:
        """Weight of the identity in the shrunk covariance."""
        return self.whitening_.intensity

    @property
    def noise_floor_count_(self) -> int:
        """How many variances were raised to the floor."""
        return self.whitening_.floored

    @property
    def n_samples_seen_(self) -> int:
        """Number of rows so far."""
        return self.statistics_.rows

    @property
    def _n_features_out(self) -> int:
        return self.whitening_.matrix.shape[1]

    def _gather(self, rows: _Array, *, afresh: bool) -> None:
        self._whitening = None
        if afresh:
            self.statistics_ = GaussianStatistics(rows.shape[1], normalize=self.normalize)
        self.statistics_.update(rows)

    def _rows(self, X: ArrayLike, *, reset: bool = False, **options: Any) -> _Array:
        kinds = [np.float64, np.float32]
        rows: _Array = validate_data(self, X, dtype=kinds, reset=reset, **options)
        return rows
