"""Strategies and clients that are saved between two rounds go on as if nothing had happened."""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    Strategy,
)

from cmd_plugin.errors import InputError, StateMismatch
from cmd_plugin.federated import (
    APFStrategy,
    CMDStrategy,
    FedPAQStrategy,
    InProcessGrid,
    TopKStrategy,
)
from cmd_plugin.federated._memory import restore_strategy, save_strategy
from cmd_plugin.federated.rounds import run_round
from cmd_plugin.federated.strategy import FrameStrategy
from cmd_plugin.modes import Embedding
from tests.helpers.federated import digest, fed_avg, make_app, make_grid, network, run

ROUNDS = 6  # of CMD's, number 3 fits and 4, 5 and 6 embed
SAMPLING: dict[str, Any] = {"fraction_evaluate": 0.0, "min_evaluate_nodes": 0}


def cmd(inner: Strategy | None = None, project: Any = "step", **options: Any) -> CMDStrategy:
    settings = {"modes": 3, "warmup": 2, "samples": 60, **options}
    return CMDStrategy(inner or half(), Embedding(1, 30.0, project=project), **settings)


def half(evaluate: float = 0.0) -> FedAvg:
    """Two of four clients in a round, drawn from Python's global generator."""
    return fed_avg(fraction=0.5, evaluate=evaluate)


STRATEGIES: dict[str, Callable[[], FrameStrategy]] = {
    "cmd": lambda: cmd(half(evaluate=0.5), statistics="local"),
    "cmd pooled steps, 8 bit": lambda: cmd(pool=True, bits=8),
    "cmd tied": lambda: cmd(project="tie"),
    "cmd around FedAvgM": lambda: cmd(
        FedAvgM(server_learning_rate=1.0, server_momentum=0.5, **SAMPLING)
    ),
    "cmd around FedAdam": lambda: cmd(FedAdam(eta=0.01, **SAMPLING)),
    "apf": lambda: APFStrategy(half(), threshold=0.6, decay=0.8),
    "a-apf": lambda: APFStrategy(half(), threshold=0.6, aggressive=True),
    "topk": lambda: TopKStrategy(half(), share=0.1),
    "topk with all clients": lambda: TopKStrategy(fed_avg(), share=0.1),
    "fedpaq": lambda: FedPAQStrategy(half(), bits=4),
}


def copied(state: Any) -> Any:
    """The state after a way through a file that cannot hold anything but plain values."""
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


def go(
    strategy: Strategy, grid: InProcessGrid, arrays: ArrayRecord, first: int, last: int
) -> ArrayRecord:
    for number in range(first, last + 1):
        arrays = run_round(strategy, grid, number, arrays)
    return arrays


def start(*, norm: bool = False) -> ArrayRecord:
    return ArrayRecord(network(norm=norm).state_dict())


def new_grid(*, norm: bool = False) -> InProcessGrid:
    return make_grid(make_app(norm=norm))


@pytest.mark.parametrize("name", ["cmd", "topk", "cmd around FedAvgM"])
def test_rounds_one_by_one_are_flowers_own_loop(name: str) -> None:
    strategy = STRATEGIES[name]()
    expected = run(strategy, new_grid(), ROUNDS).arrays
    assert expected is not None
    random.seed(0)
    found = go(STRATEGIES[name](), new_grid(), start(), 1, ROUNDS)
    assert digest(found) == digest(expected)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_saved_training_goes_on_bit_for_bit(name: str) -> None:
    """From before the fit, and from between two events."""
    norm = name == "cmd"
    random.seed(0)
    strategy, grid, arrays, done = STRATEGIES[name](), new_grid(norm=norm), start(norm=norm), 0
    saved: dict[int, tuple[Any, ...]] = {}
    for stop in (2, 4):
        arrays, done = go(strategy, grid, arrays, done + 1, stop), stop
        # Not copied: what was saved must not change while the run goes on.
        saved[stop] = arrays, random.getstate(), strategy.state_dict(), grid.state_dict()
    expected = go(strategy, grid, arrays, done + 1, ROUNDS)
    for stop, (middle, drawn, state, clients) in saved.items():
        random.setstate(drawn)
        second, other = STRATEGIES[name](), new_grid(norm=norm)
        second.load_state_dict(copied(state))
        other.load_state_dict(copied(clients))
        assert digest(go(second, other, middle, stop + 1, ROUNDS)) == digest(expected)
        assert second.traffic == strategy.traffic
        assert second.resyncs == strategy.resyncs
        assert second.refusals == strategy.refusals == []
        assert_same(copied(second.state_dict()), copied(strategy.state_dict()))


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    else:
        assert found == expected
        assert type(found) is type(expected)


@pytest.mark.parametrize("make", [half, lambda: FedAvgM(server_momentum=0.5, **SAMPLING)])
def test_flowers_strategies_alone_go_on_as_well(make: Callable[[], Strategy]) -> None:
    random.seed(0)
    expected = go(make(), new_grid(), start(), 1, 5)
    random.seed(0)
    first = make()
    middle = go(first, new_grid(), start(), 1, 2)
    second = make()
    restore_strategy(second, copied(save_strategy(first)))
    assert digest(go(second, new_grid(), middle, 3, 5)) == digest(expected)


def test_refusals_and_known_clients_are_remembered() -> None:
    strategy, grid = cmd(fed_avg()), new_grid()
    victim = list(grid.contexts)[1]
    grid.contexts[victim].node_config["partition-id"] = "none"  # it raises
    go(strategy, grid, start(), 1, 2)
    other = cmd(fed_avg())
    other.load_state_dict(copied(strategy.state_dict()))
    assert other.refusals == strategy.refusals
    assert [refusal.round for refusal in other.refusals] == [1, 2]
    assert other._known == strategy._known
    assert len(other._known) == 3


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: cmd(modes=4), "made with modes=3, not 4"),
        (lambda: cmd(bits=8), "made with bits=None, not 8"),
        (lambda: cmd(project="tie"), "made with embedding="),
        (lambda: cmd(exclude=["4.*"]), r"made with exclude=\[\], not \['4\.\*'\]"),
        (lambda: cmd(FedAdam()), "made with kind='FedAvg', not 'FedAdam'"),
        (lambda: TopKStrategy(half()), "made with kind='CMDStrategy', not 'TopKStrategy'"),
    ],
)
def test_a_state_of_another_strategy_is_refused(
    make: Callable[[], FrameStrategy], sentence: str
) -> None:
    strategy = cmd()
    go(strategy, new_grid(), start(), 1, 1)
    other = make()
    before = copied(other.state_dict())
    with pytest.raises(StateMismatch, match=sentence):
        other.load_state_dict(strategy.state_dict())
    assert_same(copied(other.state_dict()), before)


def test_a_state_of_another_model_is_refused() -> None:
    strategy, other = cmd(), cmd()
    go(strategy, new_grid(norm=True), start(norm=True), 1, 2)
    go(other, new_grid(), start(), 1, 1)
    before = copied(other.state_dict())
    with pytest.raises(StateMismatch, match="of another model"):
        other.load_state_dict(strategy.state_dict())
    assert_same(copied(other.state_dict()), before)


@pytest.mark.parametrize("name", ["cmd", "a-apf", "topk"])
def test_a_damaged_state_changes_nothing(name: str) -> None:
    strategy = STRATEGIES[name]()
    go(strategy, new_grid(), start(), 1, 4)
    state = copied(strategy.state_dict())
    fresh = STRATEGIES[name]()
    before = copied(fresh.state_dict())
    damages: list[Callable[[dict[str, Any]], Any]] = [
        *(lambda s, key=key: s.pop(key) for key in state),
        lambda s: s.update(version=2),
        lambda s: s["traffic"].update(bytes_up="many"),
        lambda s: s["codec"].update(plan=s["codec"]["plan"][:-1], layout=torch.zeros(3).byte()),
        lambda s: s.update(known=[[1, 2]]),
        lambda s: s.update(refusals=[["a"]]),
    ]
    if name == "a-apf":
        damages.append(lambda s: s["vectors"].update(_mask=s["vectors"]["_mask"][1:]))
        damages.append(lambda s: s["generator"].update(bit_generator="MT19937"))
    if name == "topk":
        damages.append(lambda s: s.update(view=s["view"].double()))
    for number, damage in enumerate(damages):
        bad = copy.deepcopy(state)
        damage(bad)
        with pytest.raises(StateMismatch):
            fresh.load_state_dict(bad)
        assert_same(copied(fresh.state_dict()), before), number
    fresh.load_state_dict(state)
    assert_same(copied(fresh.state_dict()), state)


def test_what_cannot_be_saved_says_so() -> None:
    class Mine(FedAvg):
        pass

    private = DifferentialPrivacyServerSideFixedClipping(
        fed_avg(), noise_multiplier=0.0, clipping_norm=1.0, num_sampled_clients=4
    )
    for inner in (private, Mine()):
        sentence = f"what {type(inner).__name__} carries .* give it state_dict"
        with pytest.raises(InputError, match=sentence):
            cmd(inner).state_dict()


def test_a_strategy_with_a_state_of_its_own_goes_inside() -> None:
    class Counting(FedAvg):
        count = 0

        def state_dict(self) -> dict[str, int]:
            return {"count": self.count}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.count = state["count"]

    first, second = cmd(Counting()), cmd(Counting())
    first.inner.count = 7  # type: ignore[attr-defined]
    second.load_state_dict(copied(first.state_dict()))
    assert second.inner.count == 7  # type: ignore[attr-defined]


# -- clients --------------------------------------------------------------------------------------


def test_every_kind_of_record_a_client_keeps_comes_back() -> None:
    grid = make_grid(make_app(), 2)
    kept = RecordDict(
        {
            "b": ArrayRecord({"w": Array(np.arange(6.0).reshape(2, 3)), "a": Array(np.array(7))}),
            "raw": ArrayRecord({"x": Array("bytes", (3,), "mine", b"\x00\xff\x01")}),
            "empty": ArrayRecord({"x": Array("bytes", (0,), "mine", b"")}),
            "m": MetricRecord({"loss": 0.5, "counts": [1, 2], "nan": float("inf")}),
            "c": ConfigRecord({"key": b"\x01", "keys": [b"a", b""], "on": True, "name": "x"}),
        }
    )
    first, second = grid.contexts.values()
    first.state = kept
    other = make_grid(make_app(), 2)
    other.load_state_dict(copied(grid.state_dict()))
    found, empty = (context.state for context in other.contexts.values())
    assert list(found) == list(kept)
    assert found == kept
    assert [type(value) for value in found["m"].values()] == [float, list, float]
    assert len(empty) == 0
    kept["m"]["loss"] = 1.0  # a copy was saved
    assert found["m"]["loss"] == 0.5
    assert second.state is not empty


def test_the_state_of_other_clients_is_refused() -> None:
    state = make_grid(make_app(), 2).state_dict()
    grid = make_grid(make_app(), 3)
    before = [context.state for context in grid.contexts.values()]
    for bad, sentence in (
        (state, "of 2 other nodes than these 3"),
        ({"sent": 1}, "damaged"),
        ({"sent": 1, "contexts": [[1, [["a", "secret", []]]]]}, "kind 'secret'"),
    ):
        with pytest.raises(StateMismatch, match=sentence):
            grid.load_state_dict(bad)
    assert all(a is c.state for a, c in zip(before, grid.contexts.values(), strict=True))
