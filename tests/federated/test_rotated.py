"""EDEN between server and clients, alone and for the values that CMD still sends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cmd_plugin.errors import InputError, StateMismatch
from cmd_plugin.federated import CMDStrategy, EDENStrategy
from cmd_plugin.federated._flower import find_frame
from cmd_plugin.federated.codec import ModeCodec
from cmd_plugin.federated.eden import eden_bytes
from cmd_plugin.federated.frame import FrameError, NeedResync
from cmd_plugin.federated.packing import Packing, pack_arrays, unpack_arrays
from cmd_plugin.federated.plan import Plan
from cmd_plugin.federated.quantise import quantised_bytes
from cmd_plugin.federated.strategy import FrameStrategy
from cmd_plugin.modes import Embedding
from tests.helpers.federated import (
    WEIGHTS,
    TappedGrid,
    digest,
    fed_avg,
    make_app,
    make_grid,
    run,
)

ROUNDS = 9


def eden(bits: int = 2, **options: Any) -> EDENStrategy:
    return EDENStrategy(fed_avg(**options.pop("sampling", {})), bits=bits, **options)


def cmd(bits: int = 2, **options: Any) -> CMDStrategy:
    settings = {"modes": 3, "warmup": 2, "samples": 60, "pool": True, "coding": "eden", **options}
    inner = fed_avg(**settings.pop("sampling", {}))
    return CMDStrategy(inner, Embedding(2, 30.0, project="step"), bits=bits, **settings)


MAKE = {"eden": eden, "cmd": cmd}


def frames(grid: TappedGrid, way: int) -> list[list[Any]]:
    """Frames of each round, way 0 down and 1 up."""
    found = [[find_frame(message.content) for message in phase[way]] for phase in grid.phases]
    assert all(frame is not None for phase in found for frame in phase)
    return [[frame[1] for frame in phase if frame is not None] for phase in found]


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("bits", [1, 4])
def test_both_ways_have_so_many_bits(name: str, bits: int) -> None:
    strategy = MAKE[name](bits)
    grid = TappedGrid(make_grid(make_app()))
    embedded: list[int] = []
    run(
        strategy,
        grid,
        ROUNDS,
        on_round=lambda *_: embedded.append(round(strategy.embedded_fraction * WEIGHTS)),
    )
    assert strategy.refusals == []
    assert strategy.resyncs == 0
    for number, (down, up) in enumerate(zip(frames(grid, 0), frames(grid, 1), strict=True)):
        references = 3 if embedded[number] else 0
        free = WEIGHTS - embedded[number] - references
        for frame in (*(down if number else []), *up):
            sizes = len(frame.sections.values), len(frame.sections.scales)
            assert sizes == eden_bytes(free, bits)
            fine = sum(quantised_bytes(references, 8)) if references else 0
            assert len(frame.sections.references) == fine
        assert len({frame.pack() for frame in up}) == len(up)
    first = frames(grid, 0)[0][0].sections
    assert (len(first.values), len(first.scales)) == quantised_bytes(WEIGHTS, 8)
    assert strategy.embedded_fraction == 0.0 if name == "eden" else embedded[-1] > 0.7 * WEIGHTS
    assert strategy.traffic.bytes_up == grid.traffic.bytes_up
    assert strategy.traffic.bytes_down == grid.traffic.bytes_down


@pytest.mark.parametrize("name", MAKE)
def test_clients_hold_what_the_server_thinks_they_do(name: str) -> None:
    """Bit for bit, after every round, also on curves that only the receiver computes."""
    inner = make_grid(make_app())
    strategy = MAKE[name](2)
    differences: list[float] = []

    def on_round(number: int, arrays: dict[str, np.ndarray]) -> None:
        if not number:
            return
        held = strategy._held
        assert held is not None
        for context in inner.contexts.values():
            state = context.state["cmd-plugin"]
            kept = ModeCodec.from_bytes({n: a.data for n, a in state.items() if n != "project"})
            assert kept.values_identity == held.identity
            assert np.array_equal(kept.values, held.values)
        flat = np.concatenate([array.reshape(-1) for array in arrays.values()])
        differences.append(float(np.linalg.norm(flat - held.values)))

    run(strategy, TappedGrid(inner), ROUNDS, on_round=on_round)
    assert strategy.refusals == []
    # fed back: what is left out does not pile up
    assert max(differences[-3:]) < 3 * max(differences[:3])


def test_curves_start_where_clients_know_the_weight_to_be() -> None:
    """Independent: slopes on a grid of 8 bits, offsets from the values that were held."""
    generator = np.random.default_rng(0)
    held = generator.standard_normal(40).astype("f4")
    members, references = np.arange(5, 30), np.array([1, 2, 39])
    mode = generator.integers(0, 3, 25).astype("u1")
    scale, offset = generator.standard_normal(25), generator.standard_normal(25)
    server, client, late = Plan(40), Plan(40), Plan(40)
    server.embed(members, mode, scale, offset, references, held=held)
    step = np.abs(scale.astype("f4")).max() / 127
    assert np.abs(server.scale - scale).max() <= step / 2 * (1 + 1e-6)
    exact = held[members] - server.scale * held[references[mode]].astype(float)
    assert np.array_equal(server.offset, exact.astype("f4").astype(float))
    assert np.allclose(server.expand(held.copy()), held, atol=1e-6)
    short, long = server.since(0, short=True), server.since(0)
    assert short is not None
    assert long is not None
    assert len(long) - len(short) == 25 * 7 - 4  # nine bytes a member or two, and one scale
    client.extend(0, short, server.identity, held)
    late.extend(0, long, server.identity)
    for plan in (client, late):
        assert plan.identity == server.identity
        assert np.array_equal(plan.expand(held.copy()), server.expand(held.copy()))
    with pytest.raises(NeedResync, match="values an increment builds on"):
        Plan(40).extend(0, short, server.identity)
    with pytest.raises(FrameError, match="it ends in"):
        Plan(40).extend(0, short, server.identity, held + 1)
    for damaged in (short[:-1], short[:20], short[:8] + b"\1" + short[9:60]):
        broken = (len(damaged) - 8).to_bytes(8, "little") + damaged[8:]
        with pytest.raises(FrameError):
            Plan(40).extend(0, broken, server.identity, held)


@pytest.mark.parametrize(("name", "memory"), [("eden", True), ("cmd", True), ("cmd", False)])
def test_lost_state_and_missed_rounds(name: str, memory: bool) -> None:
    inner = make_grid(make_app())
    strategy = MAKE[name](4, memory=memory, sampling={"fraction": 0.5})
    whole = run(strategy, TappedGrid(inner), ROUNDS)
    assert whole.arrays is not None
    assert strategy.refusals == []
    assert strategy.resyncs == 0
    forgetful, inner = MAKE[name](4, memory=memory), make_grid(make_app())

    def forget(number: int, _: Any) -> None:
        if number == 5:
            next(iter(inner.contexts.values())).state.clear()

    lost = run(forgetful, TappedGrid(inner), ROUNDS, on_round=forget)
    assert forgetful.refusals == []
    assert forgetful.resyncs == 1
    kept = run(MAKE[name](4, memory=memory), make_grid(make_app()), ROUNDS)
    assert lost.arrays is not None
    assert kept.arrays is not None
    assert digest(lost.arrays) == digest(kept.arrays)


@pytest.mark.parametrize("name", MAKE)
def test_one_bit_trains(name: str) -> None:
    """The direction of FedAvg's own way: less than a right angle, and nearly its length."""
    ends = []
    for strategy in (MAKE[name](1), fed_avg()):
        mods = {} if isinstance(strategy, FrameStrategy) else {"mods": []}
        models: list[np.ndarray] = []
        run(
            strategy,
            make_grid(make_app(**mods)),
            ROUNDS,
            on_round=lambda _, a, m=models: m.append(
                np.concatenate([x.reshape(-1) for x in a.values()])
            ),
        )
        ends.append(models[-1] - models[0])
    lengths = [np.linalg.norm(end) for end in ends]
    assert ends[0] @ ends[1] > 0.5 * lengths[0] * lengths[1]
    assert 0.5 < lengths[0] / lengths[1] < 2.0


@pytest.mark.parametrize("name", MAKE)
def test_saved_between_two_rounds(name: str) -> None:
    """A strategy that is given its state back, after an event, sends the same bytes."""
    from flwr.app import ArrayRecord

    from cmd_plugin.federated.rounds import run_round
    from tests.helpers.federated import network

    ends = []
    for stop in (None, 3):
        strategy, grid = MAKE[name](1), make_grid(make_app())
        arrays = ArrayRecord(network().state_dict())
        for number in range(1, ROUNDS):
            arrays = run_round(strategy, grid, number, arrays)
            if number == stop:
                state = strategy.state_dict()
                strategy = MAKE[name](1)
                strategy.load_state_dict(state)
                with pytest.raises(StateMismatch):
                    MAKE[name](2).load_state_dict(state)
        ends.append((digest(arrays), strategy.traffic.bytes_down, strategy.traffic.bytes_up))
    assert ends[0] == ends[1]


def test_statistics_in_sixteen_bits() -> None:
    arrays = {
        "w": np.ones(3, np.float32),
        "norm.running_mean": np.array([1.0, -3.14159, 1e30], np.float32),
        "norm.running_var": np.array([1e-30, 2.0, 0.0], np.float32),
        "norm.num_batches_tracked": np.array(7, np.int64),
    }
    packing = Packing.of(arrays)
    data = pack_arrays(packing.shared, arrays, coarse=True)
    assert len(data) == 2 * 6 + 8
    found = unpack_arrays(packing.shared, data, coarse=True)
    for name, array in found.items():
        assert array.dtype == arrays[name].dtype
        assert array.shape == arrays[name].shape
        # eight bits of a mantissa, rounded to the nearest
        assert (np.abs(array - arrays[name]) <= 2.0**-8 * np.abs(arrays[name])).all()
        expected = torch.from_numpy(np.atleast_1d(arrays[name]))
        if array.dtype == np.float32:
            assert np.array_equal(array, expected.bfloat16().float().numpy())
    with pytest.raises(FrameError, match="expected 20 bytes"):
        unpack_arrays(packing.shared, data[:-1], coarse=True)


def test_bad_settings() -> None:
    with pytest.raises(InputError, match="bits must be one of 1, 2, 4, 8, got 3"):
        eden(3)
    with pytest.raises(InputError, match="bits must be one of 1, 2, 4, 8, got 16"):
        cmd(16)
    with pytest.raises(InputError, match="bits must be one of 4, 8 or None, got 1"):
        cmd(1, coding="linear")
    with pytest.raises(InputError, match="coding must be one of linear, eden, got 'zip'"):
        cmd(1, coding="zip")
