"""Embedded CMD: weights that leave training and follow their mode's reference from then on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import ceil
from typing import Any

import torch
from torch import Tensor

from cmd_plugin.errors import InputError, NonFiniteError, ShapeError
from cmd_plugin.kernels import (
    FlatView,
    apply_embedding,
    coefficient_drift,
    fold_gradients,
    select_smallest,
)
from cmd_plugin.kernels.flat_view import BLOCK
from cmd_plugin.modes.fit import explained_by_layer
from cmd_plugin.modes.layout import Layout
from cmd_plugin.modes.settings import Embedding
from cmd_plugin.modes.tracker import Tracker

__all__ = ["Embedder", "check_embedding"]

_MEMBER_BYTES = 9  # mode, scale and offset of a new member, sent once


def check_embedding(embedding: Embedding | None, layout: Layout) -> None:
    """Raise InputError if gradients are to be tied to weights that may have none."""
    statistics = [n for n in layout.names if n.endswith(("running_mean", "running_var"))]
    if embedding is not None and embedding.project == "tie" and statistics:
        raise InputError(
            f"project='tie' trains through reference weights, and {statistics[0]!r} could be one "
            "but has no gradient: use buffers='keep' or 'recalibrate'."
        )


class Embedder:
    r"""The embedded set E of a run: who is in it, and with which coefficients.

    Two arrays do double duty. Of a free weight they hold scale and offset at the last event, from
    which its drift is measured; at the event they are renewed, and of the weights chosen there they
    are never touched again: these are the frozen coefficients. With the flag that is 9 bytes a
    weight on top of the tracker's 9.

    Weights that make a profile are never embedded: the references, or all samples when a mode
    follows their mean.

    Args:
        settings: When and how to embed.
        tracker: The fitted state, as it is right after the fit.
        snapshots: Snapshots taken so far, all of them without an embedded weight.
    """

    def __init__(self, settings: Embedding, tracker: Tracker, snapshots: int) -> None:
        self.settings = settings
        self.scale = tracker.scale(shrunk=True)
        self.offset = tracker.offset(shrunk=True)
        self.embedded = torch.zeros_like(tracker.mode, dtype=torch.bool)
        self.count = 0
        self.events = 0
        self._snapshots = snapshots
        self._embedded_after = 0
        self._embedded_before = 0

    @property
    def numel(self) -> int:
        """Number of weights N."""
        return self.embedded.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of the state of the N weights."""
        arrays = (self.scale, self.offset, self.embedded)
        return sum(array.numel() * array.element_size() for array in arrays)

    @property
    def saved_percent(self) -> float:
        """Share of weights embedded at the end of a snapshot, averaged over all of them, in %."""
        return 100.0 * self._embedded_after / (self.numel * self._snapshots)

    @property
    def volume_percent(self) -> float:
        """Share of values that were free when the way to a snapshot began, averaged, in %."""
        return 100.0 - 100.0 * self._embedded_before / (self.numel * self._snapshots)

    @property
    def volume_bytes(self) -> int:
        """Bytes one direction of a synchronisation per snapshot would have sent."""
        values = self.numel * self._snapshots - self._embedded_before
        return values * self.scale.element_size() + self.event_bytes

    @property
    def event_bytes(self) -> int:
        """Bytes to tell the other side who was embedded: N bits an event, 9 bytes a member."""
        return self.events * ceil(self.numel / 8) + self.count * _MEMBER_BYTES

    def to(self, device: torch.device) -> None:
        """Move the state of the weights to a device."""
        self.scale, self.offset, self.embedded = (
            array.to(device) for array in (self.scale, self.offset, self.embedded)
        )

    def advance(self, tracker: Tracker) -> bool:
        """Count a snapshot that the tracker has taken in, and embed if it is time.

        Returns:
            Whether this was an embedding event.
        """
        number = self._snapshots  # t, counted from 0
        self._snapshots += 1
        self._embedded_before += self.count
        due = number % self.settings.every == 0
        if due:
            self._embed(tracker)
        self._embedded_after += self.count
        return due

    def _embed(self, tracker: Tracker) -> None:
        scale, offset = tracker.scale(shrunk=True), tracker.offset(shrunk=True)
        drift = coefficient_drift(scale, offset, self.scale, self.offset)
        # Coefficients that overflowed would write infinities: such a weight stays free.
        usable = drift.isfinite()
        # Whoever is in already comes last and is chosen once more.
        drift.masked_fill_(self.embedded | ~usable, float("inf"))
        torch.where(self.embedded, self.scale, scale, out=self.scale)
        torch.where(self.embedded, self.offset, offset, out=self.offset)
        self.embedded |= select_smallest(drift, self._quota()) & usable
        self.embedded[tracker.choice.members.to(self.embedded.device)] = False
        self.count = int(self.embedded.sum())
        self.events += 1

    def _quota(self) -> int:
        total = self.numel - self.count if self.settings.relative else self.numel
        # As a fraction: in floats, 7 % of 100 is more than 7.
        return ceil(total * Fraction(str(self.settings.percent)) / 100)

    def frozen_scale(self, scale: Tensor) -> Tensor:
        """Put the frozen scales into ``scale`` [N], in place, and return it."""
        return torch.where(self.embedded, self.scale, scale, out=scale)

    def frozen_offset(self, offset: Tensor) -> Tensor:
        """Put the frozen offsets into ``offset`` [N], in place, and return it."""
        return torch.where(self.embedded, self.offset, offset, out=offset)

    def freeze(self, scale: Tensor, mean: Tensor, tracker: Tracker) -> None:
        """Put frozen scales and the means they imply, a * mean of the profile + b, in place."""
        self.frozen_scale(scale)
        view = FlatView([mean], dtype=mean.dtype)
        self.write(view, tracker, tracker.profile_mean)

    def write(self, weights: FlatView, tracker: Tracker, profile: Tensor | None = None) -> None:
        """Overwrite the embedded weights, in place.

        Args:
            weights: The N weights.
            tracker: The modes.
            profile: [M] the profiles' values; None for those of the last snapshot.
        """
        if self.count:
            values = tracker.profile if profile is None else profile
            apply_embedding(weights, self.embedded, tracker.mode, self.scale, self.offset, values)

    def project(self, weights: FlatView, tracker: Tracker, profile: Tensor, layout: Layout) -> None:
        """Overwrite the embedded weights of a model in training; see :meth:`OnlineModes.project`.

        Args:
            weights: The N weights, changed in place.
            tracker: The modes.
            profile: [M] the profiles' values.
            layout: Layout of the weights: no variance in it is left negative.
        """
        if profile.shape != tracker.choice.references.shape:
            raise ShapeError(
                f"profile must be [{tracker.choice.modes}], one value a mode, got "
                f"{tuple(profile.shape)}."
            )
        if not bool(profile.isfinite().all()):
            raise NonFiniteError(
                "a reference weight is NaN or infinite and would spread to the weights embedded "
                "in its mode: the training diverged."
            )
        self.write(weights, tracker, profile)
        for variance in layout.variances():
            at = variance.start + self.embedded[variance].nonzero()[:, 0].cpu()
            values = weights.gather(at)
            if bool((values < 0).any()):
                weights.put(at, values.clamp(min=0.0))

    def explained(self, tracker: Tracker, layout: Layout) -> float:
        r"""Return the part of the tracker's ``total_sum`` that frozen and free weights explain.

        The tracker goes on fitting embedded weights, by :math:`\hat a` and :math:`\bar w`. Frozen
        coefficients leave :math:`(a - \hat a)^2 S + n (a \bar r + b - \bar w)^2` more than that
        fit.
        """
        if not self.count:
            return tracker.explained(layout)
        free = tracker.slope.masked_fill(self.embedded, 0.0)
        part = explained_by_layer(layout, tracker.mode, free, tracker.energy, tracker.total).sum()
        ratio, squares, mean = (
            table.to(self.scale.device)
            for table in (tracker.slope_per_unit, tracker.squares, tracker.profile_mean)
        )
        total = torch.zeros((), dtype=torch.float64, device=self.scale.device)
        for start in range(0, self.numel, BLOCK):
            at = self.embedded[start : start + BLOCK].nonzero()[:, 0] + start
            mode = tracker.mode[at].long()
            a, b, centre = (x[at].double() for x in (self.scale, self.offset, tracker.mean))
            best = tracker.slope[at].double() * ratio[mode]
            shift = a * mean[mode] + b - centre
            total += ((2 * best - a) * a * squares[mode]).sum()
            total -= tracker.count * shift.square().sum()
        return float(part) + float(total)

    def tie(self, tensors: Sequence[Tensor | None], layout: Layout, tracker: Tracker) -> None:
        """Hand the gradients of the embedded weights to what makes their modes' profiles.

        Args:
            tensors: The layout's tensors, in its order; None for those that take no part. A tensor
                without a gradient gets one if it makes a profile.
            layout: Layout of the N weights.
            tracker: The modes.

        Raises:
            InputError: If a gradient is sparse.
        """
        if not self.count:
            return
        sums = torch.zeros(tracker.choice.modes, dtype=torch.float64, device=self.scale.device)
        for name, tensor, start, size in zip(
            layout.names, tensors, layout.offsets, layout.sizes, strict=True
        ):
            if tensor is None or tensor.grad is None:
                continue
            if tensor.grad.layout != torch.strided:
                raise InputError(
                    f"{name!r} has a sparse gradient, which project='tie' cannot read: exclude it "
                    "from the modes."
                )
            at = slice(start, start + size)
            flat = tensor.grad.reshape(-1)
            sums += fold_gradients(
                flat, self.embedded[at], tracker.mode[at], self.scale[at], len(sums)
            )
            _write_back(flat, tensor.grad)
        choice = tracker.choice
        shares = choice.member_weight.to(sums.device) * sums[choice.member_mode.to(sums.device)]
        owner = torch.searchsorted(torch.tensor(layout.offsets), choice.members, right=True) - 1
        for index in sorted(set(owner.tolist())):
            tensor = tensors[index]
            if tensor is None or not tensor.requires_grad:
                continue
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
            chosen = owner == index
            inside = (choice.members[chosen] - layout.offsets[index]).to(sums.device)
            flat = tensor.grad.reshape(-1)
            flat[inside] += shares[chosen.to(sums.device)].to(flat.dtype)
            _write_back(flat, tensor.grad)

    def clear_slots(
        self, optimizer: torch.optim.Optimizer, tensors: Sequence[Tensor], layout: Layout
    ) -> None:
        """Zero what an optimizer remembers about the embedded weights: momenta, second moments.

        Args:
            optimizer: The optimizer.
            tensors: The layout's tensors, in its order.
            layout: Layout of the N weights.
        """
        if not self.count:
            return
        for tensor, start, size in zip(tensors, layout.offsets, layout.sizes, strict=True):
            if tensor not in optimizer.state:
                continue
            mask = self.embedded[start : start + size].view(tensor.shape)
            for name, slot in optimizer.state[tensor].items():
                # A counter of steps has the shape of a scalar weight, but is none of its slots.
                if name != "step" and isinstance(slot, Tensor) and slot.shape == tensor.shape:
                    slot.masked_fill_(mask, 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the whole state, on the CPU."""
        return {
            "scale": self.scale.cpu().clone(),
            "offset": self.offset.cpu().clone(),
            "embedded": self.embedded.cpu().clone(),
            "events": self.events,
            "snapshots": self._snapshots,
            "embedded_after": self._embedded_after,
            "embedded_before": self._embedded_before,
        }

    @classmethod
    def from_state(cls, settings: Embedding, state: Mapping[str, Any]) -> Embedder:
        """Return the embedder that :meth:`state_dict` described, bit for bit."""
        embedder = cls.__new__(cls)
        embedder.settings = settings
        for name in ("scale", "offset", "embedded"):
            setattr(embedder, name, state[name].clone())
        embedder.count = int(embedder.embedded.sum())
        embedder.events = int(state["events"])
        embedder._snapshots = int(state["snapshots"])
        embedder._embedded_after = int(state["embedded_after"])
        embedder._embedded_before = int(state["embedded_before"])
        return embedder


def _write_back(flat: Tensor, gradient: Tensor) -> None:
    if not gradient.is_contiguous():  # then reshape(-1) made a copy
        gradient.copy_(flat.view(gradient.shape))
