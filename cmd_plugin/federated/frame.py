"""The one opaque frame a message carries: a checked header and eight sections of bytes.

Nothing here knows Flower. A frame is self-describing enough to be refused for a reason: magic,
version, lengths and a CRC-32 are checked before anything is read.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import astuple, dataclass, fields

from cmd_plugin.errors import InputError

__all__ = [
    "FLAG_DELTA",
    "FLAG_INDEXED",
    "FLAG_KEEP",
    "FLAG_POOL",
    "FLAG_REPLY_DELTA",
    "FLAG_REPLY_ROTATED",
    "FLAG_ROTATED",
    "FLAG_SPARSE",
    "KIND_DOWN",
    "KIND_UP",
    "OVERHEAD",
    "Frame",
    "FrameError",
    "Header",
    "NeedResync",
    "Sections",
]

KIND_DOWN, KIND_UP = 1, 2

FLAG_DELTA = 1
"""Values are differences to what the receiver holds."""
FLAG_SPARSE = 2
"""Only some of the free positions have a value; the section ``positions`` says which."""
FLAG_INDEXED = 4
"""``positions`` is a list of uint32, otherwise a bitmap over the free positions."""
FLAG_KEEP = 8
"""The receiver must keep the decoded values, later frames build on them."""
FLAG_REPLY_DELTA = 16
"""The reply is to hold differences to the decoded values."""

FLAG_POOL = 32
"""The reply's references are to hold the motion of all weights that follow them."""

FLAG_ROTATED = 64
"""Values were rotated at random before they were quantised (EDEN)."""
FLAG_REPLY_ROTATED = 128
"""Those of the reply are to be."""

_MAGIC = b"CMDF"
_VERSION = 1


class FrameError(InputError):
    """A frame cannot be used.

    Attributes:
        field: What was wrong: a part of the frame or the name of a tensor.
        reason: Why.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason

    def __reduce__(self) -> tuple[type[FrameError], tuple[str, str]]:
        """Pickle as field and reason."""
        return type(self), (self.field, self.reason)


class NeedResync(FrameError):
    """The receiver lacks what the frame builds on: the sender must send everything once."""


@dataclass(frozen=True)
class Header:
    """The fixed part of a frame.

    Attributes:
        kind: :data:`KIND_DOWN` from the server or :data:`KIND_UP` from a client.
        bits: Bits of a value; 0 sends it as it is.
        reply_bits: Bits of a value in the reply asked for; 0 as it is.
        project: What a client does with embedded weights while it trains: 0 nothing, 1 put them
            back on their curve after every step, 2 also hand their gradients to the references. In
            a reply: what it did.
        flags: Sum of the ``FLAG_...`` values.
        round: Number of the round; a reply repeats it.
        layout: Identity of the layout.
        plan_before: Identity of the plan the sections ``increments`` continue; 0 none.
        plan: Identity of the plan the values are for; 0 nothing embedded.
        base: Identity of the values the frame builds on; 0 none.
        result: Identity of the decoded values, if they are to be kept; 0 otherwise.
        reply_share: Share of the values the reply may hold, in (0, 1]; 1 means all.
    """

    kind: int
    bits: int = 0
    reply_bits: int = 0
    project: int = 0
    flags: int = 0
    round: int = 0
    layout: int = 0
    plan_before: int = 0
    plan: int = 0
    base: int = 0
    result: int = 0
    reply_share: float = 1.0


@dataclass(frozen=True)
class Sections:
    """The variable parts of a frame, in their order.

    Attributes:
        layout: Layout as JSON, in a frame for a receiver that knows nothing.
        increments: Parts of the plan the receiver lacks.
        frozen: Bitmap of [N] positions that keep the value the receiver has (APF).
        positions: Positions of the values if they are sparse.
        references: Values of the references in 16 bits, when the others have fewer.
        scales: Scales of the quantiser.
        values: The values.
        raw: Tensors that are not modelled, as they are.
    """

    layout: bytes = b""
    increments: bytes = b""
    frozen: bytes = b""
    positions: bytes = b""
    references: bytes = b""
    scales: bytes = b""
    values: bytes = b""
    raw: bytes = b""


_SECTIONS = tuple(field.name for field in fields(Sections))
_HEAD = struct.Struct(f"<4sBBBBBHIQQQQQd{len(_SECTIONS)}Q")
_CHECK = struct.Struct("<I")

OVERHEAD = _HEAD.size + _CHECK.size
"""Bytes of a frame beside its sections."""


@dataclass(frozen=True)
class Frame:
    """Header and sections, and their bytes."""

    header: Header
    sections: Sections

    def pack(self) -> bytes:
        """Return the frame as bytes."""
        parts = astuple(self.sections)
        lengths = (len(part) for part in parts)
        head = _HEAD.pack(_MAGIC, _VERSION, *astuple(self.header), *lengths)
        body = b"".join((head, *parts))
        return body + _CHECK.pack(zlib.crc32(body))

    @classmethod
    def unpack(cls, data: bytes) -> Frame:
        """Read a frame.

        Raises:
            FrameError: If it is cut short, damaged, or of another version.
        """
        if len(data) < OVERHEAD:
            raise FrameError("header", f"{len(data)} bytes are too few for a frame.")
        magic, version, *rest = _HEAD.unpack_from(data)
        if magic != _MAGIC:
            raise FrameError("header", "this is not a frame of cmd-plugin (bad magic).")
        if version != _VERSION:
            raise FrameError(
                "version", f"frame version {version}, this package reads {_VERSION}: update one."
            )
        header, lengths = Header(*rest[: -len(_SECTIONS)]), rest[-len(_SECTIONS) :]
        if sum(lengths) + OVERHEAD != len(data):
            raise FrameError(
                "length", f"{sum(lengths) + OVERHEAD} bytes announced, {len(data)} received."
            )
        (check,) = _CHECK.unpack_from(data, len(data) - _CHECK.size)
        if zlib.crc32(data[: -_CHECK.size]) != check:
            raise FrameError("checksum", "the frame was damaged on its way (CRC-32 mismatch).")
        parts, at = [], _HEAD.size
        for length in lengths:
            parts.append(data[at : at + length])
            at += length
        return cls(header, Sections(*parts))
