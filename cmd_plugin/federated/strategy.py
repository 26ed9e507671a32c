"""The server's side on Flower: a strategy around a strategy that frames, checks and counts."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from cmd_plugin.errors import InputError, NonFiniteError, StateMismatch
from cmd_plugin.federated._flower import (
    RESYNC,
    dense_record,
    find_frame,
    framed,
    numpy_arrays,
    serialised_bytes,
    with_record,
)
from cmd_plugin.federated._memory import (
    bytes_of,
    require_same,
    restore_strategy,
    save_strategy,
    tensor_of,
)
from cmd_plugin.federated.codec import ModeCodec
from cmd_plugin.federated.frame import Frame, FrameError
from cmd_plugin.federated.packing import Arrays, Flat, Packing, check_statistics
from cmd_plugin.federated.traffic import Traffic
from cmd_plugin.federated.values import Known

__all__ = ["FrameStrategy", "Refusal"]

_log = logging.getLogger(__name__)

_VERSION = 1


@dataclass(frozen=True)
class Refusal:
    """An update that was left out of a round.

    Attributes:
        round: Number of the round.
        node: Flower's number of the client.
        field: What was wrong with it: a tensor, a part of the frame, a metric.
        reason: Why it was refused.
    """

    round: int
    node: int
    field: str
    reason: str

    def __str__(self) -> str:
        """One line for the log."""
        return f"round {self.round}: client {self.node} refused, {self.field}: {self.reason}"


@dataclass(frozen=True)
class _Sent:
    """What went to one node in the present phase."""

    message: Message
    frame: Frame
    key: str
    content: RecordDict


class FrameStrategy(Strategy):
    """Base of the strategies that send frames instead of arrays.

    It goes around any other strategy of Flower: ``inner`` samples clients, writes configurations
    and averages, and sees plain arrays. This class replaces the arrays on the way out by one frame
    each, and on the way back by the decoded arrays; it puts replies in order, refuses bad ones by
    client and field while the round goes on, resends everything once to a client that lost its
    state, pins dtypes (FedAdam returns float64) and counts bytes. Clients need
    :func:`cmd_mod`.

    Args:
        inner: The strategy that aggregates.
        include: Globs (``conv*``) on names of arrays to model; empty means all.
        exclude: Globs (``conv*``) on names of arrays to send as they are.
        statistics: BatchNorm's running statistics: ``"average"`` them like FedAvg does, or leave
            them ``"local"`` to each client; the server's then stay those of the initial model.

    Attributes:
        inner: As given.
        traffic: Bytes and messages so far, in both directions.
        refusals: Updates that were left out.
        round: Number of the present round.
        flat: [N] modelled weights of the global model; differences in replies are added to them.
        raw: Its other arrays.
        resyncs: How often a client was sent everything again because it had lost its state.
    """

    def __init__(
        self,
        inner: Strategy,
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        statistics: str = "average",
    ) -> None:
        if not isinstance(inner, Strategy):
            raise InputError(
                f"inner must be a strategy of flwr.serverapp.strategy, got {type(inner).__name__}."
            )
        check_statistics(statistics)
        self.inner = inner
        self.traffic = Traffic()
        self.refusals: list[Refusal] = []
        self.resyncs = 0
        self._settings: dict[str, Any] = {
            "include": list(include),
            "exclude": list(exclude),
            "statistics": statistics,
        }
        self._packing_of = partial(
            Packing.of, include=include, exclude=exclude, statistics=statistics
        )
        self._codec: ModeCodec | None = None
        self._known: dict[int, Known] = {}
        self._sent: dict[int, _Sent] = {}
        self._order: dict[int, int] = {}
        self._grid: Grid | None = None
        self.round = 0
        self.raw: Arrays = {}
        self.flat: Flat = np.empty(0, np.float32)

    # -- what a method decides --------------------------------------------------------------------

    @abstractmethod
    def frame_for(self, known: Known) -> Frame:
        """Return the frame for a client that holds ``known``."""

    def prepare(self) -> None:
        """Get ready to send :attr:`flat`; called once before each phase."""

    def advance(self, flat: Flat) -> Flat:
        """Take the aggregated weights [N] in, and return the new global ones."""
        return flat

    @property
    def frozen(self) -> npt.NDArray[Any] | None:
        """[N] bool positions that are not sent in this phase, beside the embedded ones."""
        return None

    # -- state ------------------------------------------------------------------------------------

    @property
    def codec(self) -> ModeCodec:
        """Layout and plan; there from the first round on."""
        if self._codec is None:
            raise InputError("this strategy has not seen a model yet: call start().")
        return self._codec

    @property
    def embedded_fraction(self) -> float:
        """Share of modelled weights that are embedded now."""
        return 0.0 if self._codec is None else self._codec.plan.fraction

    def summary(self) -> None:
        """Log the configuration of the inner strategy."""
        self.inner.summary()

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next round depends on, to be saved between two rounds.

        It holds tensors on the CPU, numbers, strings, None, lists and dicts only, so that
        ``torch.load(weights_only=True)`` reads it. The global model is not in it.

        Raises:
            InputError: If what the inner strategy remembers cannot be saved.
        """
        codec = None if self._codec is None else self._codec.to_bytes()
        return {
            "version": _VERSION,
            "kind": type(self).__name__,
            "settings": dict(self._settings),
            "inner": save_strategy(self.inner),
            "round": self.round,
            "codec": None if codec is None else {n: tensor_of(part) for n, part in codec.items()},
            "known": [[node, k.layout, k.plan, k.values] for node, k in self._known.items()],
            "traffic": self.traffic.state_dict(),
            "refusals": [[r.round, r.node, r.field, r.reason] for r in self.refusals],
            "resyncs": self.resyncs,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned, bit for bit.

        Raises:
            StateMismatch: If it is of another strategy, version, model or setting, or damaged;
                nothing is changed then.
        """
        named = {"version": _VERSION, "kind": type(self).__name__}
        require_same(state, named, "the saved strategy")
        try:
            require_same(state["settings"], self._settings, "the saved strategy")
            changes, inner = self._read_state(state), state["inner"]
        except StateMismatch:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise StateMismatch(
                f"the saved {named['kind']} is damaged ({error!r}): start anew."
            ) from error
        restore_strategy(self.inner, inner)
        for name, value in changes.items():
            setattr(self, name, value)

    def _read_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the attributes a state stands for, checked, by name; changes nothing."""
        codec = None
        if state["codec"] is not None:
            codec = ModeCodec.from_bytes({n: bytes_of(t) for n, t in state["codec"].items()})
            if self._codec is not None and codec.packing.identity != self.codec.packing.identity:
                raise StateMismatch("the saved strategy is of another model: use the same one.")
        return {
            "round": int(state["round"]),
            "_codec": codec,
            "_known": {
                int(node): Known(int(layout), int(plan), int(values))
                for node, layout, plan, values in state["known"]
            },
            "traffic": Traffic.from_state(state["traffic"]),
            "refusals": [Refusal(*refusal) for refusal in state["refusals"]],
            "resyncs": int(state["resyncs"]),
        }

    # -- out --------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the inner strategy write messages, then frame them."""
        return self._configure("configure_train", server_round, arrays, config, grid)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the inner strategy write messages, then frame them."""
        return self._configure("configure_evaluate", server_round, arrays, config, grid)

    def _configure(
        self, step: str, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        self._grid = grid
        named = numpy_arrays(arrays)
        if self._codec is None:
            self._codec = ModeCodec(self._packing_of(named))
        self.codec.packing.check(named)
        messages = list(getattr(self.inner, step)(server_round, arrays, config, grid))
        self._sent = {}
        if not messages:
            return []
        self.round = server_round
        self.flat = self.codec.packing.flatten(named)
        self.raw = {name: named[name] for name in self.codec.packing.raw.names}
        self.prepare()
        self._order = {node: place for place, node in enumerate(grid.get_node_ids())}
        return [self._framed(message) for message in messages]

    def _framed(self, message: Message) -> Message:
        content = message.content
        keys = list(content.array_records)
        if len(keys) != 1:
            raise InputError(
                f"the inner strategy sends {len(keys)} ArrayRecords in a message; exactly one can "
                "be framed."
            )
        plain = serialised_bytes(message)
        node = message.metadata.dst_node_id
        frame = self.frame_for(self._known.get(node, Known()))
        message.content = with_record(content, keys[0], framed(frame))
        self.traffic.count_down(message, plain)
        self._sent[node] = _Sent(message, frame, keys[0], content)
        return message

    # -- back -------------------------------------------------------------------------------------

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Decode the replies, let the inner strategy aggregate them, and advance."""
        accepted = self._decode(server_round, replies, training=True)
        arrays, metrics = self.inner.aggregate_train(server_round, accepted)
        if arrays is None:
            return None, metrics
        packing = self.codec.packing
        found = numpy_arrays(arrays)
        every = packing.arrays
        named = {
            name: self.raw[name]  # the inner strategy's average of equal arrays may be off
            if name in packing.kept
            else np.asarray(found[name]).astype(dtype).reshape(shape)
            for name, shape, dtype in zip(every.names, every.shapes, every.dtypes, strict=True)
        }
        flat = packing.flatten(named)
        try:
            packing.refuse_non_finite(flat, {})
        except FrameError as error:
            raise NonFiniteError(
                f"the aggregated model of round {server_round} is unusable, {error}: lower the "
                "learning rate of the inner strategy."
            ) from error
        flat = self.advance(flat)
        return dense_record(packing.unflatten(flat, named)), metrics

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Check the replies and let the inner strategy aggregate them."""
        accepted = self._decode(server_round, replies, training=False)
        return self.inner.aggregate_evaluate(server_round, accepted)

    def _decode(
        self, server_round: int, replies: Iterable[Message], *, training: bool
    ) -> list[Message]:
        """Return the usable replies in the order in which the grid lists their nodes."""
        accepted: dict[int, Message] = {}
        by_message = {s.message.metadata.message_id: node for node, s in self._sent.items()}
        for reply in self._with_resyncs(replies, by_message):
            # The engine answers for a client that is gone, with the SuperLink as the source.
            node = by_message.get(reply.metadata.reply_to_message_id, reply.metadata.src_node_id)
            sent = self._sent.get(node)
            if reply.has_error():
                self._refuse(server_round, node, "reply", reply.error.reason or "no reason given")
            elif sent is None or node in accepted:
                self._refuse(server_round, node, "reply", "nobody asked for it.")
            else:
                try:
                    if training:
                        self._restore(reply, sent)
                    self._check_metrics(reply)
                except FrameError as error:
                    self._refuse(server_round, node, error.field, error.reason)
                else:
                    accepted[node] = reply
                    self._acknowledge(node, sent.frame)
            self.traffic.plain_up += serialised_bytes(reply)
        self._drop_inconsistent(server_round, accepted)
        last = len(self._order)
        nodes = sorted(accepted, key=lambda node: (self._order.get(node, last), node))
        return [accepted[node] for node in nodes]

    def _with_resyncs(
        self, replies: Iterable[Message], by_message: dict[str, int]
    ) -> Iterable[Message]:
        """Yield the replies; those that ask for everything are asked again, once, with it."""
        again: list[Message] = []
        for reply in replies:
            self.traffic.count_up(reply)
            node = reply.metadata.src_node_id
            if not (reply.has_error() and reply.error.code == RESYNC and node in self._sent):
                yield reply
                continue
            old = self._sent[node]
            self.resyncs += 1
            frame = self.frame_for(Known())
            message = Message(
                with_record(old.content, old.key, framed(frame)),
                node,
                old.message.metadata.message_type,
            )
            self.traffic.count_down(message, 0)
            self._sent[node] = _Sent(message, frame, old.key, old.content)
            again.append(message)
        if again and self._grid is not None:
            answers = list(self._grid.send_and_receive(again))
            for message in again:
                by_message[message.metadata.message_id] = message.metadata.dst_node_id
            for answer in answers:
                self.traffic.count_up(answer)
                yield answer

    def _restore(self, reply: Message, sent: _Sent) -> None:
        """Replace the frame in a reply by the arrays it stands for."""
        found = find_frame(reply.content)
        if found is None:
            raise FrameError("frame", "there is none: the client needs cmd_mod.")
        if len(reply.content.array_records) != 1:
            raise FrameError("reply", "more than one ArrayRecord.")
        name, frame = found
        arrays = self.codec.accept(frame, sent.frame.header, self.flat, self.raw, self.frozen)
        reply.content = with_record(reply.content, name, dense_record(arrays))

    def _check_metrics(self, reply: Message) -> None:
        records = reply.content.metric_records
        if len(records) != 1:
            raise FrameError("metrics", f"{len(records)} MetricRecords, expected one.")
        weight = getattr(self.inner, "weighted_by_key", None)
        (metrics,) = records.values()
        for name, value in metrics.items():
            numbers = value if isinstance(value, list) else [value]
            if not all(math.isfinite(number) for number in numbers):
                raise FrameError(repr(name), "it is NaN or infinite.")
            if name == weight and (isinstance(value, list) or not value > 0):
                raise FrameError(repr(name), f"a weight above 0 is needed, got {value!r}.")
        if weight is not None and weight not in metrics:
            raise FrameError(repr(weight), "it is missing.")

    def _drop_inconsistent(self, server_round: int, accepted: dict[int, Message]) -> None:
        """Leave out replies with other metrics than most: Flower's strategies end the run there."""

        def names(reply: Message) -> tuple[str, ...]:
            ((record, metrics),) = reply.content.metric_records.items()
            return (record, *sorted(metrics), *reply.content.array_records)

        usual = Counter(names(reply) for reply in accepted.values()).most_common(1)
        for node in [n for n, reply in accepted.items() if names(reply) != usual[0][0]]:
            self._refuse(server_round, node, "metrics", "other names than the other clients'.")
            del accepted[node]

    def _acknowledge(self, node: int, frame: Frame) -> None:
        header = frame.header
        self._known[node] = Known(header.layout, header.plan, header.result)

    def _refuse(self, server_round: int, node: int, field: str, reason: str) -> None:
        """Leave a client out of this round. What it holds is unknown now: next time it gets all."""
        self._known.pop(node, None)
        refusal = Refusal(server_round, node, field, reason)
        self.refusals.append(refusal)
        _log.warning("%s", refusal)
