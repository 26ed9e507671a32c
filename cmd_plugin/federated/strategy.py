"""The server's side on Flower: a strategy around a strategy that frames, checks and counts."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

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
from cmd_plugin.federated.admission import (
    NO_FRAME,
    Refusal,
    check_bounds,
    check_metrics,
    explain_no_update,
    find_lacks,
    find_large_updates,
    find_odd_metrics,
    update_norm,
)
from cmd_plugin.federated.codec import PROJECTIONS, ModeCodec
from cmd_plugin.federated.frame import Frame, FrameError
from cmd_plugin.federated.packing import Arrays, Flat, Packing, check_statistics
from cmd_plugin.federated.traffic import Traffic
from cmd_plugin.federated.values import Known

__all__ = ["FrameStrategy", "Refusal"]

_log = logging.getLogger(__name__)

_VERSION = 1


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
        max_examples: Largest weight a client may ask for in the average (``num-examples``). Set it
            to what the largest client can have: one that claims more is refused.
        max_update_ratio: Refuse an update whose norm is more than so many times the round's median;
            None refuses none for its size. The default leaves room for clients of very different
            amounts of data; about 10 holds back a client that means harm.

    Attributes:
        inner: As given.
        traffic: Bytes and messages so far, in both directions.
        accepted: How many updates have gone into the model.
        refusals: Updates that were left out.
        duplicates: Replies that were dropped because their client had answered already.
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
        max_examples: float = 1e9,
        max_update_ratio: float | None = 100.0,
    ) -> None:
        if not isinstance(inner, Strategy):
            raise InputError(
                f"inner must be a strategy of flwr.serverapp.strategy, got {type(inner).__name__}."
            )
        check_statistics(statistics)
        check_bounds(max_examples, max_update_ratio)
        self.inner = inner
        self.max_examples = max_examples
        self.max_update_ratio = max_update_ratio
        self.traffic = Traffic()
        self.accepted = 0
        self.refusals: list[Refusal] = []
        self.duplicates = 0
        self.resyncs = 0
        self._settings: dict[str, Any] = {
            "include": list(include),
            "exclude": list(exclude),
            "statistics": statistics,
            "max_examples": max_examples,
            "max_update_ratio": max_update_ratio,
        }
        self._packing_of = partial(
            Packing.of, include=include, exclude=exclude, statistics=statistics
        )
        self._codec: ModeCodec | None = None
        self._known: dict[int, Known] = {}
        self._sent: dict[int, _Sent] = {}
        self._order: dict[int, int] = {}
        self._grid: Grid | None = None
        self._asked = False
        self._unprojected = 0
        self._told: set[str] = set()
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
            "accepted": self.accepted,
            "duplicates": self.duplicates,
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
            "accepted": int(state["accepted"]),
            "duplicates": int(state["duplicates"]),
            "refusals": [Refusal(*refusal) for refusal in state["refusals"]],
            "resyncs": int(state["resyncs"]),
        }

    # -- a run ------------------------------------------------------------------------------------

    def start(self, *args: Any, **kwargs: Any) -> Result:
        """Run as Flower's ``Strategy.start`` does, with its arguments.

        Raises:
            InputError: If clients were asked to train and no update was ever accepted: what is left
                then is the initial model.
        """
        result = super().start(*args, **kwargs)
        self.require_updates()
        return result

    def require_updates(self) -> None:
        """Raise InputError if no update was ever accepted, although clients were asked for some."""
        if self._asked and not self.accepted:
            raise InputError(explain_no_update(self.refusals))

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
        self._asked |= step == "configure_train"
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
        self.accepted += len(accepted)
        self._advise(server_round)
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
        norms: dict[int, float] = {}
        answered: set[int] = set()
        self._unprojected = 0
        by_message = {s.message.metadata.message_id: node for node, s in self._sent.items()}
        for reply in self._with_resyncs(server_round, replies, by_message):
            node = reply.metadata.src_node_id
            if node not in self._sent:
                # The engine answers for a client that is gone, with the SuperLink as the source.
                node = by_message.get(reply.metadata.reply_to_message_id, node)
            if node in answered:
                self._drop_duplicate(server_round, node)
            else:
                answered.add(node)
                try:
                    norms[node] = self._take(reply, node, training=training)
                except FrameError as error:
                    self._refuse(server_round, node, error.field, error.reason)
                else:
                    accepted[node] = reply
            self.traffic.plain_up += serialised_bytes(reply)
        last = len(self._order)
        nodes = sorted(accepted, key=lambda node: (self._order.get(node, last), node))
        accepted = {node: accepted[node] for node in nodes}
        for odd in (
            find_odd_metrics(accepted),
            find_large_updates(norms, self.max_update_ratio) if training else {},
        ):
            for node in odd.keys() & accepted.keys():
                self._refuse(server_round, node, odd[node].field, odd[node].reason)
                del accepted[node]
        return list(accepted.values())

    def _take(self, reply: Message, node: int, *, training: bool) -> float:
        """Check and decode a reply in place; the norm of its update, 0 in an evaluation."""
        sent = self._sent.get(node)
        if reply.has_error():
            raise FrameError("reply", reply.error.reason or "no reason given")
        if sent is None:
            raise FrameError("reply", "nobody asked for it.")
        norm = self._restore(reply, sent) if training else 0.0
        weight = getattr(self.inner, "weighted_by_key", None)
        check_metrics(reply, weight, self.max_examples)
        header = sent.frame.header
        self._known[node] = Known(header.layout, header.plan, header.result)
        return norm

    def _with_resyncs(
        self, server_round: int, replies: Iterable[Message], by_message: dict[str, int]
    ) -> Iterable[Message]:
        """Yield the replies; those that ask for everything are asked again, once, with it."""
        again: dict[int, Message] = {}
        for reply in replies:
            self.traffic.count_up(reply)
            node = reply.metadata.src_node_id
            if not (reply.has_error() and reply.error.code == RESYNC and node in self._sent):
                yield reply
                continue
            if node in again:
                self._drop_duplicate(server_round, node)
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
            again[node] = message
        if again and self._grid is not None:
            answers = list(self._grid.send_and_receive(again.values()))
            for message in again.values():
                by_message[message.metadata.message_id] = message.metadata.dst_node_id
            for answer in answers:
                self.traffic.count_up(answer)
                yield answer

    def _restore(self, reply: Message, sent: _Sent) -> float:
        """Replace the frame in a reply by the arrays it stands for; the norm of the update."""
        found = find_frame(reply.content)
        if found is None:
            raise FrameError("frame", NO_FRAME)
        if len(reply.content.array_records) != 1:
            raise FrameError("reply", "more than one ArrayRecord.")
        name, frame = found
        asked = sent.frame.header
        arrays = self.codec.accept(frame, asked, self.flat, self.raw, self.frozen)
        reply.content = with_record(reply.content, name, dense_record(arrays))
        self._unprojected += frame.header.project != asked.project
        return update_norm(self.codec.packing, arrays, self.flat, self.raw)

    def _drop_duplicate(self, server_round: int, node: int) -> None:
        self.duplicates += 1
        _log.warning(
            "round %d: client %d answered again, the first reply counts", server_round, node
        )

    def _advise(self, server_round: int) -> None:
        """Say once what the clients' app lacks: what it costs is seen much later, or never."""
        refused = [refusal for refusal in self.refusals if refusal.round == server_round]
        project = next((PROJECTIONS[s.frame.header.project] for s in self._sent.values()), "")
        for name, sentence in find_lacks(refused, self._unprojected, project).items():
            if name not in self._told:
                self._told.add(name)
                _log.warning("round %d: %s", server_round, sentence)

    def _refuse(self, server_round: int, node: int, field: str, reason: str) -> None:
        """Leave a client out of this round. What it holds is unknown now: next time it gets all."""
        self._known.pop(node, None)
        refusal = Refusal(server_round, node, field, reason)
        self.refusals.append(refusal)
        _log.warning("%s", refusal)
