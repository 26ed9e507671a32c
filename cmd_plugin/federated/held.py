"""What all clients hold, and the frames that bring them from one round's values to the next."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cmd_plugin.errors import StateMismatch
from cmd_plugin.federated.codec import ModeCodec
from cmd_plugin.federated.frame import Frame, Header
from cmd_plugin.federated.packing import Arrays, Flat
from cmd_plugin.federated.values import Known, decode_values

__all__ = ["HeldModel", "identity_of", "read_vector"]

_FIRST_BITS = 8
"""Of the first values anybody holds: all later frames make up for what rounding took."""


def identity_of(flat: Flat) -> int:
    """Return a 64-bit hash of values, never 0."""
    return int.from_bytes(hashlib.sha256(flat.tobytes()).digest()[:8], "little") or 1


def read_vector(tensor: Tensor, dtype: Any, numel: int) -> npt.NDArray[Any]:
    """Return a saved vector as an array of its own.

    Raises:
        StateMismatch: If it is not [numel] of that dtype.
    """
    array = np.array(tensor.numpy())
    if array.shape != (numel,) or array.dtype != dtype:
        raise StateMismatch(
            f"a saved vector is {array.dtype} {list(array.shape)}, expected {np.dtype(dtype)} "
            f"[{numel}]: use the same model."
        )
    return array


class HeldModel:
    """The global model as clients know it: differences to it are sent, rotated and quantised.

    What a difference loses is part of the next one (error feedback on the server). In the first
    phase everybody gets the weights in 8 bits; a client that is not up to date later gets these
    values as they are.

    Attributes:
        values: [N] what clients hold after the present phase; None before the first.
        identity: Its identity; 0 before the first phase.
    """

    def __init__(self) -> None:
        self.values: Flat | None = None
        self.identity = 0
        self._first = False
        self._frames: dict[Known, Frame] = {}

    def advance(self, codec: ModeCodec, flat: Flat, raw: Arrays, header: Header) -> None:
        """Decide what clients will hold: the global model [N], as far as it fits into a frame."""
        self._frames = {}
        codec.values, codec.values_identity = self.values, self.identity
        self._first = self.values is None
        # Values are the same for all; the identity is that of what is decoded from them.
        frame = self._send(codec, flat, raw, header, codec.known, result=1)
        plan = codec.plan
        self.values = decode_values(frame, plan.free, plan, self.values, codec.packing.dtype)
        self.identity = identity_of(self.values)

    def frame_for(
        self, codec: ModeCodec, flat: Flat, raw: Arrays, header: Header, known: Known
    ) -> Frame:
        """Return the frame after which a client that holds ``known`` holds :attr:`values`."""
        if known not in self._frames:
            same = known.layout == codec.packing.identity and known.values == codec.values_identity
            if self._first or (same and codec.plan.since(known.plan) is not None):
                frame = self._send(codec, flat, raw, header, known, result=self.identity)
            else:
                whole = flat if self.values is None else self.values
                exact = replace(header, bits=0)
                frame = codec.send(whole, raw, known, header=exact, result=self.identity)
            self._frames[known] = frame
        return self._frames[known]

    def _send(
        self, codec: ModeCodec, flat: Flat, raw: Arrays, header: Header, known: Known, result: int
    ) -> Frame:
        if self._first:
            first = replace(header, bits=_FIRST_BITS)
            return codec.send(flat, raw, known, header=first, result=result)
        return codec.send(flat, raw, known, header=header, rotation=header.round, result=result)

    def state_dict(self) -> dict[str, Any]:
        """Return what the next phase depends on."""
        values = None if self.values is None else torch.from_numpy(self.values.copy())
        return {"values": values, "identity": self.identity}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], codec: ModeCodec | None) -> HeldModel:
        """Return what :meth:`state_dict` described.

        Raises:
            StateMismatch: If it is of another model.
        """
        held = cls()
        if state["values"] is not None and codec is not None:
            held.values = read_vector(state["values"], codec.packing.dtype, codec.plan.numel)
        held.identity = int(state["identity"])
        return held
