"""Bad updates are refused by client and field, and the round goes on without them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict

from cmd_plugin.errors import InputError
from cmd_plugin.federated import CMDStrategy, cmd_mod
from cmd_plugin.federated._flower import find_frame, framed, with_record
from cmd_plugin.federated.frame import Frame
from cmd_plugin.modes import Embedding
from tests.helpers.federated import TappedGrid, digest, fed_avg, make_app, make_grid, run

BAD_ROUND, BAD_CLIENT = 6, 1


def cmd(**options: Any) -> CMDStrategy:
    settings = {"modes": 3, "warmup": 2, "samples": 60, **options}
    return CMDStrategy(fed_avg(), Embedding(2, 30.0), **settings)


def reframed(reply: Message, change: Callable[[Frame], Frame]) -> None:
    found = find_frame(reply.content)
    assert found is not None
    reply.content = with_record(reply.content, found[0], framed(change(found[1])))


def with_bytes(reply: Message, change: Callable[[bytes], bytes]) -> None:
    (key,) = reply.content.array_records
    array = reply.content[key]["frame"]
    data = change(array.data)
    record = ArrayRecord({"frame": Array("bytes", (len(data),), array.stype, data)})
    reply.content = with_record(reply.content, key, record)


def nan_payload(frame: Frame) -> Frame:
    values = np.frombuffer(frame.sections.values, "<f4").copy()
    values[0] = np.nan
    return Frame(frame.header, replace(frame.sections, values=values.tobytes()))


def large_payload(frame: Frame) -> Frame:
    values = np.frombuffer(frame.sections.values, "<f4").copy()
    values[0] = 1e20
    return Frame(frame.header, replace(frame.sections, values=values.tobytes()))


def metric(**values: Any) -> Callable[[Message], None]:
    def change(reply: Message) -> None:
        content = RecordDict(dict(reply.content.items()))
        content["metrics"] = MetricRecord(values)
        reply.content = content

    return change


def unframed(reply: Message) -> None:
    (key,) = reply.content.array_records
    reply.content = with_record(reply.content, key, ArrayRecord({"a": Array(np.zeros(3))}))


TAMPERINGS: dict[str, tuple[Callable[[Message], None], str, str]] = {
    "cut short": (lambda r: with_bytes(r, lambda d: d[:-9]), "length", "announced"),
    "magic": (lambda r: with_bytes(r, lambda d: b"XXXX" + d[4:]), "header", "magic"),
    "bit flip": (
        lambda r: with_bytes(r, lambda d: d[:-20] + bytes([d[-20] ^ 1]) + d[-19:]),
        "checksum",
        "damaged",
    ),
    "stale round": (
        lambda r: reframed(r, lambda f: Frame(replace(f.header, round=5), f.sections)),
        "round",
        "answers round 5, not 6",
    ),
    "stale plan": (
        lambda r: reframed(r, lambda f: Frame(replace(f.header, plan=0), f.sections)),
        "plan",
        "stale",
    ),
    "short values": (
        lambda r: reframed(
            r, lambda f: Frame(f.header, replace(f.sections, values=f.sections.values[4:]))
        ),
        "values",
        "expected",
    ),
    "not finite": (lambda r: reframed(r, nan_payload), "'0.weight'", "1 of 30 values are NaN"),
    "no frame": (unframed, "frame", "the client needs cmd_mod"),
    "weight": (metric(**{"num-examples": 0, "loss": 1.0}), "'num-examples'", "above 0"),
    "no weight": (metric(loss=1.0), "'num-examples'", "it is missing"),
    "metric": (metric(**{"num-examples": 1, "loss": float("nan")}), "'loss'", "NaN or infinite"),
    "too large": (lambda r: reframed(r, large_payload), "'0.weight'", "lie beyond 1e+10"),
    "list": (
        metric(**{"num-examples": 1, "loss": [1.0, 2.0]}),
        "'loss'",
        "a list of 2, most clients sent one number",
    ),
    "examples": (
        metric(**{"num-examples": 1e300, "loss": 1.0}),
        "'num-examples'",
        "above max_examples=1e+09",
    ),
    "names": (metric(**{"num-examples": 1, "los": 1.0}), "metrics", "other names"),
}


@pytest.mark.parametrize("kind", TAMPERINGS)
def test_a_bad_update_is_left_out_and_the_round_goes_on(kind: str) -> None:
    """The model is the one of a round in which that client did not answer at all."""
    change, field, reason = TAMPERINGS[kind]
    found = []
    for bad in (change, None):
        strategy, grid = cmd(), TappedGrid(make_grid(make_app()))

        def tamper(phase: int, replies: list[Message], bad: Any = bad) -> list[Message]:
            if phase == BAD_ROUND - 1:
                if bad is None:
                    return [r for n, r in enumerate(replies) if n != BAD_CLIENT]
                bad(replies[BAD_CLIENT])
            return replies

        grid.tamper = tamper
        result = run(strategy, grid, BAD_ROUND + 2)
        assert result.arrays is not None
        found.append((digest(result.arrays), strategy, grid))
    strategy = found[0][1]
    assert found[0][0] == found[1][0]
    (refusal,) = strategy.refusals
    node = found[0][2].phases[BAD_ROUND - 1][0][BAD_CLIENT].metadata.dst_node_id
    assert (refusal.round, refusal.node, refusal.field) == (BAD_ROUND, node, field)
    assert reason in refusal.reason
    assert str(node) in str(refusal)


def spoil(content: RecordDict, change: Callable[[dict[str, Any]], None]) -> None:
    arrays = {name: array.numpy().copy() for name, array in content["arrays"].items()}
    change(arrays)
    content["arrays"] = ArrayRecord({name: Array(a) for name, a in arrays.items()})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda a: a["2.bias"].__setitem__(0, np.inf), "'2.bias': 1 of 8 values are NaN"),
        (lambda a: a.update({"2.bias": a["2.bias"][:3]}), "'2.bias': shape (3,), expected (8,)"),
        (lambda a: a.pop("2.bias"), "'2.bias': it is missing"),
    ],
)
def test_a_client_that_trained_something_unusable_says_so(change: Any, sentence: str) -> None:
    def broken(number: int, round_number: int, content: RecordDict) -> None:
        if (number, round_number) == (BAD_CLIENT, BAD_ROUND):
            spoil(content, change)

    strategy = cmd()
    result = run(strategy, make_grid(make_app(change=broken)), BAD_ROUND + 1)
    assert result.arrays is not None
    (refusal,) = strategy.refusals
    assert (refusal.round, refusal.field) == (BAD_ROUND, "reply")
    assert sentence in refusal.reason


def test_a_client_that_raises_or_is_gone_is_left_out() -> None:
    def raising(message: Message, context: Any) -> None:
        where = context.node_config["partition-id"], message.content["config"]["server-round"]
        if where == (BAD_CLIENT, BAD_ROUND):
            raise RuntimeError("out of memory")

    strategy = cmd()
    grid = make_grid(make_app(before=raising))
    gone = list(grid.contexts)[3]

    tapped = TappedGrid(grid)
    original = grid.send_and_receive

    def leaving(messages: Any, *, timeout: float | None = None) -> Any:
        # It leaves between being asked and answering.
        if len(tapped.phases) == 6:
            grid.contexts.pop(gone, None)
        return original(messages, timeout=timeout)

    grid.send_and_receive = leaving  # type: ignore[method-assign]
    run(strategy, tapped, 8)
    first, second = strategy.refusals
    assert (first.round, first.reason) == (BAD_ROUND, "RuntimeError: out of memory")
    # The engine answers in the name of the SuperLink; the client is named all the same.
    assert (second.round, second.node, second.reason) == (7, gone, "Node Unavailable")


def test_nobody_answers_well() -> None:
    strategy, grid = cmd(), TappedGrid(make_grid(make_app()))

    def tamper(phase: int, replies: list[Message]) -> list[Message]:
        if phase == 3:
            for reply in replies:
                with_bytes(reply, lambda d: d[:-1])
        return replies

    grid.tamper = tamper
    models: list[bytes] = []
    run(
        strategy,
        grid,
        5,
        on_round=lambda _, a: models.append(b"".join(x.tobytes() for x in a.values())),
    )
    assert models[4] == models[3] != models[5]
    assert len(strategy.refusals) == 4


def test_a_client_without_the_mod_fails_loudly() -> None:
    """Never a silent average of bytes."""
    strategy = cmd()
    with pytest.raises(InputError, match=r"no trained model; .* put cmd_mod"):
        run(strategy, make_grid(make_app([])), 2)
    assert len(strategy.refusals) == 8
    assert "Unsupported serialization type" in strategy.refusals[0].reason


def test_a_resync_that_fails_again_is_an_error() -> None:
    def always_lost(message: Message, context: Any, call_next: Any) -> Message:
        if context.node_config["partition-id"] == BAD_CLIENT:
            return Message(Error(4100, "plan 12 is not known here, resend."), reply_to=message)
        return cmd_mod(message, context, call_next)

    strategy = cmd()
    result = run(strategy, make_grid(make_app([always_lost])), 2)
    assert result.arrays is not None
    assert strategy.resyncs == 2  # asked once more in each round, not for ever
    assert [refusal.round for refusal in strategy.refusals] == [1, 2]


def test_a_damaged_frame_from_the_server_is_refused_by_the_client() -> None:
    grid = TappedGrid(make_grid(make_app()))
    original = grid._grid.send_and_receive

    def damaging(messages: Any, *, timeout: float | None = None) -> Any:
        messages = list(messages)
        if len(grid.phases) == 3 and messages:
            with_bytes(messages[0], lambda d: d[:-30] + bytes([d[-30] ^ 4]) + d[-29:])
        return original(messages, timeout=timeout)

    grid._grid.send_and_receive = damaging  # type: ignore[method-assign]
    strategy = cmd()
    run(strategy, grid, 5)
    (refusal,) = strategy.refusals
    assert refusal.round == 4
    assert "checksum: the frame was damaged on its way" in refusal.reason
