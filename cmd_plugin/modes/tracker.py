"""The fitted state of online CMD: nine bytes a weight and a handful of numbers per mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite, ldexp
from typing import Any, TypedDict

import torch
from torch import Tensor
from typing_extensions import Required

from cmd_plugin.kernels import AffineFit, FlatView, reconstruct, swap_in, update_affine
from cmd_plugin.kernels.flat_view import BLOCK
from cmd_plugin.modes.ahead import Ahead, Numbers, Refused
from cmd_plugin.modes.choice import ModeChoice
from cmd_plugin.modes.decomposition import Decomposition
from cmd_plugin.modes.fit import explained_by_layer, sum_in_double, sum_of_squares
from cmd_plugin.modes.layout import Layout
from cmd_plugin.modes.settings import Settings
from cmd_plugin.modes.states import SavedState
from cmd_plugin.modes.tied import TiedWeights

__all__ = ["Evaluation", "Tracker"]


class Evaluation(TypedDict, total=False):
    """Keyword arguments of :func:`cmd_plugin.kernels.reconstruct`."""

    step: Required[Tensor]
    total: Tensor
    energy: Tensor


_FAR = 2.0**32  # S over Z, or Z over S, beyond which Z moves
_STILL = 2.0**-200  # sum of squares of a profile below which Z stays where it is
_FAR_MEMBER = 2.0**40  # a profile over a sample, in movement, that no float32 tells apart
_NOTHING = 2.0**-100  # S over Z below which the profile has stood still
_HISTORY = 1024  # snapshots of the profiles that are kept; beyond it every second one is dropped


class Tracker:
    r"""Recursive least squares of all weights against their modes' profiles, with fixed modes.

    Per weight it holds the mode (1 byte), the mean and the slope :math:`\sigma = a S / Z` (see
    :func:`cmd_plugin.kernels.update_affine`); per mode the profile's mean, sum of squares S and the
    constant Z, in float64.

    Args:
        choice: The modes.
        fit: Result of the fit on the warm-up snapshots; its arrays become the state.
        profiles: [M, T] float64 trajectories of the modes over the warm-up.
        labels: T labels of the warm-up snapshots.
        shrink: Keep each weight's total sum of squares, to shrink its movement by the squared
            correlation.
        forgetting: Factor by which an update discounts the past.

    Attributes:
        tied: The weights that follow their mode for good, with coefficients of their own: all that
            this class says about weights takes these instead of the fitted ones. None for none.
        seen: Number of snapshots taken in.
    """

    def __init__(
        self,
        choice: ModeChoice,
        fit: AffineFit,
        profiles: Tensor,
        labels: Sequence[int],
        *,
        shrink: bool,
        forgetting: float,
    ) -> None:
        self.choice = choice
        self.mode, self.slope, self.mean = fit.mode, fit.scale, fit.mean
        self.total = fit.total if shrink else None
        self.total_sum = sum_in_double(fit.total)
        self.count = float(profiles.shape[1])
        self.profile = profiles[:, -1].clone()
        self.profile_mean = profiles.mean(dim=1)
        self.squares = sum_of_squares(profiles)
        self.unit = self.squares.clone()
        self.forgetting = forgetting
        self.tied: TiedWeights | None = None
        self._profiles = [column.clone() for column in profiles.T]
        self._labels = list(labels)
        self._stride = 1
        self.seen = len(self._labels)
        self._last_label = self._labels[-1]
        self._ahead: Ahead | None = None
        self._unseen: list[int] = []  # labels of the snapshots that nobody has looked at
        self._label_before = self._last_label

    @property
    def nbytes(self) -> int:
        """Bytes of the state of the N weights."""
        arrays = [self.mode, self.slope, self.mean]
        arrays += [] if self.total is None else [self.total]
        if self.tied is not None:
            arrays += [self.tied.scale, self.tied.offset, self.tied.mask]
        return sum(array.numel() * array.element_size() for array in arrays)

    @property
    def follows_references(self) -> bool:
        """Whether each profile is one real weight, which is then modelled exactly."""
        return torch.equal(self.choice.members, self.choice.references)

    def to(self, device: torch.device) -> None:
        """Move the state of the weights to a device."""
        self.mode, self.slope, self.mean = (
            array.to(device) for array in (self.mode, self.slope, self.mean)
        )
        self.total = None if self.total is None else self.total.to(device)
        if self.tied is not None:
            self.tied.move(self.mode)

    def update(self, weights: FlatView, members: Tensor, label: int) -> bool:
        """Take a new snapshot in, unless a weight is not finite or far too large.

        Args:
            weights: The N weights.
            members: [P] float64 values of the weights that make the profiles.
            label: Its number in the history.

        Returns:
            Whether it was taken in; if not, the state is what it was, bit for bit.
        """
        self._ahead = None
        profile = self.choice.profile(members)
        step = profile - self.profile_mean
        keep = self.forgetting
        count = keep * self.count + 1.0
        blend = 1.0 / count
        squares = keep * self.squares + step.square() * (1.0 - blend)
        if not bool(squares.isfinite().all()):  # nor are they if a member is not
            return False
        slope, unit = self._in_unit_near(squares)
        gain = step * (1.0 - blend) / unit
        added = float(
            update_affine(weights, self.mode, slope, self.mean, gain, blend, keep, self.total)
        )
        if not isfinite(added):
            return False
        self.slope, self.unit, self.squares = slope, unit, squares
        self.total_sum = keep * self.total_sum + (1.0 - blend) * added
        self.profile_mean = self.profile_mean + step * blend
        self.count, self.profile = count, profile
        if self.follows_references:
            self._pin()
        self._remember(profile, label)
        self._thin()
        return True

    def follow(self, weights: FlatView, label: int) -> None:
        """Take a new snapshot in on the device, which nobody waits for.

        What became of it, :meth:`look` says. Until then all that this class says of profiles is as
        old as the last look, and of the weights as new as this snapshot.

        Args:
            weights: The N weights.
            label: Its number in the history.
        """
        if self._ahead is None or self._ahead.weights is not weights:
            numbers = Numbers(
                self.count, self.total_sum, self.seen,
                self.profile, self.profile_mean, self.squares, self.unit,
            )  # fmt: skip
            self._ahead = Ahead(
                weights,
                self.choice,
                numbers,
                exact=self.follows_references,
                decay=self.forgetting,
                far=_FAR,
                still=_STILL,
            )
        profile = self._ahead.follow(self.mode, self.slope, self.mean, self.total)
        if not self._unseen:
            self._label_before = self._last_label
        self._unseen.append(label)
        self._remember(profile, label)

    def should_look(self, weights: FlatView) -> bool:
        """Whether to :meth:`look` before these weights come, without waiting for the device.

        It is if a snapshot is known to have been refused, or if the weights have moved.
        """
        if self._ahead is None or not self._unseen:
            return False
        return self._ahead.weights is not weights or self._ahead.has_bad_news

    @property
    def is_full(self) -> bool:
        """Whether the history has to be thinned, for which :meth:`look` has to come first."""
        return len(self._labels) > _HISTORY

    def look(self) -> Refused | None:
        """Wait for what :meth:`follow` began; return what was refused, None if nothing was.

        The state is then what it was before the first snapshot that was refused, bit for bit:
        those that came after it are not taken in.
        """
        if self._ahead is None or not self._unseen:
            return None
        numbers, refused = self._ahead.look()
        self.count, self.total_sum = numbers.weight, numbers.total_sum
        self.profile, self.profile_mean = numbers.profile, numbers.profile_mean
        self.squares, self.unit = numbers.squares, numbers.unit
        lost = self.seen - numbers.seen
        if lost:
            kept = -(-numbers.seen // self._stride)
            del self._profiles[kept:], self._labels[kept:]
            taken = self._unseen[: len(self._unseen) - lost]
            self._last_label = taken[-1] if taken else self._label_before
            self.seen = numbers.seen
        self._unseen.clear()
        away = [i for i, profile in enumerate(self._profiles) if profile.device != self.unit.device]
        if away:
            fetched = torch.stack([self._profiles[i] for i in away]).cpu()
            for i, profile in zip(away, fetched, strict=True):
                self._profiles[i] = profile.clone()
        self._thin()
        return None if refused is None else refused._replace(later=lost - 1)

    def _in_unit_near(self, squares: Tensor) -> tuple[Tensor, Tensor]:
        """Return the slopes and Z as they are, or anew for modes whose S has left Z far behind.

        A slope is a S / Z: after a long standstill under forgetting, or a movement far beyond that
        of the warm-up, a float32 would not hold it. Z then moves by a power of two, which rounds no
        slope.
        """
        ratio = squares / self.unit
        far = ((ratio < 1 / _FAR) | (ratio > _FAR)) & (squares > _STILL)
        if not bool(far.any()):
            return self.slope, self.unit
        exponents = torch.where(far, torch.frexp(ratio).exponent, 0).clamp_(-64, 1000).tolist()
        factors = torch.tensor([ldexp(1.0, e) for e in exponents], dtype=torch.float64)
        table = (1.0 / factors).to(self.slope.device, self.slope.dtype)
        return self.slope * table[self.mode.long()], self.unit * factors

    def _pin(self) -> None:
        """Keep the references' own coefficients exact: scale 1, mean that of the profile."""
        device, dtype = self.slope.device, self.slope.dtype
        at = self.choice.references.to(device)
        self.slope[at] = (self.squares / self.unit).to(device, dtype)
        self.mean[at] = self.profile_mean.to(device, dtype)
        if self.total is not None:
            self.total[at] = self.squares.to(device, dtype)

    def _remember(self, profile: Tensor, label: int) -> None:
        if self.seen % self._stride == 0:
            self._profiles.append(profile)
            self._labels.append(label)
        self.seen += 1
        self._last_label = label

    def _thin(self) -> None:
        if self.is_full:
            self._profiles, self._labels = self._profiles[::2], self._labels[::2]
            self._stride *= 2

    def history(self) -> tuple[list[int], Tensor]:
        """Return labels and profiles [M, T] float64 of the snapshots remembered and the last."""
        labels, profiles = list(self._labels), list(self._profiles)
        if (self.seen - 1) % self._stride:  # the last snapshot fell between two remembered ones
            labels.append(self._last_label)
            profiles.append(self.profile)
        return labels, torch.stack(profiles, dim=1)

    @property
    def slope_per_unit(self) -> Tensor:
        """[M] float64 Z / S, by which a slope becomes the least-squares scale.

        Zero for a profile that has stood still until forgetting left nothing of its movement.
        """
        alive = self.squares > self.unit * _NOTHING
        return torch.where(alive, self.unit / self.squares, 0.0)

    @property
    def energy(self) -> Tensor:
        """[M] float64 sums of squares of the profiles, in the unit of the slopes."""
        return self.unit * self.slope_per_unit

    def evaluation(self) -> Evaluation:
        """Return the per-mode arguments of ``reconstruct`` for the last snapshot."""
        step = (self.profile - self.profile_mean) * self.slope_per_unit
        if self.total is None:
            return {"step": step}
        return {"step": step, "total": self.total, "energy": self.energy}

    def reconstruct(self, out: Tensor | None = None) -> Tensor:
        """Return the modelled weights of the last snapshot, [N], in ``out`` when it is given."""
        weights = reconstruct(self.mode, self.slope, self.mean, **self.evaluation(), out=out)
        if self.follows_references:
            at = self.choice.references.to(weights.device)
            weights[at] = self.profile.to(weights.device, weights.dtype)
        if self.tied is not None:
            self.tied.write(FlatView([weights]), self.profile)
        return weights

    def swap_in(self, weights: FlatView, backup: FlatView) -> None:
        """Copy ``weights`` to ``backup``; write the modelled ones of the last snapshot in place."""
        swap_in(weights, backup, self.mode, self.slope, self.mean, **self.evaluation())
        if self.follows_references:
            weights.put(self.choice.references, self.profile)
        if self.tied is not None:
            self.tied.write(weights, self.profile)

    def scale(self, *, shrunk: bool = False) -> Tensor:
        """Return the slopes a [N] of the weights.

        Args:
            shrunk: Whether to return them as they are used when the state shrinks.
        """
        evaluation = self.evaluation() if shrunk else Evaluation(step=self.squares)
        evaluation["step"] = self.slope_per_unit
        scale = reconstruct(self.mode, self.slope, torch.zeros_like(self.mean), **evaluation)
        if self.follows_references:
            scale[self.choice.references.to(scale.device)] = 1.0
        return scale if self.tied is None else torch.where(self.tied.mask, self.tied.scale, scale)

    def offset(self, *, shrunk: bool = False) -> Tensor:
        """Return the offsets b [N] of the weights: mean - a * mean of the profile.

        Args:
            shrunk: As for :meth:`scale`.
        """
        evaluation = self.evaluation() if shrunk else Evaluation(step=self.squares)
        evaluation["step"] = -self.profile_mean * self.slope_per_unit
        offset = reconstruct(self.mode, self.slope, self.mean, **evaluation)
        if self.follows_references:
            offset[self.choice.references.to(offset.device)] = 0.0
        return (
            offset if self.tied is None else torch.where(self.tied.mask, self.tied.offset, offset)
        )

    def explained(self, layout: Layout) -> float:
        r"""Return the part of :attr:`total_sum` that the model explains.

        Tied weights go on being fitted, by :math:`\hat a` and :math:`\bar w`. Their own
        coefficients leave :math:`(a - \hat a)^2 S + n (a \bar r + b - \bar w)^2` more than that
        fit.
        """
        tied = self.tied if self.tied is not None and self.tied.count else None
        slope = self.slope if tied is None else self.slope.masked_fill(tied.mask, 0.0)
        # As one layer: what each of them explains, nobody asks for.
        whole = Layout.of_vector(layout.numel, layout.state_dtype)
        parts = explained_by_layer(whole, self.mode, slope, self.energy, self.total)
        return float(parts.sum()) + (0.0 if tied is None else self._explained_by(tied))

    def _explained_by(self, tied: TiedWeights) -> float:
        device = self.mode.device
        ratio, squares, mean = (
            table.to(device) for table in (self.slope_per_unit, self.squares, self.profile_mean)
        )
        total = torch.zeros((), dtype=torch.float64, device=device)
        for start in range(0, self.mode.numel(), BLOCK):
            at = tied.mask[start : start + BLOCK].nonzero()[:, 0] + start
            mode = self.mode[at].long()
            a, b, centre = (x[at].double() for x in (tied.scale, tied.offset, self.mean))
            best = self.slope[at].double() * ratio[mode]
            shift = a * mean[mode] + b - centre
            total += ((2 * best - a) * a * squares[mode]).sum()
            total -= self.count * shift.square().sum()
        return float(total)

    def decomposition(
        self, layout: Layout, samples: Tensor, unmodelled: Mapping[str, Tensor]
    ) -> Decomposition:
        """Return the snapshots remembered as a :class:`Decomposition`.

        Args:
            layout: Layout of the N weights.
            samples: [K] int64 flat indices of the weights that were clustered.
            unmodelled: Entries of the last snapshot that are not modelled, by name.
        """
        labels, profiles = self.history()
        mean = self.mean.clone()
        if self.tied is not None:  # what coefficients say at the profile's mean
            self.tied.write(FlatView([mean], dtype=mean.dtype), self.profile_mean)
        return Decomposition(
            layout=layout,
            samples=samples,
            references=self.choice.references,
            assignment=self.mode.cpu().clone(),
            scale=self.scale(shrunk=True).cpu(),
            mean=mean.cpu(),
            profiles=profiles,
            profile_mean=self.profile_mean.clone(),
            total=self.total_sum,
            explained=self.explained(layout),
            epochs=labels,
            unmodelled=unmodelled,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the whole state, on the CPU."""
        return {
            "references": self.choice.references.clone(),
            "members": self.choice.members.clone(),
            "member_mode": self.choice.member_mode.clone(),
            "member_weight": self.choice.member_weight.clone(),
            "mode": self.mode.cpu().clone(),
            "slope": self.slope.cpu().clone(),
            "mean": self.mean.cpu().clone(),
            "total": None if self.total is None else self.total.cpu().clone(),
            "total_sum": self.total_sum,
            "count": self.count,
            "profile": self.profile.clone(),
            "profile_mean": self.profile_mean.clone(),
            "squares": self.squares.clone(),
            "unit": self.unit.clone(),
            "forgetting": self.forgetting,
            "profiles": torch.stack(self._profiles),
            "labels": list(self._labels),
            "stride": self._stride,
            "seen": self.seen,
            "last_label": self._last_label,
        }

    @classmethod
    def from_state(
        cls, state: SavedState, layout: Layout, settings: Settings, seen: int
    ) -> Tracker:
        """Return the tracker that :meth:`state_dict` described, bit for bit.

        Args:
            state: The state.
            layout: Layout of the N weights.
            settings: The settings of the run.
            seen: Number of snapshots it is known to have taken in.

        Raises:
            StateMismatch: If it is damaged.
        """
        numel, dtype, double = layout.numel, layout.state_dtype, torch.float64
        tracker = cls.__new__(cls)
        tracker.choice = choice = _saved_choice(state, numel, settings)
        modes = choice.modes
        tracker.mode = state.tensor("mode", (numel,), torch.uint8)
        last = int(tracker.mode.max())
        state.require(last < modes, "mode", f"has a weight in mode {last} of {modes}")
        tracker.slope = state.tensor("slope", (numel,), dtype)
        tracker.mean = state.weights("mean", (numel,), dtype, dtype)
        tracker.total = None
        if settings.shrink:
            tracker.total = state.tensor("total", (numel,), dtype)
            state.require(not bool((tracker.total < 0).any()), "total", "is negative")
        else:
            state.require(state.get("total") is None, "total", "is there without shrink=True")
        tracker.total_sum = state.number("total_sum", 0.0, torch.finfo(dtype).max)
        tracker.count = state.number("count", 1.0, seen)
        tracker.profile, tracker.profile_mean = (
            state.weights(name, (modes,), double, dtype) for name in ("profile", "profile_mean")
        )
        tracker.squares, tracker.unit = (
            state.tensor(name, (modes,), double) for name in ("squares", "unit")
        )
        held = float(tracker.squares.max()) <= torch.finfo(dtype).max
        state.require(held, "squares", "is far too large")
        state.require(not bool((tracker.squares < 0).any()), "squares", "is negative")
        state.require(not bool((tracker.unit <= 0).any()), "unit", "is not positive")
        if settings.profile == "reference":  # of which each is one of the weights of the total
            within = tracker.squares <= max(_STILL, 2.0**20 * tracker.total_sum)
            state.require(bool(within.all()), "squares", "is more than its part of total_sum")
        tracker.forgetting = state.number("forgetting", 0.0, 1.0)
        state.require(
            tracker.forgetting == settings.forgetting, "forgetting", "is not that of the settings"
        )
        tracker.tied = None
        tracker.seen = state.whole("seen", seen, seen)
        tracker._stride = state.whole("stride", 1, seen)
        kept = -(-seen // tracker._stride)
        state.require(kept <= _HISTORY, "stride", f"keeps {kept} snapshots of at most {_HISTORY}")
        tracker._profiles = list(state.weights("profiles", (kept, modes), double, dtype))
        tracker._labels = state.whole_numbers("labels", kept)
        tracker._last_label = tracker._label_before = state.whole("last_label")
        tracker._ahead, tracker._unseen = None, []
        return tracker

    def require_finite(self, layout: Layout, state: SavedState) -> None:
        r"""Raise StateMismatch if what a saved state makes of the weights is not finite.

        Each of its numbers may be sound, and their products too large. Of a true state
        :math:`(\sigma_i Z)^2 \le V_i S`, with V at most :attr:`total_sum`; rounding is given room.

        Args:
            layout: Layout of the N weights.
            state: The state this tracker, and the weights tied to it, were read from.
        """
        room = torch.finfo(self.slope.dtype).max * 2.0**-20
        arrays = [self.slope, *([] if self.total is None else [self.total])]
        sound = all(float(array.abs().max()) <= room for array in arrays)
        steepest = torch.zeros_like(self.unit).scatter_reduce_(
            0, self.mode.long(), self.slope.abs().double(), "amax"
        )
        bound = 2.0**40 * self.total_sum * self.squares
        within = (steepest * self.unit).square() <= bound
        sound = sound and bool((within | (self.squares <= _STILL)).all())
        for make in (self.reconstruct, self.scale, self.offset):
            sound = sound and bool(make().isfinite().all())
        sound = sound and isfinite(self.explained(layout))
        state.require(sound, "tracker", "makes weights that are not finite")


def _saved_choice(state: SavedState, numel: int, settings: Settings) -> ModeChoice:
    """Return the modes of a saved state."""
    references = state.distinct("references", None, numel)
    modes = references.numel()
    state.require(1 <= modes <= settings.modes, "references", f"is of {modes} modes")
    members = state.distinct("members", None, numel)
    count = members.numel()
    mode = state.indices("member_mode", count, modes)
    weight = state.tensor("member_weight", (count,), torch.float64)
    sound = float(weight.abs().max()) <= _FAR_MEMBER
    state.require(sound, "member_weight", "is far too large")
    used = bool(torch.bincount(mode, minlength=modes).all())
    state.require(used, "member_mode", "leaves a mode without a member")
    if settings.profile == "reference":
        state.require(torch.equal(members, references), "members", "are not the references")
        members = references  # one tensor: views of weights keep where the last one they saw lies
        state.require(torch.equal(mode, torch.arange(modes)), "member_mode", "is out of order")
        state.require(bool((weight == 1.0).all()), "member_weight", "is not 1")
    return ModeChoice(references, members, mode, weight)
