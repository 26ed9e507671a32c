"""The client's side on Flower: a mod that decodes what comes and encodes what goes."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Error, Message, MessageType

from cmd_plugin.federated._flower import (
    RESYNC,
    UNUSABLE,
    dense_record,
    find_frame,
    framed,
    numpy_arrays,
    with_record,
)
from cmd_plugin.federated.codec import ModeCodec
from cmd_plugin.federated.frame import FLAG_POOL, FrameError, NeedResync
from cmd_plugin.federated.packing import Flat
from cmd_plugin.federated.values import Received

__all__ = ["cmd_mod", "load_codec", "load_request", "note_obeyed", "project_mod"]

_STATE = "cmd-plugin"
_STATE_TYPE = "cmd-plugin.state.v1"
_RESIDUAL = "residual"
_PROJECT = "project"
_OBEYED = "obeyed"

Next = Callable[[Message, Context], Message]


def cmd_mod(message: Message, context: Context, call_next: Next) -> Message:
    """Flower mod for clients: the app sees and returns plain arrays, the wire carries frames.

    Put it first in ``ClientApp(mods=[cmd_mod, ...])``. It obeys the frame: which weights are
    embedded, how values are encoded and what the reply has to hold is the server's decision, so one
    mod serves :class:`CMDStrategy` and every other strategy of this room. A message without a frame
    passes untouched.

    What it remembers (the plan, about nine bytes per embedded weight) lies in ``context.state``.
    That is a cache: where it was lost, the client answers with an error that makes the server send
    everything once, within the same round.
    """
    try:
        found = find_frame(message.content)
        if found is None:
            return call_next(message, context)
        name, frame = found
        codec, received = ModeCodec.receive(load_codec(context), frame)
    except NeedResync as error:
        return Message(Error(RESYNC, str(error)), reply_to=message)
    except FrameError as error:
        return Message(Error(UNUSABLE, str(error)), reply_to=message)
    residual = _load_residual(context, codec, received)
    _save(context, codec, received, residual)
    message.content = with_record(message.content, name, dense_record(received.arrays))
    reply = call_next(message, context)
    if reply.has_error() or message.metadata.message_type.split(".")[0] != MessageType.TRAIN:
        return reply
    records = reply.content.array_records
    if len(records) != 1:
        text = f"the reply holds {len(records)} ArrayRecords: return exactly one."
        return Message(Error(UNUSABLE, text), reply_to=message)
    (key,) = records
    try:
        arrays = numpy_arrays(records[key])
        answer = codec.reply(
            received,
            arrays,
            generator=_generator(context, received),
            residual=residual,
            project=received.header.project if _obeyed(context) else 0,
        )
    except FrameError as error:
        return Message(Error(UNUSABLE, str(error)), reply_to=message)
    _save(context, codec, received, residual)
    reply.content = with_record(reply.content, key, framed(answer))
    return reply


def project_mod(message: Message, context: Context, call_next: Next) -> Message:
    """Flower mod that puts embedded weights of a trained model back on their curves.

    For client-side differential privacy, as the innermost mod: what a clipping mod outside of it
    measures is then what the server will decode. Order:
    ``mods=[cmd_mod, fixedclipping_mod, project_mod]``.
    """
    reply = call_next(message, context)
    codec = load_codec(context)
    if codec is None or reply.has_error() or not reply.content.array_records:
        return reply
    content = reply.content
    for key, record in list(content.array_records.items()):
        arrays = numpy_arrays(record)
        try:
            codec.packing.check(arrays)
        except FrameError as error:
            return Message(Error(UNUSABLE, str(error)), reply_to=message)
        flat = codec.plan.expand(codec.packing.flatten(arrays))
        content = with_record(content, key, dense_record(codec.packing.unflatten(flat, arrays)))
    reply.content = content
    return reply


def load_codec(context: Context) -> ModeCodec | None:
    """Return the codec a client remembers; None if it remembers nothing that can be read."""
    record = context.state.get(_STATE)
    if not isinstance(record, ArrayRecord):
        return None
    parts = {name: array.data for name, array in record.items() if array.stype == _STATE_TYPE}
    try:
        return ModeCodec.from_bytes(parts)
    except (FrameError, KeyError, ValueError):  # a cache: what cannot be read is sent again
        return None


def load_request(context: Context) -> tuple[int, bool]:
    """Return what the server asked for while training: :class:`Header`'s project, and pooling."""
    record = context.state.get(_STATE)
    held = record.get(_PROJECT) if isinstance(record, ArrayRecord) else None
    return (0, False) if held is None or len(held.data) != 2 else (held.data[0], bool(held.data[1]))


def note_obeyed(context: Context) -> None:
    """Remember for the reply that this training does what the server asked for."""
    record = context.state.get(_STATE)
    if isinstance(record, ArrayRecord):
        record[_OBEYED] = Array(dtype="bytes", shape=(1,), stype=_STATE_TYPE, data=b"\1")


def _obeyed(context: Context) -> bool:
    record = context.state.get(_STATE)
    return isinstance(record, ArrayRecord) and _OBEYED in record


def _save(context: Context, codec: ModeCodec, received: Received, residual: Flat | None) -> None:
    parts = codec.to_bytes()
    header = received.header
    parts[_PROJECT] = bytes([header.project, bool(header.flags & FLAG_POOL)])
    if residual is not None:
        parts[_RESIDUAL] = residual.tobytes()
    context.state[_STATE] = ArrayRecord(
        {
            name: Array(dtype="bytes", shape=(len(data),), stype=_STATE_TYPE, data=data)
            for name, data in parts.items()
        }
    )


def _load_residual(context: Context, codec: ModeCodec, received: Received) -> Flat | None:
    """What earlier replies left out, zeros at first; None if replies leave nothing out."""
    if received.header.reply_share >= 1.0:
        return None
    record = context.state.get(_STATE)
    held = record.get(_RESIDUAL) if isinstance(record, ArrayRecord) else None
    numel, dtype = codec.plan.numel, codec.packing.dtype
    if held is None or len(held.data) != numel * dtype.itemsize:
        return np.zeros(numel, dtype)
    return np.frombuffer(held.data, dtype).copy()


def _generator(context: Context, received: Received) -> np.random.Generator | None:
    """Randomness of a reply's rounding: other for each client and round, the same in a rerun."""
    if not received.header.reply_bits:
        return None
    place = str(context.node_config.get("partition-id", context.node_id))
    return np.random.default_rng([received.header.round, zlib.crc32(place.encode())])
