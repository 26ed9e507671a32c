"""Bytes are those of Flower's own objects, counted by Flower's own means."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from cmd_plugin.federated import CMDStrategy
from cmd_plugin.federated._flower import payload_bytes, serialised_bytes
from cmd_plugin.modes import Embedding
from tests.helpers.federated import TappedGrid, fed_avg, make_app, make_grid, network, run


def flower_objects(message: Message) -> dict[str, Any]:
    """All objects of a message by content hash, as Flower's own transport collects them."""
    module = pytest.importorskip("flwr.supercore.inflatable.inflatable_object")
    return dict(module.get_all_nested_objects(message))


def message_of(content: RecordDict) -> Message:
    make_grid(make_app())  # says which run this is
    return Message(content, dst_node_id=2**63 + 5, message_type="train")


@pytest.mark.parametrize("kind", ["arrays", "equal arrays", "nothing but settings", "large"])
def test_message_bytes_are_flowers(kind: str) -> None:
    content = RecordDict({"config": ConfigRecord({"server-round": 3, "lr": 0.1})})
    if kind == "arrays":
        content["arrays"] = ArrayRecord(network(norm=True).state_dict())
    elif kind == "equal arrays":  # stored once
        content["arrays"] = ArrayRecord([np.zeros(5), np.zeros(5), np.ones(5)])
    elif kind == "large":  # cut into chunks of 5 MiB
        content["arrays"] = ArrayRecord([np.arange(1_500_000, dtype=np.float64)])
    message = message_of(content)
    objects = flower_objects(message)
    assert serialised_bytes(message) == sum(len(thing.deflate()) for thing in objects.values())
    assert payload_bytes(content) == sum(record.count_bytes() for record in content.values())


def test_payload_of_what_flower_cannot_count() -> None:
    content = RecordDict({"config": ConfigRecord({"empty": ""}), "m": MetricRecord({"a": 1.0})})
    assert payload_bytes(content) == len("empty") + 8 + len("a")


def test_the_strategy_counts_what_the_grid_sees() -> None:
    """Two counters, one at each end of the wrapper, and a lost state in between."""
    strategy = CMDStrategy(fed_avg(evaluate=1.0), Embedding(2, 30.0), modes=3, warmup=2, samples=60)
    inner = make_grid(make_app())
    grid = TappedGrid(inner)
    victim = list(inner.contexts)[1]

    def on_round(number: int, _: Any) -> None:
        if number == 6:
            inner.contexts[victim].state.clear()

    run(strategy, grid, 8, on_round=on_round)
    assert strategy.resyncs == 1
    for name in ("messages_down", "messages_up", "payload_down", "payload_up"):
        assert getattr(strategy.traffic, name) == getattr(grid.traffic, name) > 0, name
    assert strategy.traffic.bytes_down == grid.traffic.bytes_down
    assert strategy.traffic.bytes_up == grid.traffic.bytes_up
    assert grid.traffic.bytes_up == sum(
        sum(len(thing.deflate()) for thing in flower_objects(reply).values())
        for _, replies in grid.phases
        for reply in replies
    )


def test_what_fedavg_would_have_sent_is_what_it_sends() -> None:
    strategy = CMDStrategy(fed_avg(), Embedding(2, 30.0), modes=3, warmup=2, samples=60)
    run(strategy, make_grid(make_app()), 8)
    plain = TappedGrid(make_grid(make_app([])))
    run(fed_avg(), plain, 8)
    assert strategy.traffic.plain_down == plain.traffic.bytes_down
    assert strategy.traffic.plain_up == plain.traffic.bytes_up
    assert strategy.traffic.bytes_up < plain.traffic.bytes_up


def test_a_frame_is_one_array_whatever_the_model() -> None:
    """Record bytes = frame + key; six objects a message instead of two per tensor."""
    strategy = CMDStrategy(fed_avg(), Embedding(2, 30.0), modes=3, warmup=2, samples=60)
    grid = TappedGrid(make_grid(make_app()))
    run(strategy, grid, 6)
    for sent, replies in grid.phases:
        for message in (*sent, *replies):
            assert len(flower_objects(message)) == 6
            (record,) = message.content.array_records.values()
            (array,) = record.values()
            assert record.count_bytes() == len(array.data) + len("frame")
