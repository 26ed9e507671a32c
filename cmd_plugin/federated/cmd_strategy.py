"""Embedded CMD between Flower's server and clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from flwr.serverapp.strategy import Strategy

from cmd_plugin.errors import InputError, PluginError, StateMismatch
from cmd_plugin.federated.codec import PROJECTIONS
from cmd_plugin.federated.eden import check_eden_bits
from cmd_plugin.federated.frame import (
    FLAG_POOL,
    FLAG_REPLY_DELTA,
    FLAG_REPLY_ROTATED,
    KIND_DOWN,
    Frame,
    Header,
)
from cmd_plugin.federated.held import HeldModel
from cmd_plugin.federated.packing import Flat
from cmd_plugin.federated.quantise import check_bits
from cmd_plugin.federated.strategy import FrameStrategy
from cmd_plugin.federated.values import Known
from cmd_plugin.modes import Embedding, Layout, OnlineModes

__all__ = ["CODINGS", "CMDStrategy"]

CODINGS = ("linear", "eden")
"""How values are quantised; see :class:`CMDStrategy`."""


class CMDStrategy(FrameStrategy):
    r"""Send fewer and fewer weights: those that follow a mode's reference are computed instead.

    The server follows the aggregated model with :class:`cmd_plugin.modes.OnlineModes`, one snapshot
    a round. For F = ``warmup`` rounds everything is sent, as in the inner strategy alone; round
    F + 1 fits the modes; from then on every ``embedding.every`` rounds the weights whose
    coefficients move least are embedded: their scale a and offset b are frozen and sent once, and
    neither the server nor a client sends their values again. Both compute
    :math:`w_i = a_i\, r_{m(i)} + b_i` from the references, which are always sent.

    What is embedded is the server's decision alone and the same for all clients, so averages of
    what is sent are averages of models: :math:`\sum_k p_k (a\, r_k + b) = a \sum_k p_k r_k + b`.
    After each round the global model itself is put on these curves; all clients start from the same
    bits, whether they took part before, come back, or are new.

    Clients use :func:`cmd_mod`, and with ``project="step"`` or ``"tie"`` train inside
    :func:`embedded_training`. ``embedding.slots`` concerns optimizers that live longer than a round
    and has no meaning here.

    Args:
        inner: The strategy that samples and aggregates: FedAvg, FedAvgM, FedProx, FedAdam ...
        embedding: Schedule; its ``project`` says what clients do while they train: ``"epoch"``
            nothing (embedded weights train along and are put back at the round's end), ``"step"``
            put them back after every step, ``"tie"`` train through the references.
        modes: Largest number of modes M, 1..256.
        warmup: Rounds F in which the weights are only watched, at least 2.
        samples: Weights whose trajectories are clustered.
        bits: None sends values as they are; otherwise they are quantised in both directions, in
            every round. The server keeps exact weights, so that rounding errors do not accumulate.
        coding: ``"linear"``: 8 or 4 bits in blocks, weights on the way down, differences to them on
            the way up (stochastic rounding). References have 16 bits, coefficients are float16.
            ``"eden"``: 8, 4, 2 or 1 bits after a random rotation, differences in both directions,
            as in :class:`EDENStrategy`. References have 8 bits, as slopes have; offsets are not
            sent, every curve starts where the clients know the weight to be.
        memory: With ``"eden"``, whether clients remember the model they were sent. False sends the
            weights in 8 bits, and offsets: for runs in which a client seldom takes part twice
            running.
        pool: Let clients move each reference by what all weights on its curve did in the local
            training (their least-squares projection onto the curve; beyond the paper) instead of
            by what that one weight did. With ``project="step"`` every optimizer step is projected
            like this. Costs no bytes.
        seed: Seed of the draw of the samples.
        include: Globs (``conv*``) on names of arrays to model; empty means all.
        exclude: Globs (``conv*``) on names of arrays to send as they are.
        statistics: BatchNorm's running statistics, ``"average"`` or ``"local"``.
        max_examples: As in :class:`FrameStrategy`.
        max_update_ratio: As in :class:`FrameStrategy`.

    Raises:
        InputError: If an argument is out of range.
    """

    def __init__(
        self,
        inner: Strategy,
        embedding: Embedding | None = None,
        *,
        modes: int = 10,
        warmup: int = 20,
        samples: int = 1000,
        bits: int | None = None,
        coding: str = "linear",
        memory: bool = True,
        pool: bool = False,
        seed: int = 0,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        statistics: str = "average",
        max_examples: float = 1e9,
        max_update_ratio: float | None = 100.0,
    ) -> None:
        super().__init__(
            inner,
            include=include,
            exclude=exclude,
            statistics=statistics,
            max_examples=max_examples,
            max_update_ratio=max_update_ratio,
        )
        self.embedding = Embedding() if embedding is None else embedding
        if self.embedding.project not in PROJECTIONS:
            raise InputError(
                f"project={self.embedding.project!r} is said here by project='step' and pool=True, "
                "which also pools what clients send."
            )
        if coding not in CODINGS:
            raise InputError(f"coding must be one of {', '.join(CODINGS)}, got {coding!r}.")
        self.rotated = coding == "eden" and bits is not None
        self.bits = check_eden_bits(bits) if self.rotated and bits else check_bits(bits)
        self.pool = pool
        self._held = HeldModel() if self.rotated and memory else None
        self._settings |= {
            "embedding": asdict(self.embedding),
            "modes": modes,
            "warmup": warmup,
            "samples": samples,
            "bits": bits,
            "coding": coding,
            "memory": memory,
            "pool": pool,
            "seed": seed,
        }
        self._follow = partial(
            OnlineModes,
            modes=modes,
            warmup=warmup,
            samples=samples,
            seed=seed,
            embedding=self.embedding,
        )
        self._follow(Layout.of_vector(1))  # a wrong setting is told now, not in the first round
        self._modes: OnlineModes | None = None

    @property
    def modes(self) -> OnlineModes:
        """The server's record of the global model; there from the end of the first round on."""
        if self._modes is None:
            raise PluginError("no round has ended yet, so no snapshot was taken.")
        return self._modes

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next round depends on; see :meth:`FrameStrategy.state_dict`."""
        modes = None if self._modes is None else self._modes.state_dict()
        held = None if self._held is None else self._held.state_dict()
        return {**super().state_dict(), "modes": modes, "held": held}

    def _read_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        changes = super()._read_state(state)
        modes = None
        if state["modes"] is not None:
            modes = self._follow(changes["_codec"].packing.layout)
            modes.load_state_dict(state["modes"])
        held = None
        if (state["held"] is None) != (self._held is None):
            raise StateMismatch("'held' does not fit the settings bits, coding and memory.")
        if self._held is not None:
            held = HeldModel.from_state(state["held"], changes["_codec"])
        return {**changes, "_modes": modes, "_held": held}

    def _header(self) -> Header:
        return Header(
            KIND_DOWN,
            bits=8 if self.rotated and self._held is None else self.bits,
            reply_bits=self.bits,
            project=PROJECTIONS.index(self.embedding.project),
            flags=(FLAG_REPLY_DELTA if self.bits else 0)
            | (FLAG_REPLY_ROTATED if self.rotated else 0)
            | (FLAG_POOL if self.pool else 0),
            round=self.round,
        )

    def prepare(self) -> None:
        """Decide what clients will hold, if they remember it."""
        if self._held is not None:
            self._held.advance(self.codec, self.flat, self.raw, self._header())

    def frame_for(self, known: Known) -> Frame:
        """Return the free values, and what the client lacks of the plan."""
        header = self._header()
        if self._held is not None:
            return self._held.frame_for(self.codec, self.flat, self.raw, header, known)
        return self.codec.send(self.flat, self.raw, known, header=header)

    def advance(self, flat: Flat) -> Flat:
        """Take a snapshot of the new global model, and embed if it is time."""
        plan = self.codec.plan
        plan.expand(flat)
        if self._modes is None:
            self._modes = self._follow(self.codec.packing.layout)
        self._modes.update(torch.from_numpy(flat), label=self.round)
        chosen = self._modes.embedded.numpy() & ~plan.embedded
        if chosen.any():
            members = np.flatnonzero(chosen)
            plan.embed(
                members,
                self._modes.assignment.numpy()[members],
                self._modes.scale.numpy()[members],
                self._modes.offset.numpy()[members],
                self._modes.references.numpy(),
                half=bool(self.bits),
                held=None if self._held is None else self._held.values,
            )
            plan.expand(flat)
        return flat
