"""Other strategies and mods of Flower around and inside: averaging, adaptive, private."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp.mod import fixedclipping_mod
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    Krum,
    Strategy,
)

from cmd_plugin.errors import InputError
from cmd_plugin.federated import CMDStrategy, cmd_mod, project_mod
from cmd_plugin.federated._flower import dense_record
from cmd_plugin.federated.client import load_codec
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
SAMPLING: dict[str, Any] = {"fraction_evaluate": 0.0, "min_evaluate_nodes": 0}


def cmd(inner: Strategy, **options: Any) -> CMDStrategy:
    settings = {"modes": 3, "warmup": 2, "samples": 60, **options}
    return CMDStrategy(inner, Embedding(2, 30.0), **settings)


INNER: dict[str, Any] = {
    "FedAvgM": lambda: FedAvgM(server_learning_rate=1.0, server_momentum=0.5, **SAMPLING),
    "FedProx": lambda: FedProx(proximal_mu=0.1, **SAMPLING),
    "FedAdam": lambda: FedAdam(eta=0.01, **SAMPLING),
    "FedMedian": lambda: FedMedian(**SAMPLING),
    "FedTrimmedAvg": lambda: FedTrimmedAvg(beta=0.25, **SAMPLING),
    "Krum": lambda: Krum(num_malicious_nodes=1, **SAMPLING),
}


@pytest.mark.parametrize("name", INNER)
def test_any_strategy_goes_inside(name: str) -> None:
    """No errors, dtypes unchanged, less is sent; before the first event, the same."""
    dtypes = set()
    sizes, embedded = [], []
    strategy = cmd(INNER[name]())

    def on_round(_: int, arrays: dict[str, np.ndarray]) -> None:
        dtypes.update(array.dtype for array in arrays.values())
        sizes.append(strategy.traffic.payload_up)
        embedded.append(round(strategy.embedded_fraction * WEIGHTS))

    result = run(strategy, make_grid(make_app()), ROUNDS, on_round=on_round)
    assert result.arrays is not None
    assert strategy.refusals == []
    assert dtypes == {np.dtype(np.float32)}
    assert strategy.embedded_fraction > 0.7
    # four bytes for each of four clients and every weight that was embedded when the round began
    assert list(np.diff(sizes)[0] - np.diff(sizes)) == [16 * count for count in embedded[:-1]]
    plain, framed = (
        run(s, make_grid(make_app(mods)), 5, on_round=None).arrays
        for s, mods in ((INNER[name](), []), (cmd(INNER[name](), warmup=20), [cmd_mod]))
    )
    assert plain is not None
    assert framed is not None
    for key, array in plain.items():
        # FedAdam alone keeps float64 from round to round, where ours rounds to float32.
        exact = array.numpy().dtype == np.float32
        gap = np.abs(framed[key].numpy() - array.numpy()).max()
        assert gap == 0.0 if exact else gap < 1e-5


class Norms:
    """Outermost mod but one: the norm of each update as the server will decode it."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def __call__(self, message: Message, context: Context, call_next: Any) -> Message:
        def flat(record: Any) -> np.ndarray:
            return np.concatenate([a.numpy().reshape(-1) for a in record.values()])

        start = flat(message.content["arrays"])
        reply = call_next(message, context)
        codec = load_codec(context)
        assert codec is not None
        (record,) = reply.content.array_records.values()
        end = codec.plan.expand(flat(record).astype(np.float32))
        self.norms.append(float(np.linalg.norm((end - start).astype(np.float64))))
        return reply


CLIP = 0.05


@pytest.mark.parametrize("projected", [True, False])
def test_client_side_clipping_needs_the_projection(projected: bool) -> None:
    """With project_mod inside, what is decoded is within the bound; without, it is not.

    Canonical differences form a linear space, so that scaling one stays inside.
    """
    norms = Norms()
    mods = [cmd_mod, norms, fixedclipping_mod, *([project_mod] if projected else [])]
    inner = DifferentialPrivacyClientSideFixedClipping(
        fed_avg(), noise_multiplier=0.0, clipping_norm=CLIP, num_sampled_clients=4
    )
    strategy = cmd(inner)
    models: list[dict[str, np.ndarray]] = []

    def worst(_: int, round_number: int, content: RecordDict) -> None:
        """After the last event, move the references alone: all that follow them are dragged on."""
        if round_number < ROUNDS:
            return
        packing = strategy.codec.packing
        flat = packing.flatten(models[-1]).copy()
        flat[strategy.codec.plan.references] += 1.0
        content["arrays"] = dense_record(packing.unflatten(flat, {}))

    result = run(
        strategy,
        make_grid(make_app(mods, change=worst)),
        ROUNDS,
        on_round=lambda _, arrays: models.append(arrays),
    )
    assert result.arrays is not None
    assert strategy.refusals == []
    last = np.array(norms.norms[-4:])
    if projected:
        assert last == pytest.approx(CLIP, rel=1e-4)
    else:
        plan = strategy.codec.plan
        squares = len(plan.references) + np.square(plan.scale[plan.embedded[plan.members]]).sum()
        assert (last > 1.05 * CLIP).all()
        assert last.max() < CLIP * np.sqrt(squares)


def test_server_side_clipping_goes_inside() -> None:
    inner = DifferentialPrivacyServerSideFixedClipping(
        fed_avg(), noise_multiplier=0.0, clipping_norm=1.0, num_sampled_clients=4
    )
    strategy = cmd(inner)
    result = run(strategy, make_grid(make_app()), ROUNDS)
    assert result.arrays is not None
    assert strategy.refusals == []
    assert strategy.embedded_fraction > 0.7


def test_a_refused_update_does_not_cost_a_private_round() -> None:
    """Flower's privacy wrappers skip a round in which any reply is an error: they see none."""
    inner = DifferentialPrivacyServerSideFixedClipping(
        fed_avg(), noise_multiplier=0.0, clipping_norm=1.0, num_sampled_clients=4
    )

    def raising(message: Message, context: Context) -> None:
        where = message.content["config"]["server-round"], context.node_config["partition-id"]
        if where == (3, 0):
            raise RuntimeError("gone")

    models: list[bytes] = []
    strategy = cmd(inner)
    run(
        strategy,
        make_grid(make_app(before=raising)),
        4,
        on_round=lambda _, a: models.append(b"".join(x.tobytes() for x in a.values())),
    )
    assert len(strategy.refusals) == 1
    assert len(set(models)) == 5


def test_the_clipping_mod_outside_fails_loudly() -> None:
    inner = DifferentialPrivacyClientSideFixedClipping(
        fed_avg(), noise_multiplier=0.0, clipping_norm=1.0, num_sampled_clients=4
    )
    strategy = cmd(inner)
    with pytest.raises(InputError, match=r"no trained model; .* put cmd_mod .* first"):
        run(strategy, make_grid(make_app([fixedclipping_mod, cmd_mod])), 2)
    assert len(strategy.refusals) == 8


def test_messages_without_a_frame_pass_the_mods_untouched() -> None:
    plain = run(fed_avg(), make_grid(make_app([])), 3)
    modded = run(fed_avg(), make_grid(make_app([cmd_mod, project_mod])), 3)
    assert plain.arrays is not None
    assert modded.arrays is not None
    assert digest(plain.arrays) == digest(modded.arrays)


def test_a_shared_content_is_not_changed() -> None:
    """All messages of Flower's FedAvg share one content: ours must be new ones."""
    strategy = cmd(fed_avg())
    grid = TappedGrid(make_grid(make_app()))
    run(strategy, grid, 2)
    contents = {id(message.content) for message in grid.phases[1][0]}
    assert len(contents) == 4


def test_averaged_squeezed_vectors_are_averaged_models() -> None:
    """A secure sum may run on squeezed vectors."""
    strategy = cmd(fed_avg())
    result = run(strategy, make_grid(make_app()), ROUNDS)
    assert isinstance(result.arrays, ArrayRecord)
    plan = strategy.codec.plan
    generator = np.random.default_rng(0)

    def expand(squeezed: np.ndarray) -> np.ndarray:
        flat = np.zeros(plan.numel, np.float32)
        flat[plan.free] = squeezed
        return plan.expand(flat)

    clients = [expand(generator.standard_normal(len(plan.free)).astype("f4")) for _ in range(5)]
    weights = generator.dirichlet(np.ones(5))
    secure = sum(w * c[plan.free] for w, c in zip(weights, clients, strict=True))
    plain = sum(w * c for w, c in zip(weights, clients, strict=True))
    # float32 roundings, multiplied by the slopes
    steepest = max(1.0, np.abs(plan.scale).max())
    assert np.abs(expand(secure) - plain).max() < 1e-6 * steepest * 4
