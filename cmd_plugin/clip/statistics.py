"""Mean, covariance and what shrinkage needs of features that come in batches, exact in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cmd_plugin.clip._rows import Rows, check_rows, row_blocks
from cmd_plugin.errors import InputError, StateMismatch
from cmd_plugin.runs.tensors import Schema

__all__ = ["Gaussian", "GaussianStatistics", "Normalize", "sums_over", "sums_size"]

Normalize = Literal["raw", "l2"]

_SCHEMA = Schema("gaussian-statistics", 1, "a file of GaussianStatistics")
_ROWS = 512  # rows widened to float64 at once: 3 MiB of 768 features, which stay in the cache
_STRIP = 192  # columns of the second moments taken at once, down to the diagonal only


class Gaussian(NamedTuple):
    """A mean and a covariance.

    Attributes:
        rows: Number of rows N they were estimated from.
        mean: [d] float64.
        covariance: [d, d] float64, unbiased (divided by N - 1).
    """

    rows: int
    mean: Tensor
    covariance: Tensor


class GaussianStatistics:
    r"""Sums over rows x, from which mean, covariance and shrinkage follow exactly.

    Sums are taken of :math:`y = x - K` with a shift K, the mean of the first batch, in float64, so
    that nothing cancels: on raw CLIP features float32 sums of x itself make negative eigenvalues.
    Besides :math:`\sum y` and :math:`\sum y y^T` are kept :math:`\sum \lVert y \rVert^2 y` and
    :math:`\sum \lVert y \rVert^4`, which is what Ledoit and Wolf's intensity takes to be exact
    without a second pass, and the sums of unit vectors and of norms, from which conformity follows.
    The memory is that of one [d, d] matrix, whatever the number of rows.

    Rows with NaN or infinite values are left out and counted in ``skipped``; with
    ``normalize="l2"`` so are rows of zeros, which have no direction.

    Args:
        dim: Number of features d.
        normalize: ``"raw"`` takes rows as they are, ``"l2"`` divides each by its norm first.
        about: What the rows are, text by name (model, weights, modality, encoder_dtype, ...); it
            goes into files, and statistics of different things do not merge.
        device: Where the sums are; batches are moved there. It needs float64.

    Attributes:
        skipped: Number of rows left out.
    """

    def __init__(
        self,
        dim: int,
        *,
        normalize: Normalize = "raw",
        about: Mapping[str, str] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if dim < 1:
            raise InputError(f"dim must be at least 1, got {dim}.")
        if normalize not in ("raw", "l2"):
            raise InputError(f"normalize must be raw or l2, got {normalize!r}.")
        self.dim, self.normalize = dim, normalize
        self.about = dict(about or {})
        self.rows = self.skipped = 0
        self._sums = sums_over(torch.zeros(sums_size(dim), dtype=torch.float64, device=device), dim)

    def update(self, x: Rows) -> None:
        """Take rows in.

        Args:
            x: [B, d] of any floating dtype, on any device; a ``numpy.memmap`` is read in blocks.

        Raises:
            ShapeError: If they are not floating [B, d].
        """
        check_rows(x, self.dim)
        for block in row_blocks(x, _ROWS):
            self._add(block)
        lower = self._sums["second"].tril()
        torch.add(lower, lower.tril(-1).T, out=self._sums["second"])

    def _add(self, block: Tensor) -> None:
        sums = self._sums
        y = block.to(sums["shift"].device, torch.float64, copy=True)
        norm = torch.linalg.vector_norm(y, dim=1)
        good = norm.isfinite() if self.normalize == "raw" else norm.isfinite() & (norm > 0)
        kept = int(good.sum())
        self.skipped += len(y) - kept
        if not kept:
            return
        if kept < len(y):
            y, norm = y[good], norm[good]
        inverse = torch.where(norm > 0, 1 / norm, 0.0)
        if self.normalize == "l2":
            y *= inverse[:, None]
            norm, inverse = torch.ones_like(norm), torch.ones_like(norm)
        if not self.rows:
            sums["shift"].copy_(y.mean(dim=0))
        self.rows += kept
        sums["norms"] += norm.sum()
        y -= sums["shift"]
        square = torch.linalg.vector_norm(y, dim=1).square_()
        first, third, units = torch.stack([torch.ones_like(square), square, inverse]) @ y
        sums["first"] += first
        sums["third"] += third
        sums["units"] += units + inverse.sum() * sums["shift"]
        for left in range(0, self.dim, _STRIP):
            right = left + _STRIP
            sums["second"][left:right, :right].addmm_(y[:, left:right].T, y[:, :right])
        sums["fourth"] += square.dot(square)

    @classmethod
    def over(cls, state: Tensor, dim: int, *, normalize: Normalize = "raw") -> GaussianStatistics:
        """Return statistics whose sums are kept in a vector of somebody else's.

        Args:
            state: [2 + :func:`sums_size`] float64: rows, skipped, sums. The sums are updated in
                place; the first two numbers are not.
            dim: Number of features d.
            normalize: As of the class.
        """
        statistics = cls(1, normalize=normalize)
        statistics.dim = dim
        statistics.rows, statistics.skipped = int(state[0]), int(state[1])
        statistics._sums = sums_over(state[2:], dim)
        return statistics

    def merge(self, other: GaussianStatistics) -> None:
        """Take in the rows of other statistics; neither order nor grouping matters.

        Raises:
            StateMismatch: If they are of other features, or otherwise normalised.
        """
        ours, theirs = self._config(), other._config()
        if ours != theirs:
            raise StateMismatch(f"statistics of {ours} and of {theirs} cannot be merged.")
        self.skipped += other.skipped
        if not other.rows:
            return
        device = self._sums["shift"].device
        taken = {name: value.to(device) for name, value in other._sums.items()}
        if not self.rows:
            self._sums["shift"].copy_(taken["shift"])
        moved = _about_shift(other.rows, taken, self._sums["shift"])
        for name, value in self._sums.items():
            if name != "shift":
                value += moved[name]
        self.rows += other.rows

    @property
    def mean(self) -> Tensor:
        """Mean [d] float64.

        Raises:
            InputError: If there are no rows.
        """
        self._require(1)
        return self._sums["shift"] + self._sums["first"] / self.rows

    @property
    def unit_mean(self) -> Tensor:
        """Mean of the rows divided by their norms, [d] float64; a row of zeros counts as zeros.

        Raises:
            InputError: If there are no rows.
        """
        self._require(1)
        return self._sums["units"] / self.rows

    @property
    def mean_norm(self) -> float:
        """Mean norm of the rows.

        Raises:
            InputError: If there are no rows.
        """
        self._require(1)
        return float(self._sums["norms"]) / self.rows

    def compute(self) -> Gaussian:
        """Return mean and covariance.

        Raises:
            InputError: If there are fewer than two rows.
        """
        self._require(2)
        return Gaussian(self.rows, self.mean, self.central()["second"] / (self.rows - 1))

    def central(self) -> dict[str, Tensor]:
        r"""Return the sums about the mean, for z = x - mean.

        Returns:
            ``"second"`` :math:`\sum z z^T` [d, d], ``"third"`` :math:`\sum \lVert z \rVert^2 z`
            [d] and ``"fourth"`` :math:`\sum \lVert z \rVert^4`, float64.

        Raises:
            InputError: If there are no rows.
        """
        moved = _about_shift(self.rows, self._sums, self.mean)
        return {name: moved[name] for name in ("second", "third", "fourth")}

    def _require(self, rows: int) -> None:
        if self.rows < rows:
            raise InputError(
                f"the statistics hold {self.rows} rows ({self.skipped} skipped) and at least "
                f"{rows} are needed: update them with features first."
            )

    def _config(self) -> dict[str, Any]:
        return {"dim": self.dim, "normalize": self.normalize, "about": dict(self.about)}

    def state_dict(self) -> dict[str, Any]:
        """The state: tensors, numbers and text only."""
        counts = torch.tensor([self.rows, self.skipped])
        sums = {name: value.clone() for name, value in self._sums.items()}
        return {"config": self._config(), "counts": counts, **sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state of other statistics of the same kind.

        Raises:
            StateMismatch: If it does not fit; nothing has changed then.
        """
        if state.get("config") != self._config():
            raise StateMismatch(
                f"this is the state of {state.get('config')}, not of {self._config()}."
            )
        wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"counts": ((2,), torch.int64)}
        wanted.update({name: (shape, torch.float64) for name, shape in _shapes(self.dim).items()})
        for name, (shape, dtype) in wanted.items():
            value = state.get(name)
            if not isinstance(value, Tensor) or value.shape != shape or value.dtype != dtype:
                raise StateMismatch(f"the state's {name} is not {shape} {dtype}.")
            if not bool(value.isfinite().all()) or (name == "counts" and bool((value < 0).any())):
                raise StateMismatch(f"the state's {name} holds impossible values.")
        self.rows, self.skipped = state["counts"].tolist()
        for name, value in self._sums.items():
            value.copy_(state[name])

    def save(self, path: str | Path) -> None:
        """Write a safetensors file.

        Raises:
            InputError: If it cannot be written.
        """
        state = self.state_dict()
        config = json.dumps(state.pop("config"), sort_keys=True)
        _SCHEMA.save(path, state, {"config": config})

    @classmethod
    def load(cls, path: str | Path) -> GaussianStatistics:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: If the file is missing, damaged or something else.
        """
        tensors, metadata = _SCHEMA.load(path)
        try:
            config = json.loads(metadata["config"])
            statistics = cls(**config)
            statistics.load_state_dict({"config": config, **tensors})
        except (KeyError, TypeError, ValueError) as error:  # StateMismatch is a ValueError
            raise InputError(f"{path} is damaged ({error}): make it again.") from error
        return statistics


def _shapes(dim: int) -> dict[str, tuple[int, ...]]:
    return {
        "shift": (dim,),
        "first": (dim,),
        "second": (dim, dim),
        "third": (dim,),
        "fourth": (),
        "units": (dim,),
        "norms": (),
    }


def sums_size(dim: int) -> int:
    """Return how many numbers the sums over rows of ``dim`` features are."""
    return sum(math.prod(shape) for shape in _shapes(dim).values())


def sums_over(flat: Tensor, dim: int) -> dict[str, Tensor]:
    """Return the sums by name, each a view of its part of ``flat`` [:func:`sums_size`] float64."""
    shapes = _shapes(dim)
    parts = torch.split(flat, [math.prod(shape) for shape in shapes.values()])
    return {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}


def _about_shift(rows: int, sums: Mapping[str, Tensor], shift: Tensor) -> dict[str, Tensor]:
    r"""Return the sums about another shift: those of :math:`y + \delta`, from those of y.

    With :math:`q = \lVert y \rVert^2` and :math:`q' = q + 2 \delta \cdot y + \delta^2`; of the
    second moments this is Chan, Golub and LeVeque's formula.
    """
    delta = sums["shift"] - shift
    first, second, third = sums["first"], sums["second"], sums["third"]
    size, along = delta.dot(delta), delta.dot(first)
    total = second.trace()
    turned = second @ delta
    cross = torch.outer(first, delta)
    return {
        **sums,
        "shift": shift,
        "first": first + rows * delta,
        "second": second + cross + cross.T + rows * torch.outer(delta, delta),
        "third": third
        + total * delta
        + 2 * turned
        + size * first
        + (2 * along + rows * size) * delta,
        "fourth": sums["fourth"]
        + 4 * (delta.dot(turned) + delta.dot(third) + size * along)
        + 2 * size * total
        + rows * size * size,
    }
