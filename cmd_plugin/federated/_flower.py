"""Where Flower is imported, and the few things this room says in Flower's words."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from cmd_plugin.errors import require

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # read when Flower is imported
require("flwr", "federated")

from flwr.app import Array, ArrayRecord, Message, RecordDict  # noqa: E402 after the check above

from cmd_plugin.federated.frame import Frame  # noqa: E402

__all__ = [
    "FRAME_TYPE",
    "RESYNC",
    "UNUSABLE",
    "dense_record",
    "find_frame",
    "framed",
    "numpy_arrays",
    "payload_bytes",
    "serialised_bytes",
    "with_record",
]

RESYNC = 4100
"""Error code of a client that lacks what a frame builds on."""
UNUSABLE = 4101
"""Error code of a client that cannot use a frame or that trained something unusable."""

FRAME_TYPE = "cmd-plugin.frame.v1"
_KEY = "frame"


def numpy_arrays(record: ArrayRecord) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of a record by name."""
    return {name: array.numpy() for name, array in record.items()}


def dense_record(arrays: Mapping[str, npt.NDArray[Any]]) -> ArrayRecord:
    """Return named arrays as a record of Flower's own arrays."""
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


def framed(frame: Frame) -> ArrayRecord:
    """Return a record with the frame as its one opaque array.

    Its type is ours, so that a peer without the mod fails with Flower's "unsupported serialization
    type" instead of averaging bytes.
    """
    data = frame.pack()
    return ArrayRecord(
        {_KEY: Array(dtype="bytes", shape=(len(data),), stype=FRAME_TYPE, data=data)}
    )


def find_frame(content: RecordDict) -> tuple[str, Frame] | None:
    """Return the name of the framed record in a message and its frame; None if there is none.

    Raises:
        FrameError: If the frame is damaged.
    """
    for name, record in content.array_records.items():
        array = record.get(_KEY)
        if array is not None and array.stype == FRAME_TYPE:
            return name, Frame.unpack(array.data)
    return None


def with_record(content: RecordDict, name: str, record: ArrayRecord) -> RecordDict:
    """Return a copy of a message's content with one record replaced, in the same order.

    Flower's strategies give all messages of a round one content object: it must not be changed.
    """
    return RecordDict({key: record if key == name else value for key, value in content.items()})


def payload_bytes(content: RecordDict) -> int:
    """Return the payload of a message as Flower counts it: values, and names of the values."""
    return sum(_record_payload(record) for record in content.values())


def _record_payload(record: Any) -> int:
    try:
        return int(record.count_bytes())
    except (ValueError, IndexError):  # Flower cannot count empty texts and lists
        return sum(len(key) for key in record)


def serialised_bytes(message: Message) -> int:
    """Return the bytes of a message as Flower serialises it: the sum over its tree of objects.

    Equal objects of one message (two biases of zeros) are one object in Flower's store, and count
    once.
    """
    seen: dict[str, int] = {}

    def visit(thing: Any) -> None:
        children = thing.children or {}
        for identity, child in children.items():
            if identity not in seen:
                seen[identity] = len(child.deflate())
                visit(child)

    visit(message)
    return len(message.deflate()) + sum(seen.values())
