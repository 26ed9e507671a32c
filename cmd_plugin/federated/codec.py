"""The codec between a server and its clients: pure, and without a line of Flower."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from cmd_plugin.federated.frame import (
    FLAG_DELTA,
    FLAG_KEEP,
    FLAG_POOL,
    FLAG_REPLY_DELTA,
    FLAG_REPLY_ROTATED,
    FLAG_ROTATED,
    FLAG_SPARSE,
    KIND_DOWN,
    KIND_UP,
    Frame,
    FrameError,
    Header,
    NeedResync,
    Sections,
)
from cmd_plugin.federated.packing import Arrays, Flat, Packing, pack_arrays, unpack_arrays
from cmd_plugin.federated.plan import Plan
from cmd_plugin.federated.values import (
    Known,
    Received,
    decode_values,
    encode_values,
    free_positions,
)

__all__ = ["PROJECTIONS", "ModeCodec"]

PROJECTIONS = ("epoch", "step", "tie")
"""What clients do with embedded weights while they train; see :class:`CMDStrategy`."""

Bools = npt.NDArray[np.bool_]


class ModeCodec:
    """Turns the arrays of a model into one frame of bytes, and back.

    Weights that are embedded in the plan are not sent: the receiver computes them from the values
    of the references. Everything else that is modelled is sent as it is, or quantised. With an
    empty plan and no quantisation a round trip is lossless, bit for bit.

    The same object serves both ends. The server's plan is the truth and grows through
    :meth:`Plan.embed`; a client's is a cache that :meth:`receive` brings up to date.

    Args:
        packing: Which arrays there are and which are modelled; see :meth:`Packing.of`.

    Attributes:
        packing: As given.
        plan: The embedded set.
        values: [N] values kept for frames that build on them, or None.
        values_identity: Their identity; 0 without values.
        statistics: BatchNorm's statistics that stay with this client, by name.
    """

    def __init__(self, packing: Packing) -> None:
        self.packing = packing
        self.plan = Plan(packing.layout.numel)
        self.values: Flat | None = None
        self.values_identity = 0
        self.statistics: dict[str, npt.NDArray[Any]] = {}

    @property
    def known(self) -> Known:
        """What this end holds."""
        return Known(self.packing.identity, self.plan.identity, self.values_identity)

    # -- down: server to client -------------------------------------------------------------------

    def send(
        self,
        flat: Flat,
        raw: Arrays,
        known: Known | None = None,
        *,
        header: Header | None = None,
        frozen: Bools | None = None,
        share: float = 1.0,
        rotation: int | None = None,
        result: int = 0,
    ) -> Frame:
        """Encode the global model for a client.

        Args:
            flat: [N] modelled weights, embedded ones on their curves.
            raw: The other arrays.
            known: What the client holds; a client whose layout is another gets everything.
            header: Round, bits and what is asked of the reply.
            frozen: [N] positions that keep the value the client has.
            share: Send only this share of the differences to :attr:`values`, the largest.
            rotation: Send the differences to :attr:`values`, rotated with this seed. What is left
                out has to be sent later, so their scale is the least-squares one.
            result: Identity of what the client will hold, if it has to keep it.
        """
        known = known or Known()
        header = header or Header(KIND_DOWN)
        base = known.values if known.values and known.values == self.values_identity else 0
        increments = None
        if known.layout == self.packing.identity:
            held = base and rotation is not None
            increments = self.plan.since(known.plan, short=bool(held))
        builds_on = frozen is not None or share < 1.0 or rotation is not None
        full = increments is None or (builds_on and not base)
        if full:
            known, increments = Known(), self.plan.since(0)
            frozen_bytes = b"" if frozen is None else np.packbits(frozen).tobytes()
            free, share, delta, base, rotation = self.plan.free, 1.0, False, 0, None
        else:
            frozen_bytes = b"" if frozen is None else np.packbits(frozen).tobytes()
            free = free_positions(self.plan, frozen)
            delta = share < 1.0 or rotation is not None
            base = base if builds_on else 0
        vector = flat - self.values if delta and self.values is not None else flat
        encoded = encode_values(
            vector,
            free,
            self.plan.references,
            bits=header.bits,
            delta=delta,
            share=share,
            rotation=rotation,
            unbiased=False,
        )
        flags = header.flags | encoded.flags | (FLAG_KEEP if result else 0)
        return Frame(
            replace(
                header,
                kind=KIND_DOWN,
                flags=flags,
                layout=self.packing.identity,
                plan_before=known.plan,
                plan=self.plan.identity,
                base=base,
                result=result,
            ),
            Sections(
                layout=self.packing.to_json() if full else b"",
                increments=increments or b"",
                frozen=frozen_bytes,
                positions=encoded.positions,
                references=encoded.references,
                scales=encoded.scales,
                values=encoded.values,
                raw=pack_arrays(
                    self.packing.raw if full else self.packing.shared, raw, coarse=_coarse(flags)
                ),
            ),
        )

    @staticmethod
    def receive(codec: ModeCodec | None, frame: Frame) -> tuple[ModeCodec, Received]:
        """Decode a frame from the server, and bring a client's codec up to date.

        Args:
            codec: What the client remembers; None for nothing.
            frame: What came.

        Returns:
            The codec to remember, and the decoded model.

        Raises:
            NeedResync: If the frame builds on what this client does not hold.
            FrameError: If the frame is damaged.
        """
        header, sections = frame.header, frame.sections
        if header.kind != KIND_DOWN:
            raise FrameError("kind", f"expected a frame from the server, got kind {header.kind}.")
        full = bool(sections.layout)
        if full:
            fresh = ModeCodec(Packing.from_json(sections.layout))
            if fresh.packing.identity != header.layout:
                raise FrameError("layout", "its identity is not the one announced.")
            same = codec is not None and codec.packing.identity == header.layout
            if same and codec is not None and codec.statistics:
                fresh.statistics = codec.statistics
            codec = fresh
        elif codec is None or codec.packing.identity != header.layout:
            raise NeedResync("layout", f"layout {header.layout:016x} is not known here, resend.")
        if header.base and header.base != codec.values_identity:
            raise NeedResync("values", f"values {header.base:016x} are not known here, resend.")
        base = codec.values if header.base else None
        codec.plan.extend(header.plan_before, sections.increments, header.plan, base)
        frozen = codec._frozen(sections.frozen)
        free = codec.plan.free if full else free_positions(codec.plan, frozen)
        packing = codec.packing
        flat = decode_values(frame, free, codec.plan, base, packing.dtype)
        raw = unpack_arrays(
            packing.raw if full else packing.shared, sections.raw, coarse=_coarse(header.flags)
        )
        raw.update(codec.statistics)
        for name in packing.statistics.names:
            if name not in raw:
                raise NeedResync(repr(name), "it is not known here, resend.")
        packing.refuse_non_finite(flat, raw)
        keep = bool(header.flags & FLAG_KEEP)
        codec.values, codec.values_identity = (flat, header.result) if keep else (None, 0)
        arrays = packing.unflatten(flat, raw)
        return codec, Received(header, arrays, flat, free_positions(codec.plan, frozen))

    def _frozen(self, bitmap: bytes) -> Bools | None:
        if not bitmap:
            return None
        numel = self.plan.numel
        if len(bitmap) != -(-numel // 8):
            raise FrameError("frozen", f"the bitmap does not fit {numel} weights.")
        bits = np.unpackbits(np.frombuffer(bitmap, np.uint8), count=numel)
        return bits.astype(bool)

    # -- up: client to server ---------------------------------------------------------------------

    def reply(
        self,
        received: Received,
        arrays: Arrays,
        *,
        generator: np.random.Generator | None = None,
        residual: Flat | None = None,
        project: int = 0,
    ) -> Frame:
        """Encode what a client trained, as the server asked for it.

        Args:
            received: What the training started from.
            arrays: The trained model's arrays.
            generator: Source of the stochastic rounding and of the rotation.
            residual: [N] what earlier replies left out (error feedback); updated in place.
            project: What was done with embedded weights during the training; :class:`Header`'s.

        Raises:
            FrameError: If an array has another name, shape or dtype, or is not finite.
        """
        self.packing.check(arrays)
        asked = received.header
        flat = self.packing.flatten(arrays)
        self.packing.refuse_non_finite(
            flat, {name: arrays[name] for name in self.packing.raw.names}
        )
        self.statistics = {name: np.array(arrays[name]) for name in self.packing.statistics.names}
        if asked.flags & FLAG_POOL:
            self.plan.pool(flat, received.flat)
        delta = bool(asked.flags & FLAG_REPLY_DELTA)
        vector = flat - received.flat if delta else flat
        if residual is not None:
            vector = vector + residual
        rotation = None
        if asked.flags & FLAG_REPLY_ROTATED:
            rotation = 0 if generator is None else int(generator.integers(2**63))
        encoded = encode_values(
            vector,
            received.free,
            self.plan.references,
            bits=asked.reply_bits,
            delta=delta,
            share=asked.reply_share,
            generator=generator,
            rotation=rotation,
        )
        header = Header(
            KIND_UP,
            bits=asked.reply_bits,
            project=project,
            flags=encoded.flags,
            round=asked.round,
            layout=self.packing.identity,
            plan=self.plan.identity,
        )
        frame = Frame(
            header,
            Sections(
                positions=encoded.positions,
                references=encoded.references,
                scales=encoded.scales,
                values=encoded.values,
                raw=pack_arrays(self.packing.shared, arrays, coarse=_coarse(encoded.flags)),
            ),
        )
        if residual is not None:
            zero = np.zeros_like(vector)
            residual[:] = vector - decode_values(
                frame, received.free, self.plan, zero, self.packing.dtype
            )
        return frame

    def accept(
        self,
        frame: Frame,
        sent: Header,
        base: Flat,
        raw: Arrays,
        frozen: Bools | None = None,
    ) -> dict[str, npt.NDArray[Any]]:
        """Decode a client's reply on the server.

        Args:
            frame: The reply.
            sent: Header of the frame it answers.
            base: [N] weights that differences are added to and that left-out positions keep.
            raw: The server's other arrays, for statistics that stay with the client.
            frozen: [N] positions that were frozen in that frame.

        Returns:
            The client's model, name -> array.

        Raises:
            FrameError: If it is stale, of another layout or encoding, malformed, not finite, or no
                values of a network.
        """
        header = frame.header
        if header.kind != KIND_UP:
            raise FrameError("kind", f"expected a client's reply, got kind {header.kind}.")
        if header.layout != sent.layout:
            raise FrameError("layout", "the reply is for another model.")
        if header.round != sent.round:
            raise FrameError("round", f"stale: answers round {header.round}, not {sent.round}.")
        if header.plan != sent.plan:
            raise FrameError(
                "plan", f"stale: answers plan {header.plan:016x}, not {sent.plan:016x}."
            )
        asked = (
            bool(sent.flags & FLAG_REPLY_DELTA),
            bool(sent.flags & FLAG_REPLY_ROTATED),
            sent.reply_share < 1.0,
            sent.reply_bits,
        )
        found = (*(bool(header.flags & f) for f in (FLAG_DELTA, FLAG_ROTATED, FLAG_SPARSE)),)
        if asked != (*found, header.bits):
            raise FrameError("encoding", "the reply is not encoded as it was asked for.")
        free = free_positions(self.plan, frozen)
        flat = decode_values(frame, free, self.plan, base, self.packing.dtype)
        others = unpack_arrays(
            self.packing.shared, frame.sections.raw, coarse=_coarse(header.flags)
        )
        self.packing.refuse_non_finite(flat, others)
        self.packing.refuse_out_of_range(flat, others, base, raw)
        return self.packing.unflatten(flat, {**raw, **others})

    # -- memory -----------------------------------------------------------------------------------

    def to_bytes(self) -> dict[str, bytes]:
        """Return what a client has to remember, by name; :meth:`from_bytes` reads it."""
        parts = {"layout": self.packing.to_json(), "plan": self.plan.to_bytes()}
        if self.plan.short is not None:
            parts["short"] = self.plan.short[0].to_bytes(8, "little") + self.plan.short[1]
        if self.values is not None:
            parts["values"] = self.values_identity.to_bytes(8, "little") + self.values.tobytes()
        if self.statistics:
            parts["statistics"] = pack_arrays(self.packing.statistics, self.statistics)
        return parts

    @classmethod
    def from_bytes(cls, parts: Mapping[str, bytes]) -> ModeCodec:
        """Return the codec that :meth:`to_bytes` described."""
        codec = cls(Packing.from_json(parts["layout"]))
        codec.plan = Plan.from_bytes(parts["plan"])
        if "short" in parts:
            codec.plan.short = int.from_bytes(parts["short"][:8], "little"), parts["short"][8:]
        if "values" in parts:
            codec.values_identity = int.from_bytes(parts["values"][:8], "little")
            codec.values = np.frombuffer(parts["values"][8:], codec.packing.dtype).copy()
        if "statistics" in parts:
            codec.statistics = unpack_arrays(codec.packing.statistics, parts["statistics"])
        return codec


def _coarse(flags: int) -> bool:
    """Whether BatchNorm's statistics have 16 bits: in rotated frames, and in what asks for them."""
    return bool(flags & (FLAG_ROTATED | FLAG_REPLY_ROTATED))
