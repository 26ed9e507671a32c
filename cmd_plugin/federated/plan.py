"""The plan of embedded weights as it is sent: which they are, what each follows, and how.

A plan only grows. Every embedding event adds an *increment*; the identity of a plan is a hash chain
over its increments, so that a receiver that holds an earlier plan is sent only what it lacks.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cmd_plugin.federated.frame import FrameError, NeedResync
from cmd_plugin.federated.packing import Flat
from cmd_plugin.federated.quantise import dequantise, quantise, quantised_bytes
from cmd_plugin.kernels import FlatView
from cmd_plugin.modes import Layout
from cmd_plugin.modes.choice import ModeChoice
from cmd_plugin.modes.tied import TiedWeights

__all__ = ["Plan"]

_HEAD = struct.Struct("<BHQ")  # bytes of a coefficient, number of references, number of members
_SHORT = 1
"""Instead of the bytes of a coefficient: slopes in 8 bits, and no offsets."""

Indices = npt.NDArray[np.int64]


def _identity(before: int, increment: bytes) -> int:
    digest = hashlib.sha256(before.to_bytes(8, "little") + increment).digest()
    return int.from_bytes(digest[:8], "little") or 1  # 0 means: nothing embedded


class Plan:
    r"""The embedded set E of a model with N weights: :math:`w_i = a_i\, r_{m(i)} + b_i`.

    Args:
        numel: Number of modelled weights N.

    Attributes:
        numel: As given.
        tied: The set itself, in float64; coefficients are what is sent. None while it is empty.
        embedded: [N] bool, its mask as an array.
        identity: 64-bit identity; 0 while nothing is embedded.
        short: The last increment in its short form, for who holds the plan before it (its identity
            comes first) and the values it was made with; None if there is none.
    """

    def __init__(self, numel: int) -> None:
        self.numel = numel
        self.tied: TiedWeights | None = None
        self.embedded = np.zeros(numel, dtype=bool)
        self.identity = 0
        self.short: tuple[int, bytes] | None = None
        self._chain: list[tuple[int, bytes]] = []

    @property
    def count(self) -> int:
        """Number of embedded weights, ``|E|``."""
        return 0 if self.tied is None else self.tied.count

    @property
    def fraction(self) -> float:
        """Share of embedded weights, ``|E| / N``."""
        return self.count / self.numel

    @property
    def references(self) -> Indices:
        """[M] int64 flat positions of the references; never embedded."""
        none = np.empty(0, dtype=np.int64)
        return none if self.tied is None else self.tied.choice.references.numpy()

    @property
    def members(self) -> Indices:
        """``[|E|]`` int64 ascending flat positions of the embedded weights."""
        return np.flatnonzero(self.embedded)

    @property
    def mode(self) -> npt.NDArray[np.uint8]:
        """``[|E|]`` uint8 reference each member follows."""
        return self._held("mode", np.uint8)

    @property
    def scale(self) -> npt.NDArray[np.float64]:
        """``[|E|]`` float64 slopes a, rounded to what is sent."""
        return self._held("scale", np.float64)

    @property
    def offset(self) -> npt.NDArray[np.float64]:
        """``[|E|]`` float64 offsets b, rounded to what is sent."""
        return self._held("offset", np.float64)

    def _held(self, name: str, dtype: type) -> npt.NDArray[Any]:
        if self.tied is None:
            return np.empty(0, dtype)
        values: npt.NDArray[Any] = getattr(self.tied, name).numpy()
        return values[self.embedded]

    @property
    def free(self) -> Indices:
        """``[N - |E|]`` int64 ascending positions of the weights that are sent."""
        return np.flatnonzero(~self.embedded)

    def embed(
        self,
        members: Indices,
        mode: npt.NDArray[np.uint8],
        scale: npt.NDArray[Any],
        offset: npt.NDArray[Any],
        references: Indices,
        *,
        half: bool = False,
        held: Flat | None = None,
    ) -> None:
        """Add members for good.

        Members whose coefficients leave the range of what is sent stay free. With ``held`` slopes
        are rounded to 8 bits and offsets are not those given: every curve goes through the values
        that all receivers hold. Two bytes a member are then sent to who holds these values, and
        nine to others.

        Args:
            members: [n] ascending positions that are neither embedded nor references.
            mode: [n] reference each one follows.
            scale: [n] slopes.
            offset: [n] offsets.
            references: [M] positions of the references, the same at every call.
            half: Send coefficients as float16 (5 bytes a member) instead of float32 (9 bytes).
            held: [N] values that all receivers hold, float32 or float64.
        """
        kind = np.dtype("<f2" if half else "<f4")
        with np.errstate(over="ignore"):
            rounded = np.asarray(scale).astype(kind), np.asarray(offset).astype(kind)
        fits = np.isfinite(rounded[0]) & np.isfinite(rounded[1])
        fits &= ~np.isin(members, references)
        members, mode = members[fits], np.asarray(mode, dtype=np.uint8)[fits]
        if not len(members):
            return
        self.short = None
        first = references if self.tied is None else references[:0]
        chosen = np.zeros(self.numel, dtype=bool)
        chosen[members] = True
        who = (
            first.astype("<i8").tobytes(),
            np.packbits(chosen[~self.embedded]).tobytes(),
            mode.tobytes(),
        )
        if held is None:
            head = _HEAD.pack(kind.itemsize, len(first), len(members))
            slopes, offsets = (values[fits].tobytes() for values in rounded)
            self._apply(b"".join((head, *who, slopes, offsets)))
            return
        head = _HEAD.pack(_SHORT, len(first), len(members))
        before = self.identity
        short = b"".join((head, *who, *quantise(rounded[0][fits].astype(np.float32), 8)))
        self._apply(self._at_length(short, held))
        self.short = before, short

    def since(self, identity: int, *, short: bool = False) -> bytes | None:
        """Return the increments after a plan, joined; None if that plan is not an earlier one.

        Args:
            identity: Identity of that plan.
            short: Whether the receiver holds the values that the last increment was made with.
        """
        if short and self.short is not None and identity == self.short[0] != self.identity:
            return _framed(self.short[1])
        if identity == 0:
            return b"".join(_framed(increment) for _, increment in self._chain)
        for position, (known, _) in enumerate(self._chain):
            if known == identity:
                return b"".join(_framed(item) for _, item in self._chain[position + 1 :])
        return None

    def extend(self, before: int, increments: bytes, after: int, held: Flat | None = None) -> None:
        """Take increments that continue the plan ``before`` and end in the plan ``after``.

        Nothing changes if this plan is ``after`` already.

        Args:
            before: As said.
            increments: As said.
            after: As said.
            held: [N] values that are held here, for an increment in its short form.

        Raises:
            NeedResync: If this plan is neither.
            FrameError: If the increments are damaged.
        """
        if self.identity == after:
            return
        if self.identity != before:
            raise NeedResync("plan", f"plan {before:016x} is not known here, resend.")
        self._apply_all(increments, held)
        if self.identity != after:
            raise FrameError(
                "plan", f"it ends in {self.identity:016x}, announced was {after:016x}."
            )

    def _apply_all(self, increments: bytes, held: Flat | None = None) -> None:
        at = 0
        while at < len(increments):
            length = int.from_bytes(increments[at : at + 8], "little")
            if at + 8 + length > len(increments):
                raise FrameError("plan", "an increment is cut short.")
            increment = increments[at + 8 : at + 8 + length]
            self._apply(self._at_length(increment, held))
            at += 8 + length

    def _take_apart(
        self, increment: bytes
    ) -> tuple[int, Indices, Indices, npt.NDArray[np.uint8], int]:
        """Return width, references, members, modes, and where coefficients begin; all checked."""
        if len(increment) < _HEAD.size:
            raise FrameError("plan", "an increment is cut short.")
        width, references, count = _HEAD.unpack_from(increment)
        free = self.free
        bitmap = -(-len(free) // 8)
        each = sum(quantised_bytes(count, 8)) if width == _SHORT else 2 * width * count
        expected = _HEAD.size + 8 * references + bitmap + count + each
        if width not in (_SHORT, 2, 4) or len(increment) != expected:
            raise FrameError("plan", f"an increment has {len(increment)} bytes, not {expected}.")
        at = _HEAD.size
        known = np.frombuffer(increment, "<i8", references, at).astype(np.int64)
        at += 8 * references
        flags = np.unpackbits(np.frombuffer(increment, np.uint8, bitmap, at), count=len(free))
        members = free[flags.astype(bool)]
        at += bitmap
        mode = np.frombuffer(increment, np.uint8, count, at)
        if references and self.tied is not None:
            raise FrameError("plan", "the references are there already, and never change.")
        known = known if self.tied is None else self.references
        outside = (known < 0) | (known >= self.numel)
        wrong = len(members) != count or outside.any() or not len(known)
        if wrong or (mode >= len(known)).any():
            raise FrameError("plan", "members, modes and references do not fit one another.")
        if self.embedded[known].any() or np.isin(known, members).any():
            raise FrameError("plan", "a reference is embedded.")
        return width, known, members, mode, at + count

    def _at_length(self, increment: bytes, held: Flat | None) -> bytes:
        """Return a short increment as the one with float32 coefficients that it stands for.

        An offset is :math:`w_i - a_i r` of the held values: the product of two float32 is exact in
        float64, so that all ends get the same bits.
        """
        if increment[:1] != bytes([_SHORT]):
            return increment
        if held is None:
            raise NeedResync("plan", "the values an increment builds on are not known, resend.")
        _, known, members, mode, at = self._take_apart(increment)
        end = at + quantised_bytes(len(members), 8)[0]
        slope = dequantise(increment[at:end], increment[end:], len(members), 8, "plan")
        with np.errstate(over="ignore", invalid="ignore"):  # refused when it is applied
            follow = slope.astype(np.float64) * held[known[mode]]
            offset = (held[members].astype(np.float64) - follow).astype("<f4")
        head = _HEAD.pack(4, *_HEAD.unpack_from(increment)[1:])
        who = increment[_HEAD.size : at]
        return b"".join((head, who, slope.astype("<f4").tobytes(), offset.tobytes()))

    def _apply(self, increment: bytes) -> None:
        width, known, members, mode, at = self._take_apart(increment)
        scale, offset = np.frombuffer(increment, f"<f{width}", 2 * len(members), at).reshape(2, -1)
        if not (np.isfinite(scale).all() and np.isfinite(offset).all()):
            raise FrameError("plan", "a coefficient is NaN or infinite.")
        if self.tied is None:
            self.tied = self._empty(known)
        chosen = np.zeros(self.numel, dtype=bool)
        chosen[members] = True
        for array, values in (
            (self.tied.mode, mode),
            (self.tied.scale, scale),
            (self.tied.offset, offset),
        ):
            array.numpy()[members] = values
        self.tied.add(torch.from_numpy(chosen))
        self.identity = _identity(self.identity, increment)
        self._chain.append((self.identity, increment))

    def _empty(self, references: Indices) -> TiedWeights:
        """Return the empty set of weights that will follow these references."""
        return TiedWeights(
            Layout.of_vector(self.numel),
            ModeChoice.of_references(torch.from_numpy(references)),
            torch.zeros(self.numel, dtype=torch.uint8),
            torch.zeros(self.numel, dtype=torch.float64),
            torch.zeros(self.numel, dtype=torch.float64),
            torch.from_numpy(self.embedded),
        )

    def expand(self, flat: Flat) -> Flat:
        """Put the embedded weights of a flat vector [N] on their curves, in place; return it.

        Computed in float64 and rounded once: the product of two float32 is exact there, so that
        server and clients get the same bits with and without fused multiply-add.
        """
        if self.tied is not None:
            view = FlatView([torch.from_numpy(flat)], dtype=torch.float64)
            self.tied.write(view, view.gather(self.tied.choice.references))
        return flat

    def pool(self, flat: Flat, start: Flat) -> Flat:
        r"""Move the references by what all weights on their curve did, in place; return ``flat``.

        The least-squares projection of a local update onto what the curves can express:
        :math:`r_m = r^0_m + \sum_i a_i (w_i - w^0_i) / \sum_i a_i^2` over reference m (with a = 1)
        and its members. Linear in the update, so it goes together with averaging.

        Args:
            flat: [N] trained weights; only references change.
            start: [N] weights the training started from.
        """
        if self.tied is not None:
            moved = FlatView([torch.from_numpy((flat - start).astype(np.float64))])
            step = self.tied.nearest(moved, differences=True).numpy()
            flat[self.references] = start[self.references] + step
        return flat

    def to_bytes(self) -> bytes:
        """Return the whole plan; :meth:`from_bytes` reads it."""
        increments = self.since(0)
        return self.numel.to_bytes(8, "little") + (increments or b"")

    @classmethod
    def from_bytes(cls, data: bytes) -> Plan:
        """Read what :meth:`to_bytes` wrote."""
        plan = cls(int.from_bytes(data[:8], "little"))
        plan._apply_all(data[8:])
        return plan


def _framed(increment: bytes) -> bytes:
    return len(increment).to_bytes(8, "little") + increment
