"""CMD between server and clients: partial participation, clients that come and go."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cmd_plugin.errors import InputError, PluginError
from cmd_plugin.federated import CMDStrategy
from cmd_plugin.federated._flower import find_frame
from cmd_plugin.federated.client import load_codec
from cmd_plugin.modes import Embedding, OnlineModes
from tests.helpers.federated import (
    WEIGHTS,
    TappedGrid,
    digest,
    fed_avg,
    make_app,
    make_grid,
    network,
    run,
    train_round,
)

OPTIONS: dict[str, Any] = {"modes": 3, "warmup": 2, "samples": 60, "seed": 0}
EVENTS = Embedding(every=2, percent=30.0)  # the fit after round 3, events after rounds 5, 7, 9


def cmd(embedding: Embedding = EVENTS, **options: Any) -> CMDStrategy:
    """The strategy under test."""
    inner = options.pop("inner", None) or fed_avg()
    return CMDStrategy(inner, embedding, **{**OPTIONS, **options})


@pytest.mark.parametrize("norm", [False, True])
def test_nothing_embedded_is_fedavg_bit_for_bit(norm: bool) -> None:
    """The warm-up is FedAvg, except that counters stay whole numbers."""
    plain = run(fed_avg(), make_grid(make_app([], norm=norm)), 5, norm=norm)
    framed = run(cmd(warmup=20), make_grid(make_app(norm=norm)), 5, norm=norm)
    assert plain.arrays is not None
    assert framed.arrays is not None
    for name, array in plain.arrays.items():
        found = framed.arrays[name].numpy()
        if name.endswith("num_batches_tracked"):
            assert array.numpy().dtype == np.float64
            assert found.dtype == np.int64
        else:
            assert found.tobytes() == array.numpy().tobytes(), name
    if not norm:
        assert digest(framed.arrays) == digest(plain.arrays)
    assert framed.train_metrics_clientapp == plain.train_metrics_clientapp


@pytest.mark.parametrize("project", ["epoch", "step", "tie"])
def test_one_client_is_centralised_embedded_cmd(project: Any) -> None:
    """C = 1 and stateless SGD. Both put the model on its curves after every event."""
    embedding = Embedding(2, 30.0, project=project)
    rounds = 9
    model = network()
    modes = OnlineModes(model, embedding=embedding, **OPTIONS)
    for number in range(1, rounds + 1):
        if project == "epoch" or modes.embedded_fraction == 0.0:
            train_round(model, 0, number)
        else:
            train_tied(model, modes, number, tie=project == "tie")
        modes.project()
        modes.update()
        modes.project()
    strategy = cmd(embedding)
    result = run(strategy, make_grid(make_app(), 1), rounds)
    assert result.arrays is not None
    assert strategy.embedded_fraction == modes.embedded_fraction > 0.7
    assert np.array_equal(strategy.codec.plan.embedded, modes.embedded.numpy())
    for name, expected in model.state_dict().items():
        # The library rounds a * r before it adds b, the codec afterwards: an ulp at every event,
        # carried through the training steps that follow.
        gap = np.abs(result.arrays[name].numpy() - expected.numpy()).max()
        assert gap < 1e-5, name


def train_tied(model: torch.nn.Module, modes: OnlineModes, number: int, *, tie: bool) -> None:
    """The round's training with every step followed by a projection, by hooks of torch's own."""
    original = torch.optim.SGD.step

    def step(optimizer: torch.optim.SGD, *args: Any, **kwargs: Any) -> Any:
        if tie:
            modes.tie_gradients()
        found = original(optimizer, *args, **kwargs)
        modes.project()
        return found

    torch.optim.SGD.step = step  # type: ignore[method-assign]
    try:
        train_round(model, 0, number)
    finally:
        torch.optim.SGD.step = original  # type: ignore[method-assign]


@pytest.mark.parametrize("relative", [False, True])
def test_sent_values_are_those_of_section_3_3(relative: bool) -> None:
    """N values in the warm-up, then N - |E| with E as it stood when the round began."""
    strategy = cmd(Embedding(2, 30.0, relative=relative))
    grid = TappedGrid(make_grid(make_app()))
    embedded = [0]
    run(strategy, grid, 9, on_round=lambda n, _: embedded.append(members(strategy)) if n else None)
    total = 0
    for number, (sent, replies) in enumerate(grid.phases):
        free = WEIGHTS - embedded[number]
        for message in (*sent, *replies):
            found = find_frame(message.content)
            assert found is not None
            assert len(found[1].sections.values) == 4 * free
        total += free
    assert embedded[3] == 0 < embedded[5] < embedded[7] < embedded[9]
    assert strategy.modes.volume_percent == pytest.approx(100.0 * total / (WEIGHTS * 9), rel=1e-12)
    if not relative:  # each event nets its quota less the references it picks
        quota = -(-WEIGHTS * 30 // 100)
        assert embedded[5] in range(quota - 3, quota + 1)


def members(strategy: CMDStrategy) -> int:
    return len(strategy.codec.plan.members)


def test_server_and_clients_agree_in_every_round() -> None:
    """Masks, coefficients and what clients start from are the same bits everywhere."""
    strategy = cmd()
    seen: dict[int, set[bytes]] = {}

    def before(message: Any, context: Any) -> None:
        codec = load_codec(context)
        assert codec is not None
        assert codec.plan.identity == strategy.codec.plan.identity
        assert np.array_equal(codec.plan.embedded, strategy.codec.plan.embedded)
        arrays = message.content["arrays"]
        number = int(message.content["config"]["server-round"])
        bits = b"".join(array.numpy().tobytes() for array in arrays.values())
        seen.setdefault(number, set()).add(bits)

    models: dict[int, bytes] = {}

    def on_round(number: int, arrays: dict[str, Any]) -> None:
        models[number + 1] = b"".join(array.tobytes() for array in arrays.values())

    run(strategy, make_grid(make_app(before=before)), 9, on_round=on_round)
    assert all(seen[number] == {models[number]} for number in range(1, 10))
    plan = strategy.codec.plan
    flat = np.frombuffer(models[10], np.float32)
    assert np.array_equal(plan.expand(flat.copy()), flat)


def test_references_are_sent_and_frozen_coefficients_stay() -> None:
    strategy = cmd()
    frozen: dict[int, tuple[float, float]] = {}

    def on_round(number: int, _: Any) -> None:
        if not number:
            return
        plan = strategy.codec.plan
        for i, a, b in zip(plan.members.tolist(), plan.scale, plan.offset, strict=True):
            assert frozen.setdefault(i, (a, b)) == (a, b)
        assert not plan.embedded[plan.references].any()

    run(strategy, make_grid(make_app()), 9, on_round=on_round)
    assert len(frozen) == members(strategy) > 80


def test_partial_participation() -> None:
    """Clients that sat out get the part of the plan they lack, and nobody is resynchronised."""
    strategy = cmd(inner=fed_avg(fraction=0.5))
    grid = TappedGrid(make_grid(make_app()))
    result = run(strategy, grid, 14)
    assert result.arrays is not None
    assert strategy.resyncs == 0
    assert strategy.refusals == []
    assert {len(sent) for sent, _ in grid.phases} == {2}
    first: set[int] = set()
    for sent, _ in grid.phases:
        for message in sent:
            found = find_frame(message.content)
            assert found is not None
            node = message.metadata.dst_node_id
            # The layout travels once to each client.
            assert bool(found[1].sections.layout) == (node not in first)
            first.add(node)
    assert len(first) == 4


def test_a_late_joiner_gets_everything_in_one_message() -> None:
    strategy = cmd()
    inner = make_grid(make_app(), 3)
    grid = TappedGrid(inner)

    plan_then: list[int] = []

    def on_round(number: int, _: Any) -> None:
        if number == 6:
            inner.add_node(3, {"partition-id": 3})
            plan_then.extend(strategy.codec.plan.members.tolist())

    run(strategy, grid, 9, on_round=on_round)
    assert [len(sent) for sent, _ in grid.phases] == [3] * 6 + [4] * 3
    joiner = list(inner.contexts)[3]
    for message in grid.phases[6][0]:
        found = find_frame(message.content)
        assert found is not None
        whole = message.metadata.dst_node_id == joiner
        assert bool(found[1].sections.layout) == whole
        assert len(found[1].sections.values) == 4 * (WEIGHTS - len(plan_then))
    assert strategy.resyncs == 0
    assert strategy.refusals == []


@pytest.mark.parametrize("bits", [None, 8])
def test_lost_state_costs_one_message_and_no_bit(bits: int | None) -> None:
    """One client loses its state before every round; the final model is the same."""

    strategy, other = cmd(bits=bits), cmd(bits=bits)
    expected = run(other, make_grid(make_app()), 9)
    inner = make_grid(make_app())
    victim = list(inner.contexts)[1]

    def on_round(_: int, __: Any) -> None:
        inner.contexts[victim].state.clear()

    found = run(strategy, TappedGrid(inner), 9, on_round=on_round)
    assert found.arrays is not None
    assert expected.arrays is not None
    assert digest(found.arrays) == digest(expected.arrays)
    assert strategy.resyncs == 8  # all rounds but the first, in which it gets everything anyway
    assert strategy.refusals == []
    assert strategy.traffic.bytes_down > other.traffic.bytes_down


def test_an_outage_of_three_rounds() -> None:
    strategy = cmd()
    inner = make_grid(make_app())
    victim = list(inner.contexts)[2]
    parked: list[Any] = []

    def on_round(number: int, _: Any) -> None:
        if number == 4:
            parked.append(inner.contexts.pop(victim))
        if number == 7:
            inner.contexts[victim] = parked.pop()

    grid = TappedGrid(inner)
    result = run(strategy, grid, 9, on_round=on_round)
    assert result.arrays is not None
    assert [len(sent) for sent, _ in grid.phases] == [4] * 4 + [3] * 3 + [4] * 2
    assert strategy.resyncs == 0
    assert strategy.refusals == []
    # It kept the plan it knew, so it is sent only what was added since.
    found = find_frame(grid.phases[7][0][-1].content)
    assert found is not None
    assert not found[1].sections.layout
    assert found[1].sections.increments


def test_order_of_arrival_does_not_matter() -> None:
    """Five orders, one result."""
    found = set()
    for shift in range(4):
        grid = TappedGrid(make_grid(make_app()), lambda r, s=shift: r[s:][::-1] + r[:s])
        result = run(cmd(), grid, 8)
        assert result.arrays is not None
        found.add(digest(result.arrays))
    assert len(found) == 1


def test_same_seed_same_bits() -> None:
    for options in ({"bits": 8}, {"pool": True}):
        first, second = (run(cmd(**options), make_grid(make_app()), 8).arrays for _ in range(2))
        assert first is not None
        assert second is not None
        assert digest(first) == digest(second)


def test_bits_shrink_what_is_sent() -> None:
    sizes = []
    for bits in (None, 8, 4):
        strategy = cmd(bits=bits)
        run(strategy, make_grid(make_app()), 8)
        sizes.append(strategy.traffic.payload_up)
    assert sizes[0] > sizes[1] > sizes[2]


def test_pooling_moves_the_references_of_every_client() -> None:
    plain, pooled = cmd(), cmd(pool=True)
    a = run(plain, make_grid(make_app()), 5)
    b = run(pooled, make_grid(make_app()), 5)
    assert a.arrays is not None
    assert b.arrays is not None
    assert digest(a.arrays) == digest(b.arrays)  # nothing follows a reference yet
    a = run(cmd(), make_grid(make_app()), 9)
    b = run(pooled := cmd(pool=True), make_grid(make_app()), 9)
    assert a.arrays is not None
    assert b.arrays is not None
    assert digest(a.arrays) != digest(b.arrays)
    assert pooled.refusals == []


def test_federated_evaluation_is_framed_as_well() -> None:
    strategy = cmd(inner=fed_avg(evaluate=1.0))
    grid = TappedGrid(make_grid(make_app()))
    result = run(strategy, grid, 6)
    assert len(grid.phases) == 12
    assert all(find_frame(m.content) for sent, _ in grid.phases for m in sent)
    assert 0.0 <= float(result.evaluate_metrics_clientapp[6]["accuracy"]) <= 1.0
    assert strategy.refusals == []
    # The layout is sent in the first training message only.
    full = [bool(find_frame(m.content)[1].sections.layout) for m in grid.phases[1][0]]
    assert full == [False] * 4


def test_local_statistics_stay_with_the_clients() -> None:
    strategy = cmd(statistics="local")
    inner = make_grid(make_app(norm=True))
    result = run(strategy, inner, 8, norm=True)
    assert result.arrays is not None
    start = network(norm=True).state_dict()
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert np.array_equal(result.arrays[name].numpy(), start[name].numpy())
    means = {load_codec(c).statistics["1.running_mean"].tobytes() for c in inner.contexts.values()}
    assert len(means) == 4  # each client has its own
    counts = {
        int(load_codec(c).statistics["1.num_batches_tracked"]) for c in inner.contexts.values()
    }
    assert counts == {8 * 2 * 3}  # and it was carried from round to round
    assert strategy.refusals == []


def test_bad_settings_are_told_at_once() -> None:
    with pytest.raises(InputError, match="inner must be a strategy"):
        CMDStrategy(object())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="warmup"):
        cmd(warmup=1)
    with pytest.raises(InputError, match="is said here by project='step' and pool=True"):
        CMDStrategy(fed_avg(), Embedding(project="pool"))
    with pytest.raises(InputError, match="bits must be one of 4, 8 or None, got 3"):
        cmd(bits=3)
    with pytest.raises(InputError, match="statistics"):
        cmd(statistics="no")
    with pytest.raises(InputError, match="has not seen a model yet"):
        _ = cmd().codec
    with pytest.raises(PluginError, match="no round has ended yet"):
        _ = cmd().modes
