"""What one would use instead: freezing of settled weights, top-k, and quantised updates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from flwr.serverapp.strategy import Strategy

from cmd_plugin.errors import InputError
from cmd_plugin.federated.codec import ModeCodec
from cmd_plugin.federated.eden import check_eden_bits
from cmd_plugin.federated.frame import (
    FLAG_REPLY_DELTA,
    FLAG_REPLY_ROTATED,
    KIND_DOWN,
    Frame,
    Header,
)
from cmd_plugin.federated.held import HeldModel, identity_of, read_vector
from cmd_plugin.federated.packing import Flat
from cmd_plugin.federated.quantise import check_bits
from cmd_plugin.federated.strategy import FrameStrategy
from cmd_plugin.federated.values import Known

__all__ = ["APFStrategy", "EDENStrategy", "FedPAQStrategy", "TopKStrategy"]


class APFStrategy(FrameStrategy):
    r"""Adaptive Parameter Freezing (Chen et al., ICDCS 2021): do not send weights that oscillate.

    For every weight that was sent, moving averages E of the global update and A of its absolute
    value give the effective perturbation ``|E| / A``. Below the threshold the weight has settled:
    it keeps its value for a period that grows by one round each time, and shrinks to half when it
    is found moving. When more than 80 % are frozen the threshold is halved.

    The paper's clients derive the mask themselves. Here the server sends it, N / 8 bytes a message,
    so that clients may come and go; :attr:`mask_bytes` says how much that was.

    Args:
        inner: The strategy that samples and aggregates.
        threshold: Effective perturbation below which a weight has settled (the paper's text, as
            cited, has 0.05, its code 0.01).
        decay: Decay of the moving averages per round, in (0, 1); 0.99 in the paper's code, which
            checks far more often than a run of some dozens of rounds does.
        aggressive: A-APF: also freeze each moving weight for one round with probability 1/2.
        seed: Seed of that.
        statistics: BatchNorm's running statistics, ``"average"`` or ``"local"``.
        max_examples: As in :class:`FrameStrategy`.
        max_update_ratio: As in :class:`FrameStrategy`.

    Attributes:
        mask_bytes: Bytes of masks sent so far.
    """

    _VECTORS: ClassVar[dict[str, type]] = {
        "_mask": np.bool_,
        "_mean": np.float64,
        "_absolute": np.float64,
        "_period": np.int64,
        "_until": np.int64,
    }

    def __init__(
        self,
        inner: Strategy,
        *,
        threshold: float = 0.05,
        decay: float = 0.9,
        aggressive: bool = False,
        seed: int = 0,
        statistics: str = "average",
        max_examples: float = 1e9,
        max_update_ratio: float | None = 100.0,
    ) -> None:
        super().__init__(
            inner,
            statistics=statistics,
            max_examples=max_examples,
            max_update_ratio=max_update_ratio,
        )
        if not threshold > 0.0:
            raise InputError(f"threshold must be above 0, got {threshold!r}.")
        if not 0.0 < decay < 1.0:
            raise InputError(f"decay must lie in (0, 1), got {decay!r}.")
        self.threshold = threshold
        self.decay = decay
        self.aggressive = aggressive
        self._settings |= {
            "threshold": threshold,
            "decay": decay,
            "aggressive": aggressive,
            "seed": seed,
        }
        self.mask_bytes = 0
        self._generator = np.random.default_rng(seed)
        self._mask: npt.NDArray[np.bool_] | None = None
        self._values = 0

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next round depends on; see :meth:`FrameStrategy.state_dict`."""
        vectors = None
        if self._mask is not None:
            vectors = {name: torch.from_numpy(getattr(self, name).copy()) for name in self._VECTORS}
        return {
            **super().state_dict(),
            "threshold": self.threshold,
            "mask_bytes": self.mask_bytes,
            "generator": self._generator.bit_generator.state,
            "values": self._values,
            "vectors": vectors,
        }

    def _read_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        changes = super()._read_state(state)
        generator = np.random.default_rng()
        generator.bit_generator.state = state["generator"]
        vectors: dict[str, Any] = {"_mask": None}
        if state["vectors"] is not None:
            numel = changes["_codec"].plan.numel
            vectors = {
                name: read_vector(state["vectors"][name], dtype, numel)
                for name, dtype in self._VECTORS.items()
            }
        return {
            **changes,
            **vectors,
            "threshold": float(state["threshold"]),
            "mask_bytes": int(state["mask_bytes"]),
            "_generator": generator,
            "_values": int(state["values"]),
        }

    @property
    def frozen(self) -> npt.NDArray[np.bool_] | None:
        """[N] bool weights that keep their value in this round."""
        return self._mask

    @property
    def embedded_fraction(self) -> float:
        """Share of weights that are frozen."""
        return 0.0 if self._mask is None else float(self._mask.mean())

    def prepare(self) -> None:
        """Name what clients held before, whose frozen weights have not moved, and will hold."""
        self.codec.values_identity, self._values = self._values, identity_of(self.flat)

    def frame_for(self, known: Known) -> Frame:
        """Return the values that are not frozen, and the mask."""
        header = Header(KIND_DOWN, round=self.round)
        mask = self._mask if self._mask is not None and self._mask.any() else None
        frame = self.codec.send(
            self.flat, self.raw, known, header=header, frozen=mask, result=self._values
        )
        self.mask_bytes += len(frame.sections.frozen)
        return frame

    def advance(self, flat: Flat) -> Flat:
        """Update perturbations, periods and the mask."""
        before, now = self.flat, self.round
        if self._mask is None:
            count = flat.size
            self._mask = np.zeros(count, dtype=bool)
            self._mean, self._absolute = np.zeros(count), np.zeros(count)
            self._period = np.zeros(count, dtype=np.int64)
            self._until = np.zeros(count, dtype=np.int64)
        sent = ~self._mask
        flat[self._mask] = before[self._mask]
        update = (flat - before).astype(np.float64)[sent]
        keep = self.decay
        self._mean[sent] = keep * self._mean[sent] + (1.0 - keep) * update
        self._absolute[sent] = keep * self._absolute[sent] + (1.0 - keep) * np.abs(update)
        perturbation = np.abs(self._mean) / np.maximum(self._absolute, 1e-300)
        settled = sent & (perturbation < self.threshold)
        moving = sent & ~settled
        self._period[settled] += 1
        self._period[moving] //= 2
        self._until[sent] = now + self._period[sent]
        if self.aggressive:
            drawn = self._generator.random(flat.size) < 0.5
            extra = moving & drawn
            self._until[extra] = np.maximum(self._until[extra], now + 1)
        self._mask = self._until > now
        if self._mask.mean() > 0.8:
            self.threshold /= 2.0
        return flat


class TopKStrategy(FrameStrategy):
    """Send only the largest differences, in both directions, and the rest later (error feedback).

    Clients send the ``share`` of their largest differences and remember what they left out; so does
    the server, relative to what its clients hold (as in DoubleSqueeze, Tang et al. 2019, and sparse
    ternary compression, Sattler et al. 2019). A client that missed a round gets the whole model.

    Args:
        inner: The strategy that samples and aggregates.
        share: Share of the weights in each message, in (0, 1).
        statistics: BatchNorm's running statistics, ``"average"`` or ``"local"``.
        max_examples: As in :class:`FrameStrategy`.
        max_update_ratio: As in :class:`FrameStrategy`.
    """

    def __init__(
        self,
        inner: Strategy,
        *,
        share: float = 0.1,
        statistics: str = "average",
        max_examples: float = 1e9,
        max_update_ratio: float | None = 100.0,
    ) -> None:
        super().__init__(
            inner,
            statistics=statistics,
            max_examples=max_examples,
            max_update_ratio=max_update_ratio,
        )
        if not 0.0 < share < 1.0:
            raise InputError(f"share must lie in (0, 1), got {share!r}.")
        self.share = share
        self._result = 0
        self._frame: Frame | None = None
        self._view: Flat | None = None
        self._settings |= {"share": share}

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next round depends on; see :meth:`FrameStrategy.state_dict`."""
        view = None if self._view is None else torch.from_numpy(self._view.copy())
        return {**super().state_dict(), "view": view, "result": self._result}

    def _read_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        changes = super()._read_state(state)
        view = None
        if state["view"] is not None:
            codec = changes["_codec"]
            view = read_vector(state["view"], codec.packing.dtype, codec.plan.numel)
        return {**changes, "_view": view, "_result": int(state["result"]), "_frame": None}

    def prepare(self) -> None:
        """Choose the differences to send, and compute what clients will hold then."""
        codec, flat = self.codec, self.flat
        if self._view is None:
            self._view, self._result = flat.copy(), identity_of(flat)
            return
        codec.values, codec.values_identity = self._view, self._result
        # What a client computes from the frame is what it will hold.
        client = ModeCodec(codec.packing)
        client.values, client.values_identity = self._view, self._result
        _, received = ModeCodec.receive(client, self._sparse(result=1))
        self._view, self._result = received.flat, identity_of(received.flat)
        self._frame = self._sparse(result=self._result)

    def _sparse(self, result: int) -> Frame:
        return self.codec.send(
            self.flat,
            self.raw,
            self.codec.known,
            header=self._header(),
            share=self.share,
            result=result,
        )

    def _header(self) -> Header:
        return Header(KIND_DOWN, round=self.round, reply_share=self.share, flags=FLAG_REPLY_DELTA)

    def frame_for(self, known: Known) -> Frame:
        """Return the differences, or the whole model for a client that lacks the last one."""
        codec = self.codec
        if self._frame is not None and known == codec.known:
            return self._frame
        whole = self.flat if self._view is None else self._view
        return codec.send(whole, self.raw, Known(), header=self._header(), result=self._result)


class FedPAQStrategy(FrameStrategy):
    """FedPAQ (Reisizadeh et al., AISTATS 2020): clients send quantised differences.

    The way down is exact. Stochastic rounding in blocks of 256 values; see
    :func:`cmd_plugin.federated.quantise.quantise`.

    Args:
        inner: The strategy that samples and aggregates.
        bits: Bits of a difference, 8 or 4.
        statistics: BatchNorm's running statistics, ``"average"`` or ``"local"``.
        max_examples: As in :class:`FrameStrategy`.
        max_update_ratio: As in :class:`FrameStrategy`.
    """

    def __init__(
        self,
        inner: Strategy,
        *,
        bits: int = 8,
        statistics: str = "average",
        max_examples: float = 1e9,
        max_update_ratio: float | None = 100.0,
    ) -> None:
        super().__init__(
            inner,
            statistics=statistics,
            max_examples=max_examples,
            max_update_ratio=max_update_ratio,
        )
        self.bits = check_bits(bits)
        self._settings |= {"bits": bits}

    def frame_for(self, known: Known) -> Frame:
        """Return the whole model."""
        header = Header(KIND_DOWN, round=self.round, reply_bits=self.bits, flags=FLAG_REPLY_DELTA)
        return self.codec.send(self.flat, self.raw, known, header=header)


class EDENStrategy(FrameStrategy):
    """EDEN (Vargaftik et al., ICML 2022): differences of 1, 2, 4 or 8 bits, rotated at random.

    Clients' differences are unbiased (:mod:`cmd_plugin.federated.eden`), and each has a rotation of
    its own, so that their errors cancel in the average. So that the way down is as cheap, clients
    remember the model they were sent and get what changed since, with the same bits and the error
    fed back (:class:`cmd_plugin.federated.held.HeldModel`). BatchNorm's statistics have 16 bits.

    Args:
        inner: The strategy that samples and aggregates.
        bits: Bits of a difference, 1, 2, 4 or 8.
        memory: As said. False sends the weights themselves, in 8 bits: for runs in which a client
            seldom takes part twice running, because what it remembers is out of date then and it
            has to be sent exact weights.
        statistics: BatchNorm's running statistics, ``"average"`` or ``"local"``.
        max_examples: As in :class:`FrameStrategy`.
        max_update_ratio: As in :class:`FrameStrategy`.
    """

    def __init__(
        self,
        inner: Strategy,
        *,
        bits: int = 2,
        memory: bool = True,
        statistics: str = "average",
        max_examples: float = 1e9,
        max_update_ratio: float | None = 100.0,
    ) -> None:
        super().__init__(
            inner,
            statistics=statistics,
            max_examples=max_examples,
            max_update_ratio=max_update_ratio,
        )
        self.bits = check_eden_bits(bits)
        self.memory = memory
        self._settings |= {"bits": bits, "memory": memory}
        self._held = HeldModel()

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next round depends on; see :meth:`FrameStrategy.state_dict`."""
        return {**super().state_dict(), "held": self._held.state_dict()}

    def _read_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        changes = super()._read_state(state)
        return {**changes, "_held": HeldModel.from_state(state["held"], changes["_codec"])}

    def _header(self) -> Header:
        return Header(
            KIND_DOWN,
            bits=self.bits if self.memory else 8,
            reply_bits=self.bits,
            flags=FLAG_REPLY_DELTA | FLAG_REPLY_ROTATED,
            round=self.round,
        )

    def prepare(self) -> None:
        """Decide what clients will hold."""
        if self.memory:
            self._held.advance(self.codec, self.flat, self.raw, self._header())

    def frame_for(self, known: Known) -> Frame:
        """Return what changed since a client's last frame, or the weights."""
        if self.memory:
            return self._held.frame_for(self.codec, self.flat, self.raw, self._header(), known)
        return self.codec.send(self.flat, self.raw, known, header=self._header())
