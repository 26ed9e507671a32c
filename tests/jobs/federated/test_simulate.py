"""A whole run: against Flower alone, files, both engines."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAvg
from safetensors.torch import load_file

from cmd_plugin.errors import InputError
from cmd_plugin.federated import FederatedConfig, InProcessGrid, MeteredGrid, simulate
from cmd_plugin.federated.apps import initial_arrays, make_client_app
from cmd_plugin.networks import build_model, evaluate

QUICK: dict[str, Any] = {
    "clients": 3,
    "rounds": 5,
    "warmup": 2,
    "train_limit": 90,
    "test_limit": 60,
    "modes": 3,
    "samples": 100,
    "embed_every": 1,
    "embed_percent": 40.0,
}


def bits_of(state: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in state.items()}


def plain_flower(config: FederatedConfig) -> tuple[ArrayRecord, MeteredGrid]:
    """The same run written with nothing but Flower."""
    nodes = [{"partition-id": n, "num-partitions": config.clients} for n in range(config.clients)]
    grid = MeteredGrid(InProcessGrid(make_client_app(config), nodes))
    strategy = FedAvg(
        fraction_train=config.fraction, fraction_evaluate=0.0, min_available_nodes=config.clients
    )
    state = random.getstate()
    random.seed(config.seed)
    result = strategy.start(
        grid=grid, initial_arrays=initial_arrays(config), num_rounds=config.rounds
    )
    random.setstate(state)
    assert result.arrays is not None
    return result.arrays, grid


def test_fedavg_is_flowers_fedavg_bit_for_bit() -> None:
    config = FederatedConfig(**QUICK, method="fedavg", seed=3)
    expected, grid = plain_flower(config)
    found = simulate(config)
    assert bits_of(found.state_dict) == {n: a.numpy().tobytes() for n, a in expected.items()}
    summary = found.summary
    assert summary["bytes_up"] == grid.traffic.bytes_up
    assert summary["bytes_down"] == grid.traffic.bytes_down
    assert summary["fedavg_bytes"] == summary["bytes_up"] + summary["bytes_down"]
    assert summary["embedded_fraction"] == 0.0


@pytest.mark.parametrize("method", ["cmd", "apf", "a-apf", "topk", "fedpaq"])
def test_every_method_runs_and_counts(method: str) -> None:
    config = FederatedConfig(**QUICK, method=method)
    summary = simulate(config).summary
    assert summary["refusals"] == []
    rounds = summary["rounds"]
    assert [r["round"] for r in rounds] == list(range(6))
    for name in ("bytes_up", "bytes_down", "fedavg_bytes"):
        assert sum(r[name] for r in rounds) == summary[name] > 0
    assert summary["bytes_up"] + summary["bytes_down"] < summary["fedavg_bytes"]
    assert 0.0 <= summary["accuracy"] <= 1.0
    assert summary["accuracy"] == rounds[-1]["accuracy"]


def test_fedavg_bytes_are_those_of_a_fedavg_run() -> None:
    """Up to what pinned counters save: Flower makes BatchNorm's float64, two letters longer."""
    framed = simulate(FederatedConfig(**QUICK)).summary
    plain = simulate(FederatedConfig(**QUICK, method="fedavg")).summary
    letters = len("float64") - len("int64")
    messages = 3 * (5 - 1)  # on the way down, from the second round on; equal counters are one
    assert plain["fedavg_bytes"] - framed["fedavg_bytes"] == letters * messages


def test_files(tmp_path: Path) -> None:
    seen: list[int] = []
    config = FederatedConfig(**QUICK, bits=8)
    result = simulate(config, tmp_path / "out", progress=lambda r: seen.append(r.round))
    out = tmp_path / "out"
    assert seen == list(range(6))
    summary = json.loads((out / "result.json").read_text())
    assert summary == result.summary
    with (out / "metrics.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["accuracy"]) for row in rows] == [r["accuracy"] for r in summary["rounds"]]
    assert [int(row["bytes_up"]) for row in rows] == [r["bytes_up"] for r in summary["rounds"]]
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    state = load_file(out / "model.safetensors")
    assert bits_of(state) == bits_of(result.state_dict)
    with torch.random.fork_rng():
        model = build_model("cnn", 1, 10, (8, 8))
    model.load_state_dict(state)
    images = torch.randn(4, 1, 8, 8)
    score = evaluate(model, [(images, torch.zeros(4, dtype=torch.int64))])
    assert np.isfinite(score.loss)
    again = simulate(config)
    assert bits_of(again.state_dict) == bits_of(result.state_dict)
    # A second run into the same folder replaces the first.
    simulate(FederatedConfig(**{**QUICK, "rounds": 3}, method="fedavg"), out)
    assert len((out / "metrics.csv").read_text().splitlines()) == 5


def test_an_interrupted_run_keeps_its_rows(tmp_path: Path) -> None:
    def stop(ended: Any) -> None:
        if ended.round == 2:
            raise KeyboardInterrupt

    state = random.getstate()
    with pytest.raises(KeyboardInterrupt):
        simulate(FederatedConfig(**QUICK), tmp_path, progress=stop)
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 1 + 3
    assert not (tmp_path / "result.json").exists()
    assert random.getstate() == state


def test_global_random_states_are_left_alone() -> None:
    before = random.getstate(), torch.get_rng_state()
    simulate(FederatedConfig(**{**QUICK, "rounds": 3}))
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_partial_participation_and_dirichlet() -> None:
    options = {**QUICK, "clients": 4, "fraction": 0.5, "partition": "dirichlet:1"}
    summary = simulate(FederatedConfig(**options)).summary
    assert summary["refusals"] == []
    sizes = summary["data"]["images_per_client"]
    assert sum(sizes) == 90
    assert max(sizes) > min(sizes)


@pytest.mark.parametrize("method", ["fedavg", "cmd"])
def test_diverged_training_is_one_sentence(method: str) -> None:
    config = FederatedConfig(**QUICK, method=method, lr=1e30)
    with pytest.raises(InputError, match="lower --lr"):
        simulate(config)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"data": "mist"}, "unknown data set 'mist'"),
        ({"model": "resnet19"}, "unknown model 'resnet19'"),
        ({"clients": 60}, "90 training images are too few for 60 clients"),
        ({"test_limit": 10**6}, "cannot choose 1000000 of"),
    ],
)
def test_bad_input_is_told_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        simulate(FederatedConfig(**{**QUICK, **options}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_flowers_engine_gives_the_same_bits() -> None:
    """Oracle 2: ray, with actors of its own, in parallel."""
    pytest.importorskip("ray")
    here = simulate(FederatedConfig(**QUICK))
    there = simulate(FederatedConfig(**QUICK, engine="ray"))
    assert bits_of(here.state_dict) == bits_of(there.state_dict)
    assert [r["accuracy"] for r in here.summary["rounds"]] == [
        r["accuracy"] for r in there.summary["rounds"]
    ]
