"""One client does not decide: what it says of itself is bounded, whichever the strategy."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from cmd_plugin.errors import InputError
from cmd_plugin.federated import (
    APFStrategy,
    CMDStrategy,
    FedPAQStrategy,
    TopKStrategy,
    cmd_mod,
)
from cmd_plugin.federated.strategy import FrameStrategy
from cmd_plugin.modes import Embedding
from tests.helpers.federated import (
    TappedGrid,
    digest,
    fed_avg,
    make_app,
    make_grid,
    network,
    run,
    train_round,
)

BAD = 1  # the client that misbehaves, in round 2
ROUNDS = 3


def cmd(**options: Any) -> CMDStrategy:
    return CMDStrategy(fed_avg(), Embedding(1, 30.0), modes=3, warmup=2, samples=60, **options)


STRATEGIES: dict[str, Callable[..., FrameStrategy]] = {
    "cmd": cmd,
    "cmd, 8 bits": lambda **options: cmd(bits=8, **options),
    "apf": lambda **options: APFStrategy(fed_avg(), **options),
    "top-k": lambda **options: TopKStrategy(fed_avg(), share=0.5, **options),
    "fedpaq": lambda **options: FedPAQStrategy(fed_avg(), **options),
}

Change = Callable[[RecordDict], None]


def with_arrays(change: Callable[[dict[str, Any]], None]) -> Change:
    def changed(content: RecordDict) -> None:
        arrays = {name: array.numpy().copy() for name, array in content["arrays"].items()}
        change(arrays)
        content["arrays"] = ArrayRecord({name: Array(array) for name, array in arrays.items()})

    return changed


def with_metrics(**values: Any) -> Change:
    def changed(content: RecordDict) -> None:
        content["metrics"] = MetricRecord({**dict(content["metrics"]), **values})

    return changed


def misbehaving(change: Change, norm: bool = False, bad: tuple[int, ...] = (BAD,)) -> ClientApp:
    def changed(number: int, round_number: int, content: RecordDict) -> None:
        if number in bad and round_number == 2:
            change(content)

    return make_app(norm=norm, change=changed)


def absent() -> ClientApp:
    def raising(message: Message, context: Context) -> None:
        where = context.node_config["partition-id"], message.content["config"]["server-round"]
        if where == (BAD, 2):
            raise RuntimeError("away")

    return make_app(norm=True, before=raising)


FAULTS: dict[str, tuple[Change, str, str]] = {
    "a list": (with_metrics(loss=[1.0, 2.0]), "'loss'", "a list of 2, most clients sent one"),
    "examples": (with_metrics(**{"num-examples": 1e300}), "'num-examples'", "1e+300 is above max_"),
    "a weight": (
        with_arrays(lambda a: a["5.bias"].__setitem__(1, 1e20)),
        "'5.bias'",
        "1 of 3 values lie beyond 1e+10",
    ),
    "a variance": (
        with_arrays(lambda a: a["1.running_var"].__setitem__(slice(2), -0.1)),
        "'1.running_var'",
        "2 of 5 variances became negative",
    ),
    "a mean": (
        with_arrays(lambda a: a["1.running_mean"].__setitem__(0, -1e20)),
        "'1.running_mean'",
        "1 of 5 values lie beyond 1e+10, the largest is 1e+20",
    ),
    "an update": (
        with_arrays(lambda a: a["3.weight"].__imul__(1e5)),
        "update",
        "times the round's median, above max_update_ratio=100",
    ),
}


def second_round(strategy: FrameStrategy, app: ClientApp) -> bytes:
    """Run all rounds; the model after round 2, in which one client is out."""
    models: list[bytes] = []

    def keep(_: int, arrays: dict[str, Any]) -> None:
        models.append(b"".join(array.tobytes() for array in arrays.values()))

    run(strategy, make_grid(app), ROUNDS, norm=True, on_round=keep)
    assert models[3] != models[2] != models[1]
    return models[2]


@cache
def without_that_client(name: str) -> tuple[bytes, int]:
    strategy = STRATEGIES[name]()
    model = second_round(strategy, absent())
    (refusal,) = strategy.refusals
    return model, refusal.node


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_round_is_the_one_without_that_client(name: str, fault: str) -> None:
    change, field, reason = FAULTS[fault]
    strategy = STRATEGIES[name]()
    found = second_round(strategy, misbehaving(change, norm=True))
    expected, node = without_that_client(name)
    assert found == expected
    (refusal,) = strategy.refusals
    assert (refusal.round, refusal.node, refusal.field) == (2, node, field)
    assert reason in refusal.reason
    assert strategy.accepted == 4 * ROUNDS - 1


def test_lists_that_all_clients_send_alike_are_averaged() -> None:
    def listed(number: int, _: int, content: RecordDict) -> None:
        with_metrics(scores=[float(number), 1.0])(content)

    strategy = cmd()
    result = run(strategy, make_grid(make_app(change=listed), 3), 1)
    assert strategy.refusals == []
    examples = np.array([24.0, 25.0, 26.0])
    expected = (examples * np.arange(3)).sum() / examples.sum()
    assert result.train_metrics_clientapp[1]["scores"] == pytest.approx([expected, 1.0])


def test_the_largest_weight_is_declared() -> None:
    """Two of 1.7e308 would sum to infinity, and all weights of the average to 0."""
    strategy = cmd(max_examples=26)
    change = with_metrics(**{"num-examples": 1.7e308})
    run(strategy, make_grid(misbehaving(change, bad=(1, 2))), 2)
    assert [(r.round, r.field) for r in strategy.refusals] == [
        (1, "'num-examples'"),  # client 3 has 27 examples
        (2, "'num-examples'"),
        (2, "'num-examples'"),
        (2, "'num-examples'"),
    ]


def test_the_size_of_an_update_is_bounded_by_the_median() -> None:
    change = with_arrays(lambda a: a["2.weight"].__iadd__(5.0))
    strategy = cmd(max_update_ratio=3.0)
    run(strategy, make_grid(misbehaving(change)), 2)
    (refusal,) = strategy.refusals
    assert (refusal.round, refusal.field) == (2, "update")
    generous = cmd(max_update_ratio=None)
    run(generous, make_grid(misbehaving(change)), 2)
    assert generous.refusals == []


def test_an_update_beside_clients_that_did_not_move_is_taken() -> None:
    """A median of zero says nothing about sizes."""

    def still(number: int, round_number: int, content: RecordDict) -> None:
        if number and round_number == 1:
            content["arrays"] = ArrayRecord(network().state_dict())

    strategy = cmd(max_update_ratio=2.0)
    run(strategy, make_grid(make_app(change=still)), 1)
    assert strategy.refusals == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_examples": 0}, "max_examples must be above 0"),
        ({"max_examples": 1e300}, r"at most 2\*\*53, got 1e\+300"),
        ({"max_examples": float("nan")}, "got nan"),
        ({"max_update_ratio": 1.0}, "max_update_ratio must be above 1 or None, got 1.0"),
        ({"max_update_ratio": float("inf")}, "got inf"),
    ],
)
def test_bounds_that_bound_nothing_are_refused(options: Any, sentence: str) -> None:
    for make in STRATEGIES.values():
        with pytest.raises(InputError, match=sentence):
            make(**options)


@pytest.mark.parametrize("name", STRATEGIES)
def test_models_may_hold_constants_as_large_as_they_were(name: str) -> None:
    # As attention's masks are; squares of still larger ones overflow in the sums of CMD.
    def masked(arrays: ArrayRecord) -> ArrayRecord:
        return ArrayRecord({**arrays, "mask": Array(np.array([-1e12, 0.0], np.float32))})

    app = ClientApp(mods=[cmd_mod])

    @app.train()
    def train(message: Message, _: Context) -> Message:
        metrics = MetricRecord({"num-examples": 1})
        arrays = ArrayRecord(dict(message.content["arrays"].items()))
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    strategy = STRATEGIES[name]()
    initial = masked(ArrayRecord(network().state_dict()))
    strategy.start(grid=make_grid(app, 2), initial_arrays=initial, num_rounds=1)
    assert strategy.refusals == []


# -- who answers more than once -------------------------------------------------------------------


@pytest.mark.parametrize("name", STRATEGIES)
def test_duplicates_are_dropped_and_counted(name: str, caplog: pytest.LogCaptureFixture) -> None:
    def doubled(phase: int, replies: list[Message]) -> list[Message]:
        return replies if phase == 0 else [*replies, *replies]

    found = []
    for tamper in (doubled, None):
        strategy, grid = STRATEGIES[name](), TappedGrid(make_grid(make_app()))
        grid.tamper = tamper
        result = run(strategy, grid, ROUNDS)
        assert result.arrays is not None
        found.append((digest(result.arrays), strategy))
    strategy = found[0][1]
    assert found[0][0] == found[1][0]
    assert strategy.refusals == []
    assert strategy.duplicates == 4 * (ROUNDS - 1)
    assert strategy._known == found[1][1]._known
    assert sum("answered again, the first reply counts" in m for m in caplog.messages) == 8
    other = STRATEGIES[name]()
    other.load_state_dict(strategy.state_dict())
    assert (other.duplicates, other.accepted) == (8, 12)


def test_a_client_that_asks_for_everything_twice_gets_it_once() -> None:
    def lost(message: Message, context: Context, call_next: Any) -> Message:
        if context.node_config["partition-id"] == BAD and not context.state:
            context.state["asked"] = MetricRecord({"once": 1})
            return Message(Error(4100, "resend."), reply_to=message)
        return cmd_mod(message, context, call_next)

    strategy, grid = cmd(), TappedGrid(make_grid(make_app([lost])))
    grid.tamper = lambda phase, replies: [*replies, replies[BAD]] if phase == 0 else replies
    run(strategy, grid, 1)
    assert (strategy.resyncs, strategy.duplicates, strategy.accepted) == (1, 1, 4)
    assert strategy.refusals == []


# -- what an app lacks ----------------------------------------------------------------------------


def test_a_missing_mod_is_said_after_the_first_round(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InputError, match=r"no client's update was ever accepted, .* cmd_mod"):
        run(cmd(), make_grid(make_app([])), 3)
    (said,) = [m for m in caplog.messages if "cmd_mod" in m]
    assert said == (
        "round 1: 4 clients were refused because they lack cmd_mod: put cmd_mod of "
        "cmd_plugin.federated first, app = ClientApp(mods=[cmd_mod, ...])."
    )


def test_nobody_answering_at_all_fails() -> None:
    grid = TappedGrid(make_grid(make_app()))
    grid.tamper = lambda *_: []
    with pytest.raises(InputError, match="no client ever answered, so there is no trained model"):
        run(cmd(), grid, 2)


def test_a_run_that_asks_nobody_to_train_does_not_fail() -> None:
    inner = fed_avg(fraction=0.0, evaluate=1.0)
    inner.min_train_nodes = 0
    result = run(CMDStrategy(inner), make_grid(make_app()), 1)
    assert "accuracy" in result.evaluate_metrics_clientapp[1]


def plain_app() -> ClientApp:
    """A client that forgets embedded_training."""
    app = ClientApp(mods=[cmd_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        model = network()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        loss = train_round(model, number, int(message.content["config"]["server-round"]))
        metrics = MetricRecord({"num-examples": 24 + number, "loss": loss})
        content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
        return Message(content, reply_to=message)

    return app


@pytest.mark.parametrize("project", ["epoch", "step", "tie"])
def test_training_outside_of_embedded_training_is_said_once(
    project: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    for app, expected in ((plain_app(), project != "epoch"), (make_app(), False)):
        caplog.clear()
        strategy = CMDStrategy(
            fed_avg(), Embedding(1, 30.0, project=project), modes=3, warmup=2, samples=60
        )
        run(strategy, make_grid(app), 4)
        assert strategy.refusals == []
        assert strategy.embedded_fraction > 0.0
        sentence = (
            f"round 1: 4 clients trained outside of embedded_training, which project={project!r} "
            "needs: put their training into 'with embedded_training(context, model):'."
        )
        assert caplog.messages == [sentence] * expected
