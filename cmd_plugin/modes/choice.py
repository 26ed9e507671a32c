"""From sampled trajectories to modes: drop constant ones, cluster, pick references, profiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cmd_plugin.errors import InputError
from cmd_plugin.kernels.assign_and_fit.reference import UNIT_ROUNDOFF
from cmd_plugin.modes.clustering import (
    choose_references,
    cluster_correlations,
    correlation_matrix,
)
from cmd_plugin.runs.process import own_threads

__all__ = [
    "MAX_MODES",
    "PROFILES",
    "ModeChoice",
    "check_modes",
    "check_profile",
    "choose_modes",
    "moving_rows",
]

MAX_MODES = 256  # a mode is stored in one byte
PROFILES = ("reference", "mean")


def check_modes(modes: int) -> None:
    """Raise InputError unless ``modes`` is a whole number in 1..256."""
    if isinstance(modes, bool) or not isinstance(modes, int) or not 1 <= modes <= MAX_MODES:
        raise InputError(f"modes must be a whole number from 1 to {MAX_MODES}, got {modes!r}.")


def check_profile(profile: str) -> None:
    """Raise InputError unless ``profile`` is one of :data:`PROFILES`."""
    if profile not in PROFILES:
        raise InputError(f"profile must be one of {', '.join(PROFILES)}, got {profile!r}.")


@dataclass(frozen=True)
class ModeChoice:
    """Modes as found on the sampled weights.

    A mode's profile is a weighted sum of weights, so it can be followed online.

    Attributes:
        references: [M] int64 flat index of each mode's reference weight.
        members: [P] int64 flat indices of the weights that make the profiles.
        member_mode: [P] int64 mode of each.
        member_weight: [P] float64 coefficient of each.
        correlation: [K', K'] float64 |correlation| of the moving samples.
        labels: [K'] int64 mode of each moving sample.
    """

    references: Tensor
    members: Tensor
    member_mode: Tensor
    member_weight: Tensor
    correlation: Tensor | None = None
    labels: Tensor | None = None

    @classmethod
    def of_references(
        cls, references: Tensor, correlation: Tensor | None = None, labels: Tensor | None = None
    ) -> ModeChoice:
        """Return the modes whose profiles are the reference weights [M] themselves."""
        count = references.numel()
        ones = torch.ones(count, dtype=torch.float64)
        return cls(references, references, torch.arange(count), ones, correlation, labels)

    @property
    def modes(self) -> int:
        """Number of modes M."""
        return self.references.numel()

    def profile(self, values: Tensor) -> Tensor:
        """Return the modes' values [M, ...] float64 from those of the members [P, ...] float64."""
        shape = (-1,) + (1,) * (values.ndim - 1)
        out = torch.zeros((self.modes, *values.shape[1:]), dtype=torch.float64)
        return out.index_add_(0, self.member_mode, values * self.member_weight.view(shape))


def moving_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return which trajectories [K, T] float64 move, [K] bool.

    A row is constant when its squared deviations sum to at most ``T (4 u |mean|)^2``, u the unit
    roundoff of ``dtype``: rounding of a constant in ``dtype`` can do that. (For such a row the mean
    is its largest magnitude.) So is a row whose squares a float32 could not hold: as a reference it
    would ask for infinite scales.
    """
    mean = rows.mean(dim=1)
    total = (rows - mean[:, None]).square().sum(dim=1)
    floor = rows.shape[1] * (4 * UNIT_ROUNDOFF[dtype] * mean).square()
    return total > floor.clamp_(min=torch.finfo(torch.float32).tiny)


def choose_modes(
    rows: Tensor, samples: Tensor, modes: int, profile: str, dtype: torch.dtype
) -> ModeChoice:
    """Find at most ``modes`` modes among the sampled trajectories.

    Constant rows are dropped before clustering: they would form a mode of their own, or correlate
    by rounding. With fewer moving rows than ``modes`` there are that many modes; with none, none.

    Args:
        rows: [K, T] float64 trajectories of the sampled weights. On a GPU, correlations and
            distances are computed there, and ``correlation`` stays there.
        samples: [K] int64 their flat indices, CPU.
        modes: Largest number of modes.
        profile: ``"reference"`` follows the reference weight (the paper). ``"mean"`` follows the
            mean of the mode's sampled weights, each centred, scaled to the reference's standard
            deviation and turned to its sign (beyond the paper; signs and scales are frozen at the
            fit).
        dtype: Dtype the weights came in, for the test of constancy.

    Raises:
        InputError: If ``profile`` is unknown.
    """
    check_profile(profile)
    # On one thread: of hundreds of small parallel regions each would wait for the slowest thread.
    with own_threads(1):
        return _choose(rows, samples, modes, profile, dtype)


def _choose(
    rows: Tensor, samples: Tensor, modes: int, profile: str, dtype: torch.dtype
) -> ModeChoice:
    moving = moving_rows(rows, dtype)
    rows, samples = rows[moving], samples[moving.cpu()]
    if not samples.numel():
        return ModeChoice.of_references(samples)
    correlation = correlation_matrix(rows)
    labels = cluster_correlations(correlation, modes)
    chosen = choose_references(correlation, labels)
    references, rows = samples[chosen], rows.cpu()
    if profile == "reference":
        return ModeChoice.of_references(references, correlation, labels)
    centred = rows - rows.mean(dim=1, keepdim=True)
    leader = centred[chosen][labels]
    sign = torch.where((centred * leader).sum(dim=1) < 0, -1.0, 1.0).double()
    size = torch.bincount(labels).double()[labels]
    weight = sign * leader.norm(dim=1) / (centred.norm(dim=1) * size)
    return ModeChoice(references, samples, labels, weight, correlation, labels)
