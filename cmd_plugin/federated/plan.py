"""The plan of embedded weights: which they are, which reference each follows, and how.

A plan only grows. Every embedding event adds an *increment*; the identity of a plan is a hash chain
over its increments, so that a receiver that holds an earlier plan is sent only what it lacks.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from cmd_plugin.federated.frame import FrameError, NeedResync
from cmd_plugin.federated.packing import Flat

__all__ = ["Plan"]

_HEAD = struct.Struct("<BHQ")  # bytes of a coefficient, number of references, number of members

Indices = npt.NDArray[np.int64]


def _identity(before: int, increment: bytes) -> int:
    digest = hashlib.sha256(before.to_bytes(8, "little") + increment).digest()
    return int.from_bytes(digest[:8], "little") or 1  # 0 means: nothing embedded


class Plan:
    r"""The embedded set E of a model with N weights: :math:`w_i = a_i\, r_{m(i)} + b_i`.

    Args:
        numel: Number of modelled weights N.

    Attributes:
        references: [M] int64 flat positions; never embedded.
        members: ``[|E|]`` int64 ascending flat positions of the embedded weights.
        mode: ``[|E|]`` uint8 reference each member follows.
        scale: ``[|E|]`` float64 slopes a, rounded to what is sent.
        offset: ``[|E|]`` float64 offsets b, rounded to what is sent.
        identity: 64-bit identity; 0 while nothing is embedded.
    """

    def __init__(self, numel: int) -> None:
        self.numel = numel
        self.references: Indices = np.empty(0, dtype=np.int64)
        self.embedded = np.zeros(numel, dtype=bool)
        self.members: Indices = np.empty(0, dtype=np.int64)
        self.mode = np.empty(0, dtype=np.uint8)
        self.scale = np.empty(0, dtype=np.float64)
        self.offset = np.empty(0, dtype=np.float64)
        self.identity = 0
        self._chain: list[tuple[int, bytes]] = []

    @property
    def fraction(self) -> float:
        """Share of embedded weights, ``|E| / N``."""
        return len(self.members) / self.numel

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
    ) -> None:
        """Add members for good.

        Members whose coefficients leave the range of what is sent stay free.

        Args:
            members: [n] ascending positions that are neither embedded nor references.
            mode: [n] reference each one follows.
            scale: [n] slopes.
            offset: [n] offsets.
            references: [M] positions of the references, the same at every call.
            half: Send coefficients as float16 (5 bytes a member) instead of float32 (9 bytes).
        """
        kind = np.dtype("<f2" if half else "<f4")
        with np.errstate(over="ignore"):
            rounded = np.asarray(scale).astype(kind), np.asarray(offset).astype(kind)
        fits = np.isfinite(rounded[0]) & np.isfinite(rounded[1])
        fits &= ~np.isin(members, references)
        members, mode = members[fits], np.asarray(mode, dtype=np.uint8)[fits]
        if not len(members):
            return
        first = references if not len(self.references) else references[:0]
        chosen = np.zeros(self.numel, dtype=bool)
        chosen[members] = True
        increment = b"".join(
            (
                _HEAD.pack(kind.itemsize, len(first), len(members)),
                first.astype("<i8").tobytes(),
                np.packbits(chosen[~self.embedded]).tobytes(),
                mode.tobytes(),
                rounded[0][fits].tobytes(),
                rounded[1][fits].tobytes(),
            )
        )
        self._apply(increment)

    def since(self, identity: int) -> bytes | None:
        """Return the increments after a plan, joined; None if that plan is not an earlier one."""
        if identity == 0:
            return b"".join(_framed(increment) for _, increment in self._chain)
        for position, (known, _) in enumerate(self._chain):
            if known == identity:
                return b"".join(_framed(item) for _, item in self._chain[position + 1 :])
        return None

    def extend(self, before: int, increments: bytes, after: int) -> None:
        """Take increments that continue the plan ``before`` and end in the plan ``after``.

        Nothing changes if this plan is ``after`` already.

        Raises:
            NeedResync: If this plan is neither.
            FrameError: If the increments are damaged.
        """
        if self.identity == after:
            return
        if self.identity != before:
            raise NeedResync("plan", f"plan {before:016x} is not known here, resend.")
        self._apply_all(increments)
        if self.identity != after:
            raise FrameError(
                "plan", f"it ends in {self.identity:016x}, announced was {after:016x}."
            )

    def _apply_all(self, increments: bytes) -> None:
        at = 0
        while at < len(increments):
            length = int.from_bytes(increments[at : at + 8], "little")
            if at + 8 + length > len(increments):
                raise FrameError("plan", "an increment is cut short.")
            self._apply(increments[at + 8 : at + 8 + length])
            at += 8 + length

    def _apply(self, increment: bytes) -> None:
        if len(increment) < _HEAD.size:
            raise FrameError("plan", "an increment is cut short.")
        width, references, count = _HEAD.unpack_from(increment)
        free = self.free
        bitmap = -(-len(free) // 8)
        expected = _HEAD.size + 8 * references + bitmap + count * (1 + 2 * width)
        if width not in (2, 4) or len(increment) != expected:
            raise FrameError("plan", f"an increment has {len(increment)} bytes, not {expected}.")
        at = _HEAD.size
        if references:
            self.references = np.frombuffer(increment, "<i8", references, at).astype(np.int64)
            at += 8 * references
        flags = np.unpackbits(np.frombuffer(increment, np.uint8, bitmap, at), count=len(free))
        members = free[flags.astype(bool)]
        at += bitmap
        mode = np.frombuffer(increment, np.uint8, count, at)
        at += count
        scale, offset = np.frombuffer(increment, f"<f{width}", 2 * count, at).reshape(2, -1)
        outside = (self.references < 0) | (self.references >= self.numel)
        wrong = len(members) != count or outside.any() or not len(self.references)
        if wrong or (mode >= len(self.references)).any():
            raise FrameError("plan", "members, modes and references do not fit one another.")
        if self.embedded[self.references].any() or np.isin(self.references, members).any():
            raise FrameError("plan", "a reference is embedded.")
        if not (np.isfinite(scale).all() and np.isfinite(offset).all()):
            raise FrameError("plan", "a coefficient is NaN or infinite.")
        order = np.argsort(np.concatenate([self.members, members]), kind="stable")
        self.members = np.concatenate([self.members, members])[order]
        self.mode = np.concatenate([self.mode, mode])[order]
        self.scale = np.concatenate([self.scale, scale.astype(np.float64)])[order]
        self.offset = np.concatenate([self.offset, offset.astype(np.float64)])[order]
        self.embedded[members] = True
        self.identity = _identity(self.identity, increment)
        self._chain.append((self.identity, increment))

    def expand(self, flat: Flat) -> Flat:
        """Put the embedded weights of a flat vector [N] on their curves, in place; return it.

        Computed in float64 and rounded once: the product of two float32 is exact there, so that
        server and clients get the same bits with and without fused multiply-add.
        """
        if len(self.members):
            reference = flat[self.references].astype(np.float64)
            flat[self.members] = self.scale * reference[self.mode] + self.offset
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
        moved = (flat - start).astype(np.float64)
        total = moved[self.references] + self.fold(moved[self.members])
        weight = 1.0 + self.fold(self.scale)
        flat[self.references] = start[self.references] + total / weight
        return flat

    def fold(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        r"""Return :math:`\sum_i a_i v_i` over the members of each mode, [M].

        Args:
            values: ``[|E|]`` one for each member.
        """
        count = len(self.references)
        sums = np.bincount(self.mode, self.scale * values, count)[:count]
        return sums.astype(np.float64, copy=False)

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
