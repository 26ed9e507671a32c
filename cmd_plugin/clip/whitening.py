"""Whitening: features of a network in coordinates of unit variance, and how likely each row is.

Betser, Levi, Gilboa: *Whitened CLIP as a Likelihood Surrogate of Images and Captions* (ICML 2025).
Features are taken raw, before any normalisation, one whitening for each modality. The likelihood is
a surrogate: single coordinates look normal, the norm does not (its square is spread some thirty
times as wide as a chi-square's), so that rows are ranked by percentiles of leave-one-out scores and
no p-values are given. Independent implementation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cmd_plugin import __version__
from cmd_plugin.clip._estimation import (
    Spectrum,
    estimate,
    gather,
    replace_correlated,
    scores_without,
)
from cmd_plugin.clip._rows import Rows, check_rows, row_blocks
from cmd_plugin.clip._shrinkage import Shrinkage, check_shrinkage
from cmd_plugin.clip.statistics import GaussianStatistics, Normalize
from cmd_plugin.errors import InputError, ShapeError
from cmd_plugin.kernels.mahalanobis import mahalanobis
from cmd_plugin.runs.tensors import Schema

__all__ = ["Basis", "Whitening"]

Basis = Literal["pca", "zca", "cholesky"]

_SCHEMA = Schema("whitening", 1, "a Whitening")
_BLOCK = 16384  # rows scored at once
_REFERENCE = 16384  # reference scores kept at most


@dataclass(frozen=True, eq=False)
class Whitening:
    r"""A Gaussian fitted to features, as coordinates y = (x - mean) @ matrix of unit variance.

    Make one with :meth:`fit`, :meth:`load` or :func:`cmd_plugin.clip.import_wclip`.

    Scores do not depend on the basis: with the sample covariance's eigenvectors V and regularised
    variances :math:`\Lambda`, ``"pca"`` is :math:`V \Lambda^{-1/2}`, ``"zca"`` is
    :math:`V \Lambda^{-1/2} V^T`, nearest to the features themselves, and ``"cholesky"`` is
    triangular: the transpose of :math:`L^{-1}` for the covariance :math:`L L^T`.

    Features in float32 or below are centred and scored in float32, those in float64 in float64.

    Attributes:
        mean: [d] float64.
        vectors: [d, r] float64, columns of norm 1: the eigenvectors that are kept, of each the
            entry of largest size positive.
        variances: [r] float64, the variances they are divided by, descending: shrunk and floored.
        eigenvalues: [d] float64, those of the sample covariance (divided by N - 1), descending.
        rank: Number of directions that are told apart, at most r.
        rows: Number of rows N of the fit; 0 if unknown.
        basis: ``"pca"``, ``"zca"`` or ``"cholesky"``.
        shrinkage: ``"none"``, ``"oas"``, ``"ledoit-wolf"`` or ``"given"``.
        intensity: Weight of the identity in the shrunk covariance, in [0, 1].
        floored: How many variances were raised to the floor.
        normalize: ``"raw"``, or ``"l2"`` where rows are divided by their norms first.
        about: What the features are, text by name.
        reference: [n] float64, ascending squared norms of rows that stand for the usual; see
            :meth:`calibrate`. None if there are none yet.
    """

    mean: Tensor = field(repr=False)
    vectors: Tensor = field(repr=False)
    variances: Tensor = field(repr=False)
    eigenvalues: Tensor = field(repr=False)
    rank: int
    rows: int = 0
    basis: Basis = "pca"
    shrinkage: str = "none"
    intensity: float = 0.0
    floored: int = 0
    normalize: Normalize = "raw"
    about: Mapping[str, str] = field(default_factory=dict)
    reference: Tensor | None = field(default=None, repr=False)
    _third: Tensor | None = field(default=None, repr=False)
    _fourth: float = field(default=0.0, repr=False)

    @classmethod
    def fit(
        cls,
        x: Rows | GaussianStatistics,
        basis: Basis = "pca",
        *,
        shrinkage: Shrinkage = "auto",
        floor: float = 1e-6,
        rank: int | None = None,
        normalize: Normalize | None = None,
        legacy_noise: bool = False,
        about: Mapping[str, str] | None = None,
    ) -> Whitening:
        """Fit to features, or to statistics that were gathered from them.

        Features themselves also give the leave-one-out reference of :meth:`percentile`; after
        statistics call :meth:`calibrate`.

        Args:
            x: Features [N, d] or their statistics. Rows that are not finite are left out.
            basis: Of the coordinates; see the class.
            shrinkage: ``"none"``, ``"oas"`` (Chen et al.), ``"ledoit-wolf"``, an intensity in
                [0, 1], or ``"auto"``: none from ten rows a feature on, OAS with a warning below.
            floor: Least variance of a direction as a share of the largest; smaller ones, which at
                1e-6 are within float32's rounding of the largest, are raised to it and counted.
            rank: Keep this many directions, those of largest variance; None keeps all.
            normalize: ``"l2"`` divides each row by its norm, here and in every score (the practice
                of Mahalanobis++); None means ``"raw"``, or what the statistics have.
            legacy_noise: The released code's step before the covariance: of two features
                correlated above 0.9 the later one is replaced by noise of standard deviation 0.1,
                in the fit only. Needs features, in memory.
            about: What the features are, text by name; None means what the statistics say.

        Raises:
            InputError: If there are too few rows, or an argument is out of range.
            ShapeError: If features are not floating [N, d].
        """
        check_shrinkage(shrinkage)
        if basis not in ("pca", "zca", "cholesky"):
            raise InputError(f"basis must be pca, zca or cholesky, got {basis!r}.")
        if not 0.0 <= floor < 1.0:
            raise InputError(f"floor must be in [0, 1), got {floor}.")
        mean = None
        if legacy_noise:
            x, mean = replace_correlated(x)
        statistics = gather(x, normalize, about)
        if rank is not None and not 1 <= rank <= statistics.dim:
            raise InputError(
                f"rank must be in 1..{statistics.dim}, the number of features, got {rank}."
            )
        spectrum = estimate(statistics, shrinkage, floor, rank)
        fitted = cls(
            mean=statistics.mean.cpu() if mean is None else mean,
            vectors=spectrum.vectors,
            variances=spectrum.variances,
            eigenvalues=spectrum.eigenvalues,
            rank=len(spectrum.variances),
            rows=spectrum.rows,
            basis=basis,
            shrinkage=spectrum.shrinkage,
            intensity=spectrum.intensity,
            floored=spectrum.floored,
            normalize=statistics.normalize,
            about=dict(statistics.about if about is None else about),
            # Where features were replaced, the rows of the fit are others than those given.
            _third=spectrum.third if mean is None else None,
            _fourth=spectrum.fourth,
        )
        if isinstance(x, GaussianStatistics) or not fitted.leaves_one_out:
            return fitted
        return fitted.calibrate(x)

    @property
    def dim(self) -> int:
        """Number of features d."""
        return len(self.mean)

    @property
    def leaves_one_out(self) -> bool:
        """Whether a fit without one of its rows exists, so that :meth:`leave_one_out` does."""
        needed = 4 if self.intensity else self.rank + 3
        return self._third is not None and self.rows >= needed

    @cached_property
    def matrix(self) -> Tensor:
        """[d, k] float64: coordinates are ``(x - mean) @ matrix``; k is d for ``"zca"``, else r."""
        if self.basis == "cholesky":
            return self.triangle
        scaled: Tensor = self.vectors / self.variances.sqrt()
        return scaled @ self.vectors.T if self.basis == "zca" else scaled

    @cached_property
    def triangle(self) -> Tensor:
        """[d, r] float64, zero at [i, j] with i - j > d - r: the form in which rows are scored.

        It differs from the other forms by a rotation of the coordinates, and has half the numbers.
        """
        scaled = self.vectors / self.variances.sqrt()
        factor = torch.linalg.qr(scaled.flip(0).T, mode="r").R
        factor = factor * torch.where(factor.diagonal() < 0, -1.0, 1.0)[:, None]
        turned: Tensor = factor.T.flip(0, 1)
        return turned.triu(scaled.shape[1] - self.dim).contiguous()

    @cached_property
    def logdet(self) -> float:
        """Logarithm of the determinant of the regularised covariance, over the kept directions."""
        return float(self.variances.log().sum())

    def transform(self, x: Rows) -> Tensor:
        """Return the coordinates y of rows, [N, k] in float32 or float64.

        Args:
            x: Features [N, d]; not finite rows give NaN.

        Raises:
            ShapeError: If they are not floating [N, d].
        """
        return self._by_blocks(x, self._coordinates)

    def _coordinates(self, rows: Tensor) -> Tensor:
        wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
        return (rows.to(wide) - self.mean.to(rows.device, wide)) @ self.matrix.to(rows.device, wide)

    def inverse(self, y: Tensor) -> Tensor:
        """Return the rows whose coordinates are y: :meth:`transform` backwards.

        With ``normalize="l2"`` these are the rows after their division.

        Args:
            y: [N, k], floating.

        Raises:
            InputError: If directions were dropped or told twice, so that no inverse exists.
            ShapeError: If it is not floating [N, k].
        """
        if self.rank < self.dim:
            raise InputError(
                f"this whitening has rank {self.rank} of {self.dim} features, so that no inverse "
                "exists: fit one with all directions."
            )
        check_rows(y, self.matrix.shape[1])
        wide = torch.float64 if y.dtype == torch.float64 else torch.float32
        y = y.detach().to(wide)
        return y @ self._inverse_matrix.to(y) + self.mean.to(y)

    @cached_property
    def _inverse_matrix(self) -> Tensor:
        inverse: Tensor = torch.linalg.inv(self.matrix)
        return inverse

    def squared_norm(self, x: Rows) -> Tensor:
        r"""Return :math:`\lVert y \rVert^2` of every row, [N]: the squared Mahalanobis distance.

        Of the rows of the fit it is too small, by much where N is not far above d: see
        :meth:`leave_one_out`.

        Args:
            x: Features [N, d], also a ``numpy.memmap``; rows that are not finite give NaN.

        Raises:
            ShapeError: If they are not floating [N, d].
        """
        return self._by_blocks(x, self._norms)

    def _norms(self, rows: Tensor) -> Tensor:
        mean, triangle = self.mean.to(rows.device), self.triangle.to(rows.device)
        squared = mahalanobis(rows, mean, triangle, triangular=True)
        return torch.where(squared.isfinite(), squared, torch.nan)

    def log_likelihood(self, x: Rows) -> Tensor:
        r"""Return :math:`-(r \log 2 \pi + \lVert y \rVert^2) / 2` of every row, [N].

        The logarithm of the density of y, the score of the paper. It ranks rows within one
        whitening; between models, modalities or domains only :meth:`log_density` compares.

        Args:
            x: Features [N, d].

        Raises:
            ShapeError: If they are not floating [N, d].
        """
        return -0.5 * (self.vectors.shape[1] * math.log(2 * math.pi) + self.squared_norm(x))

    def log_density(self, x: Rows) -> Tensor:
        r"""Return the log-density of the fitted Gaussian, :meth:`log_likelihood` - logdet / 2, [N].

        Args:
            x: Features [N, d].

        Raises:
            InputError: If directions were dropped: there is no density then.
            ShapeError: If they are not floating [N, d].
        """
        if self.rank < self.dim:
            raise InputError(
                f"this whitening has rank {self.rank} of {self.dim} features, so that there is no "
                "density of x: use log_likelihood."
            )
        return self.log_likelihood(x) - 0.5 * self.logdet

    def leave_one_out(self, x: Rows) -> Tensor:
        r"""Return what :meth:`squared_norm` of each row would be, were the fit made without it.

        In closed form, for rows of the fit. The sample covariance without row i is that of all,
        scaled, minus a multiple of :math:`z z^T`; mean, shrinkage intensity (also OAS and Ledoit
        and Wolf's) and target follow from the sums, so that without floored or dropped directions
        the result is that of a fit without the row. What was floored or dropped stays so, and where
        directions were dropped the intensity stays too.

        Args:
            x: Features [N, d], rows of the fit: others give nonsense, and NaN where they are
                farther away than any row of the fit can be.

        Returns:
            [N] float64.

        Raises:
            InputError: If the rows of the fit are unknown or too few.
            ShapeError: If they are not floating [N, d].
        """
        if self._third is None or not self.leaves_one_out:
            raise InputError(
                f"there is no fit of rank {self.rank} without one of its {self.rows} rows: fit to "
                "features or statistics, with more rows, shrinkage or a smaller rank."
            )
        spectrum = Spectrum(
            self.eigenvalues,
            self.vectors,
            self.variances,
            self.shrinkage,
            self.intensity,
            self.floored,
            self.rows,
            self._third,
            self._fourth,
        )
        return self._by_blocks(
            x, lambda rows: scores_without(rows.double() - self.mean.to(rows.device), spectrum)
        )

    def calibrate(self, x: Rows, *, held_out: bool = False) -> Whitening:
        """Return this whitening with a reference for :meth:`percentile`.

        Of more than 16384 rows, that many are taken, evenly spaced.

        Args:
            x: Features [N, d]: rows of the fit, whose leave-one-out scores are the reference, or
                others.
            held_out: Whether they are others, on which nothing was fitted.

        Raises:
            InputError: If no row has a score, or leave-one-out scores do not exist.
            ShapeError: If they are not floating [N, d].
        """
        check_rows(x, self.dim)
        every = max(1, -(-len(x) // _REFERENCE))
        score = self.squared_norm if held_out else self.leave_one_out
        squared = score(x[::every]).double().cpu()
        squared = squared[squared.isfinite()]
        if not len(squared):
            raise InputError(
                "no row has a score: give rows of the fit that are finite, or held_out=True."
            )
        return replace(self, reference=squared.sort().values)

    def percentile(self, squared: Tensor) -> Tensor:
        """Return the share of the reference that is no likelier than each row, in percent.

        100 is the most usual. Rows of the fit go in as :meth:`leave_one_out`, others as
        :meth:`squared_norm`: then usual rows are uniform in 0 to 100.

        Args:
            squared: [N] squared norms.

        Returns:
            [N] float64 in (0, 100]; NaN stays NaN.

        Raises:
            InputError: If there is no reference.
        """
        if self.reference is None:
            raise InputError("this whitening has no reference: calibrate it with features first.")
        reference = self.reference.to(squared.device)
        wide = squared.double()
        below = torch.searchsorted(reference, wide.contiguous())
        share = (len(reference) - below + 1) / (len(reference) + 1)
        return torch.where(wide.isnan(), torch.nan, 100.0 * share.double())

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; its metadata say what is in it and how rows are multiplied.

        Raises:
            InputError: If it cannot be written.
        """
        tensors = {name: getattr(self, name) for name in _TENSORS}
        tensors["matrix"] = self.matrix
        tensors["third"], tensors["reference"] = self._third, self.reference
        config = {name: getattr(self, name) for name in _NUMBERS}
        _SCHEMA.save(
            path,
            {name: value for name, value in tensors.items() if value is not None},
            {
                "config": json.dumps({**config, "fourth": self._fourth}),
                "about": json.dumps(dict(self.about), sort_keys=True),
                "row_convention": "y = (x - mean) @ matrix",
                "ddof": "1",
                "library": f"cmd-plugin {__version__}",
            },
        )

    @classmethod
    def load(cls, path: str | Path) -> Whitening:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: If the file is missing, damaged or something else.
        """
        tensors, metadata = _SCHEMA.load(path)
        try:
            config = json.loads(metadata["config"])
            known: dict[str, Any] = {name: tensors[name] for name in _TENSORS}
            known.update({name: config[name] for name in _NUMBERS})
            read = cls(
                **known,
                about=json.loads(metadata["about"]),
                reference=tensors.get("reference"),
                _third=tensors.get("third"),
                _fourth=float(config["fourth"]),
            )
            read._check()
        except (KeyError, TypeError, ValueError) as error:  # ShapeError is a ValueError
            raise InputError(f"{path} is damaged ({error}): make it again.") from error
        return read

    def _check(self) -> None:
        dim, kept = self.vectors.shape
        shapes: dict[str, tuple[int, ...]] = {"vectors": (dim, kept), "mean": (dim,)}
        shapes.update(variances=(kept,), eigenvalues=(dim,))
        for name, shape in shapes.items():
            value = getattr(self, name)
            if value.shape != shape or value.dtype != torch.float64:
                raise ShapeError(f"{name} is not {shape} float64.")
        if not 1 <= self.rank <= kept <= dim or not bool((self.variances > 0).all()):
            raise ShapeError("its rank or variances are impossible.")

    def _by_blocks(self, x: Rows, work: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the results of ``work`` on blocks of rows, normalised as those of the fit."""
        check_rows(x, self.dim)
        done = [work(self._normalised(block)) for block in row_blocks(x, _BLOCK)]
        return torch.cat(done) if done else work(torch.empty(0, self.dim))

    def _normalised(self, rows: Tensor) -> Tensor:
        if self.normalize == "raw":
            return rows
        wide = rows if rows.dtype == torch.float64 else rows.float()
        norm: Tensor = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
        return wide / norm


_TENSORS = ("mean", "vectors", "variances", "eigenvalues")
_NUMBERS = ("rank", "rows", "basis", "shrinkage", "intensity", "floored", "normalize")
