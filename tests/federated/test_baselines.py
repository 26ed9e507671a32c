"""APF, A-APF, top-k and FedPAQ against what their papers say they do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cmd_plugin.errors import InputError
from cmd_plugin.federated import APFStrategy, FedPAQStrategy, TopKStrategy
from cmd_plugin.federated._flower import find_frame
from cmd_plugin.federated.quantise import quantised_bytes
from cmd_plugin.federated.strategy import FrameStrategy
from tests.helpers.federated import WEIGHTS, TappedGrid, digest, fed_avg, make_app, make_grid, run


def flats(strategy: FrameStrategy, rounds: int, grid: Any = None) -> list[np.ndarray]:
    """The global models [N] after each round, the initial one first."""
    found: list[np.ndarray] = []
    run(
        strategy,
        grid or make_grid(make_app()),
        rounds,
        on_round=lambda _, arrays: found.append(
            np.concatenate([array.reshape(-1) for array in arrays.values()])
        ),
    )
    return found


def test_apf_follows_its_definition() -> None:
    """An independent loop over single weights, fed with the models of the run."""
    strategy = APFStrategy(fed_avg(), threshold=0.6, decay=0.8)
    masks: list[np.ndarray] = []
    models: list[np.ndarray] = []

    def on_round(_: int, arrays: dict[str, Any]) -> None:
        models.append(np.concatenate([array.reshape(-1) for array in arrays.values()]))
        masks.append(np.zeros(WEIGHTS, bool) if strategy.frozen is None else strategy.frozen.copy())

    grid = TappedGrid(make_grid(make_app()))
    run(strategy, grid, 12, on_round=on_round)
    mean, absolute = np.zeros(WEIGHTS), np.zeros(WEIGHTS)
    period, until = [0] * WEIGHTS, [0] * WEIGHTS
    threshold = 0.6
    for number in range(1, 13):
        for i in range(WEIGHTS):
            if masks[number - 1][i]:
                assert models[number][i] == models[number - 1][i]
                continue
            g = float(np.float32(models[number][i] - models[number - 1][i]))
            mean[i] = 0.8 * mean[i] + 0.2 * g
            absolute[i] = 0.8 * absolute[i] + 0.2 * abs(g)
            settled = abs(mean[i]) / max(absolute[i], 1e-300) < threshold
            period[i] = period[i] + 1 if settled else period[i] // 2
            until[i] = number + period[i]
        expected = np.array(until) > number
        assert np.array_equal(masks[number], expected), number
        if expected.mean() > 0.8:
            threshold /= 2
        sent, replies = grid.phases[number - 1]
        for message in (*sent, *replies):
            found = find_frame(message.content)
            assert found is not None
            free = WEIGHTS - int(masks[number - 1].sum())
            assert len(found[1].sections.values) == 4 * free
    assert 0.05 < masks[-1].mean() < 1.0
    assert strategy.threshold == threshold
    assert strategy.refusals == []
    started = sum(bool(mask.any()) for mask in masks[:-1])
    assert strategy.mask_bytes == started * 4 * -(-WEIGHTS // 8)


def test_aggressive_apf_freezes_about_half_of_what_moves() -> None:
    strategy = APFStrategy(fed_avg(), threshold=1e-9, aggressive=True)
    shares: list[float] = []
    run(
        strategy,
        make_grid(make_app()),
        9,
        on_round=lambda n, _: shares.append(strategy.embedded_fraction) if n else None,
    )
    # 1/2 of the moving ones: 1/2, then half of the rest and of those that thawed ...
    assert 0.3 < np.mean(shares) < 0.6
    first, second = (flats(APFStrategy(fed_avg(), aggressive=True, seed=s), 4)[-1] for s in (1, 2))
    assert not np.array_equal(first, second)


def test_topk_sends_the_largest_and_remembers_the_rest() -> None:
    strategy = TopKStrategy(fed_avg(), share=0.1)
    grid = TappedGrid(make_grid(make_app()))
    models = flats(strategy, 8, grid)
    count = -(-WEIGHTS * 10 // 100)
    view = models[0]
    for number, (sent, replies) in enumerate(grid.phases, start=1):
        for reply in replies:
            frame = find_frame(reply.content)
            assert frame is not None
            assert len(frame[1].sections.values) == 4 * count
        frame = find_frame(sent[0].content)
        assert frame is not None
        if number == 1:
            assert len(frame[1].sections.values) == 4 * WEIGHTS
            continue
        assert len(frame[1].sections.values) == 4 * count
        # What clients hold moves towards the server's model in its largest differences.
        gap = models[number - 1] - view
        chosen = np.sort(np.argsort(-np.abs(gap), kind="stable")[:count])
        sections = frame[1].sections
        mask = np.unpackbits(np.frombuffer(sections.positions, np.uint8), count=WEIGHTS)
        assert np.array_equal(np.flatnonzero(mask), chosen)
        assert np.array_equal(np.frombuffer(sections.values, "<f4"), gap[chosen])
        view = view.copy()
        view[chosen] += gap[chosen]
    assert strategy.refusals == []


def test_topk_loses_nothing_in_the_long_run() -> None:
    """Error feedback: what one client trained is what arrived and what it still remembers."""
    started: list[np.ndarray] = []
    trained: list[np.ndarray] = []

    def flat(record: Any) -> np.ndarray:
        return np.concatenate([array.numpy().reshape(-1) for array in record.values()])

    app = make_app(
        before=lambda message, _: started.append(flat(message.content["arrays"])),
        change=lambda _, __, content: trained.append(flat(content["arrays"])),
    )
    inner = make_grid(app, 1)
    (context,) = inner.contexts.values()
    models = flats(TopKStrategy(fed_avg(), share=0.05), 6, inner)
    residual = np.frombuffer(context.state["cmd-plugin"]["residual"].data, "<f4")
    moved = np.sum(np.array(trained) - np.array(started), axis=0)
    arrived = models[-1] - models[0]
    assert np.count_nonzero(arrived) <= 6 * 6
    assert np.count_nonzero(residual) > WEIGHTS // 2
    # a handful of float32 sums of values of size one
    assert np.abs(arrived + residual - moved).max() < 2e-6


def test_a_client_that_missed_a_round_gets_the_whole_model() -> None:
    for strategy in (
        TopKStrategy(fed_avg(fraction=0.5), share=0.1),
        APFStrategy(fed_avg(fraction=0.5), threshold=0.9),
    ):
        flats(strategy, 10)
        assert strategy.refusals == []
        assert strategy.resyncs == 0


@pytest.mark.parametrize("bits", [8, 4])
def test_fedpaq_quantises_the_way_up(bits: int) -> None:
    strategy = FedPAQStrategy(fed_avg(), bits=bits)
    grid = TappedGrid(make_grid(make_app()))
    models = flats(strategy, 6, grid)
    for sent, replies in grid.phases:
        down = find_frame(sent[0].content)
        up = find_frame(replies[0].content)
        assert down is not None
        assert up is not None
        assert len(down[1].sections.values) == 4 * WEIGHTS
        sizes = len(up[1].sections.values), len(up[1].sections.scales)
        assert sizes == quantised_bytes(WEIGHTS, bits)
    exact = flats(FedPAQStrategy(fed_avg(), bits=8), 1)[1]
    plain: list[np.ndarray] = []
    run(
        fed_avg(),
        make_grid(make_app([])),
        1,
        on_round=lambda _, a: plain.append(np.concatenate([x.reshape(-1) for x in a.values()])),
    )
    # One round apart by less than a quantisation step of the largest update.
    step = 2 * np.abs(plain[1] - plain[0]).max() / 127
    assert np.abs(exact - plain[1]).max() < step
    assert np.isfinite(models[-1]).all()


def test_lost_state_is_resynchronised() -> None:
    for make in (
        lambda: TopKStrategy(fed_avg(), share=0.2),
        lambda: APFStrategy(fed_avg(), threshold=0.9),
    ):
        strategy, inner = make(), make_grid(make_app())
        victim = next(iter(inner.contexts))

        def on_round(number: int, _: Any, inner: Any = inner, victim: int = victim) -> None:
            if number == 5:
                inner.contexts[victim].state.clear()

        result = run(strategy, TappedGrid(inner), 8, on_round=on_round)
        assert result.arrays is not None
        assert strategy.resyncs == 1
        assert strategy.refusals == []


def test_same_seed_same_bits() -> None:
    for make in (
        lambda: TopKStrategy(fed_avg(), share=0.2),
        lambda: APFStrategy(fed_avg(), aggressive=True),
        lambda: FedPAQStrategy(fed_avg()),
    ):
        first, second = (run(make(), make_grid(make_app()), 5).arrays for _ in range(2))
        assert first is not None
        assert second is not None
        assert digest(first) == digest(second)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: APFStrategy(fed_avg(), threshold=0.0), "threshold must be above 0"),
        (lambda: APFStrategy(fed_avg(), decay=1.0), "decay must lie in"),
        (lambda: TopKStrategy(fed_avg(), share=1.0), "share must lie in"),
        (lambda: FedPAQStrategy(fed_avg(), bits=5), "bits must be one of 4, 8"),
    ],
)
def test_bad_settings(make: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        make()
