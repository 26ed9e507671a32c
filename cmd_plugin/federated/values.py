"""Values at chosen positions of a flat vector, as bytes and back: what every frame is about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cmd_plugin.federated.eden import dequantise_rotated, quantise_rotated
from cmd_plugin.federated.frame import (
    FLAG_DELTA,
    FLAG_INDEXED,
    FLAG_ROTATED,
    FLAG_SPARSE,
    Frame,
    FrameError,
    Header,
    NeedResync,
    Sections,
)
from cmd_plugin.federated.packing import Flat
from cmd_plugin.federated.plan import Plan
from cmd_plugin.federated.quantise import REFERENCE_BITS, dequantise, quantise, quantised_bytes

__all__ = [
    "EncodedValues",
    "Known",
    "Received",
    "decode_values",
    "encode_values",
    "free_positions",
    "largest",
]

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Known:
    """What a receiver is known to hold: nothing at all by default."""

    layout: int = 0
    plan: int = 0
    values: int = 0


@dataclass(frozen=True)
class Received:
    """A frame from the server, decoded.

    Attributes:
        header: Its header, with what is asked of the reply.
        arrays: Name -> array, exactly those of the model.
        flat: [N] the modelled weights among them.
        free: Positions of the weights the reply has to hold.
    """

    header: Header
    arrays: dict[str, npt.NDArray[Any]]
    flat: Flat
    free: npt.NDArray[np.int64]


@dataclass(frozen=True)
class EncodedValues:
    """The sections of a frame that hold values, and the flags that go with them."""

    flags: int
    positions: bytes
    references: bytes
    scales: bytes
    values: bytes


def free_positions(plan: Plan, frozen: npt.NDArray[np.bool_] | None) -> Indices:
    """Return the ascending positions that are sent: neither embedded nor frozen."""
    free = plan.free
    return free if frozen is None else free[~frozen[free]]


def largest(values: Flat, share: float) -> Indices:
    """Return the ascending indices of the ``ceil(share * n)`` largest |values|, ties by index."""
    count = min(len(values), int(np.ceil(share * len(values))))
    order = np.argsort(-np.abs(values), kind="stable")[:count]
    return np.sort(order)


def encode_values(
    flat: Flat,
    free: Indices,
    references: Indices,
    *,
    bits: int = 0,
    delta: bool = False,
    share: float = 1.0,
    generator: np.random.Generator | None = None,
    rotation: int | None = None,
    unbiased: bool = True,
) -> EncodedValues:
    """Encode a flat vector [N] at its free positions.

    Args:
        flat: Values, or differences with ``delta``.
        free: Positions that are sent.
        references: Positions that are sent in 16 bits when the others are quantised to fewer: a
            rounding error there is multiplied by the slope of every weight that follows.
        bits: 0, 4 or 8; with a rotation 1, 2, 4 or 8.
        delta: Whether these are differences.
        share: Share of the free positions that is sent, those with the largest values.
        generator: Source of the stochastic rounding; None rounds to nearest.
        rotation: Seed of the random rotation before values are quantised (EDEN); None for none.
        unbiased: As in :func:`quantise_rotated`.
    """
    flags, positions, fine = (FLAG_DELTA if delta else 0), b"", b""
    if rotation is not None:
        flags |= FLAG_ROTATED
    if bits:
        free = _without(free, references)
        fine = b"".join(quantise(flat[references], _reference_bits(flags), generator))
    values = flat[free]
    if share < 1.0:
        chosen = largest(values, share)
        flags |= FLAG_SPARSE
        if 4 * len(chosen) < -(-len(free) // 8):
            flags |= FLAG_INDEXED
            positions = chosen.astype("<u4").tobytes()
        else:
            mask = np.zeros(len(free), dtype=bool)
            mask[chosen] = True
            positions = np.packbits(mask).tobytes()
        values = values[chosen]
    if not bits:
        return EncodedValues(flags, positions, b"", b"", values.tobytes())
    if rotation is None:
        codes, scales = quantise(values, bits, generator)
    else:
        codes, scales = quantise_rotated(values, bits, rotation, unbiased=unbiased)
    return EncodedValues(flags, positions, fine, scales, codes)


def _reference_bits(flags: int) -> int:
    """Bits of a reference: of rotated differences 8, whose errors are in scale with the step."""
    return 8 if flags & FLAG_DELTA and flags & FLAG_ROTATED else REFERENCE_BITS


def _without(free: Indices, references: Indices) -> Indices:
    """Return the free positions that are no references, still ascending."""
    return free[~np.isin(free, references)] if len(references) else free


def _chosen(header: Header, sections: Sections, free: Indices) -> Indices:
    if not header.flags & FLAG_SPARSE:
        return free
    if header.flags & FLAG_INDEXED:
        if len(sections.positions) % 4:
            raise FrameError("positions", "the list of positions is cut short.")
        listed: Indices = np.frombuffer(sections.positions, "<u4").astype(np.int64)
        rising = bool((np.diff(listed) > 0).all())
        if len(listed) and (not rising or listed[-1] >= len(free)):
            raise FrameError("positions", "they must rise and lie inside the model.")
        rows: Indices = free[listed]
        return rows
    if len(sections.positions) != -(-len(free) // 8):
        raise FrameError("positions", f"the bitmap does not fit {len(free)} free weights.")
    mask = np.unpackbits(np.frombuffer(sections.positions, np.uint8), count=len(free))
    chosen: Indices = free[mask.astype(bool)]
    return chosen


def decode_values(
    frame: Frame,
    free: Indices,
    plan: Plan,
    base: Flat | None,
    dtype: np.dtype[np.floating],
) -> Flat:
    """Return the flat vector [N] of a frame, embedded weights on their curves.

    Args:
        frame: What was received.
        free: Positions that are sent.
        plan: The plan the values are for.
        base: Values [N] that differences are added to, and that positions without a value keep.
        dtype: float32 or float64.

    Raises:
        FrameError: If the sections do not fit the model.
        NeedResync: If values are missing and there is no base.
    """
    header, sections = frame.header, frame.sections
    fine = plan.references if header.bits else plan.references[:0]
    chosen = _chosen(header, sections, _without(free, fine))
    if header.bits and header.flags & FLAG_ROTATED:
        values = dequantise_rotated(sections.values, sections.scales, len(chosen), header.bits)
    elif header.bits:
        values = dequantise(sections.values, sections.scales, len(chosen), header.bits)
    else:
        expected = len(chosen) * dtype.itemsize
        if len(sections.values) != expected:
            raise FrameError("values", f"expected {expected} bytes, got {len(sections.values)}.")
        values = np.frombuffer(sections.values, dtype)
    complete = len(chosen) + len(fine) + plan.count == plan.numel
    if base is None and (header.flags & FLAG_DELTA or not complete):
        raise NeedResync("values", "the values these build on are not known here, resend.")
    flat = np.zeros(plan.numel, dtype) if base is None else base.astype(dtype, copy=True)
    if header.flags & FLAG_DELTA:
        flat[chosen] += values
    else:
        flat[chosen] = values
    if header.bits:
        bits = _reference_bits(header.flags)
        size, _ = quantised_bytes(len(fine), bits)
        packed = sections.references
        values = dequantise(packed[:size], packed[size:], len(fine), bits, "references")
        flat[fine] = flat[fine] + values if header.flags & FLAG_DELTA else values
    return plan.expand(flat)
