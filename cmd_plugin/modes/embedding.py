"""Embedded CMD: the schedule by which weights leave training and follow their mode for good."""

from __future__ import annotations

from fractions import Fraction
from math import ceil
from typing import Any

import torch

from cmd_plugin.errors import InputError
from cmd_plugin.kernels import coefficient_drift, select_smallest
from cmd_plugin.modes.layout import Layout
from cmd_plugin.modes.settings import Embedding
from cmd_plugin.modes.states import SavedState
from cmd_plugin.modes.tied import TiedWeights
from cmd_plugin.modes.tracker import Tracker

__all__ = ["Embedder", "check_embedding"]

_MEMBER_BYTES = 9  # mode, scale and offset of a new member, sent once


def check_embedding(embedding: Embedding | None, layout: Layout) -> None:
    """Raise InputError if references are to be trained that no optimizer moves."""
    statistics = [n for n in layout.names if n.endswith(("running_mean", "running_var"))]
    if embedding is None or not statistics or embedding.project not in ("tie", "pool"):
        return
    what = "has no gradient" if embedding.project == "tie" else "is moved by no optimizer"
    raise InputError(
        f"project={embedding.project!r} trains through reference weights, and {statistics[0]!r} "
        f"could be one but {what}: use buffers='keep' or 'recalibrate'."
    )


class Embedder:
    """The schedule of embedded CMD: ties more and more weights, and counts what that saves.

    Two arrays of the tied weights do double duty. Of a free weight they hold scale and offset at
    the last event, from which its drift is measured; at the event they are renewed, and of the
    weights chosen there they are never touched again: these are the frozen coefficients. With the
    mask that is 9 bytes a weight on top of the tracker's 9.

    Args:
        settings: When and how to embed.
        tracker: The fitted state, as it is right after the fit; its ``tied`` is set here.
        layout: Layout of the N weights.
        snapshots: Snapshots taken so far, all of them without an embedded weight.

    Attributes:
        settings: As given.
        tied: The embedded weights.
        events: Embedding events so far.
    """

    def __init__(
        self, settings: Embedding, tracker: Tracker, layout: Layout, snapshots: int
    ) -> None:
        self.settings = settings
        coefficients = tracker.scale(shrunk=True), tracker.offset(shrunk=True)
        self.tied = TiedWeights(layout, tracker.choice, tracker.mode, *coefficients)
        tracker.tied = self.tied
        self.events = 0
        self._snapshots = snapshots
        self._embedded_after = 0
        self._embedded_before = 0

    @property
    def numel(self) -> int:
        """Number of weights N."""
        return self.tied.layout.numel

    @property
    def saved_percent(self) -> float:
        """What the paper counts as saved, in percent.

        The share of weights that are embedded after each snapshot's event, averaged over all
        snapshots since the start. It counts weights, not computation.
        """
        return 100.0 * self._embedded_after / (self.numel * self._snapshots)

    @property
    def volume_percent(self) -> float:
        """Share of values that one synchronisation per snapshot has to send, in percent.

        Those of the weights that were free when the way to a snapshot began, averaged over all
        snapshots: embedded weights follow from them. :attr:`saved_percent` counts an event one
        snapshot earlier.
        """
        return 100.0 - 100.0 * self._embedded_before / (self.numel * self._snapshots)

    @property
    def volume_bytes(self) -> int:
        """Bytes of one synchronisation per snapshot, in one direction.

        The values of :attr:`volume_percent` in the state's dtype, and for each event N bits and
        nine bytes (mode, scale, offset) for every weight it embedded.
        """
        values = self.numel * self._snapshots - self._embedded_before
        news = self.events * ceil(self.numel / 8) + self.tied.count * _MEMBER_BYTES
        return values * self.tied.scale.element_size() + news

    def advance(self, tracker: Tracker) -> None:
        """Count a snapshot that the tracker has taken in, and embed if it is time."""
        number = self._snapshots  # t, counted from 0
        self._snapshots += 1
        self._embedded_before += self.tied.count
        if number % self.settings.every == 0:
            self._embed(tracker)
        self._embedded_after += self.tied.count

    def _embed(self, tracker: Tracker) -> None:
        tied = self.tied
        scale, offset = tracker.scale(shrunk=True), tracker.offset(shrunk=True)
        drift = coefficient_drift(scale, offset, tied.scale, tied.offset)
        # Coefficients that overflowed would write infinities: such a weight stays free.
        usable = drift.isfinite()
        # Whoever is in already comes last and is chosen once more.
        drift.masked_fill_(tied.mask | ~usable, float("inf"))
        tied.renew(scale, offset)
        tied.add(select_smallest(drift, self._quota()) & usable)
        self.events += 1

    def _quota(self) -> int:
        total = self.numel - self.tied.count if self.settings.relative else self.numel
        # As a fraction: in floats, 7 % of 100 is more than 7.
        return ceil(total * Fraction(str(self.settings.percent)) / 100)

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the whole state, on the CPU."""
        return {
            "scale": self.tied.scale.cpu().clone(),
            "offset": self.tied.offset.cpu().clone(),
            "embedded": self.tied.mask.cpu().clone(),
            "events": self.events,
            "snapshots": self._snapshots,
            "embedded_after": self._embedded_after,
            "embedded_before": self._embedded_before,
        }

    @classmethod
    def from_state(
        cls, settings: Embedding, state: SavedState, tracker: Tracker, layout: Layout, first: int
    ) -> Embedder:
        """Return the embedder that :meth:`state_dict` described, bit for bit.

        Args:
            settings: When and how to embed.
            state: The state.
            tracker: The fitted state; its ``tied`` is set here.
            layout: Layout of the N weights.
            first: Number of snapshots that were fitted.

        Raises:
            StateMismatch: If it is damaged.
        """
        numel, dtype, members = layout.numel, tracker.slope.dtype, tracker.choice.members
        snapshots = state.whole("snapshots", tracker.seen, tracker.seen)
        events = (snapshots - 1) // settings.every - (first - 1) // settings.every
        # Of a free weight they may have overflowed: then it was not embedded.
        scale, offset = (
            state.tensor(name, (numel,), dtype, finite=False) for name in ("scale", "offset")
        )
        mask = state.tensor("embedded", (numel,), torch.bool)
        state.require(not bool(mask[members].any()), "embedded", "has the weight of a profile")
        state.require(events > 0 or not bool(mask.any()), "embedded", "has weights of no event")
        for name, values in (("scale", scale), ("offset", offset)):
            tied = values[mask].double().abs()
            # Drift is a root of squares: what was embedded had coefficients that have a square.
            sound = bool((tied.square() <= 16.0 * torch.finfo(dtype).max).all())
            state.require(sound, name, "holds NaN, or coefficients that are far too large")
        embedder = cls.__new__(cls)
        embedder.settings = settings
        embedder.events = state.whole("events", events, events)
        embedder._snapshots = snapshots
        most = numel * (snapshots - first)
        embedder._embedded_after = state.whole("embedded_after", 0, most)
        embedder._embedded_before = state.whole("embedded_before", 0, embedder._embedded_after)
        embedder.tied = TiedWeights(layout, tracker.choice, tracker.mode, scale, offset, mask)
        tracker.tied = embedder.tied
        return embedder
