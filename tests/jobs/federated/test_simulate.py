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
from flwr.app import ArrayRecord, Message
from flwr.serverapp.strategy import FedAvg, FedMedian, FedTrimmedAvg, Krum
from safetensors.torch import load_file

from cmd_plugin.data import make_loader
from cmd_plugin.errors import InputError
from cmd_plugin.federated import InProcessGrid, MeteredGrid
from cmd_plugin.jobs.federated import SimulateOptions, make_client_app
from cmd_plugin.jobs.federated.apps import held_out_images, initial_arrays, make_strategy
from cmd_plugin.jobs.federated.report import draw_report
from cmd_plugin.jobs.federated.simulate import run, train
from cmd_plugin.networks import build_model, evaluate
from cmd_plugin.runs.figures import read_about
from cmd_plugin.runs.progress import Progress
from cmd_plugin.runs.result import Result

SMALL: dict[str, Any] = {"clients": 3, "rounds": 5, "train_limit": 90, "test_limit": 60}
QUICK: dict[str, Any] = {
    **SMALL,
    "warmup": 2,
    "modes": 3,
    "samples": 100,
    "embed_every": 1,
    "embed_percent": 40.0,
}


def bits_of(state: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in state.items()}


def plain_flower(options: SimulateOptions) -> tuple[ArrayRecord, MeteredGrid]:
    """The same run written with nothing but Flower."""
    nodes = [{"partition-id": n, "num-partitions": options.clients} for n in range(options.clients)]
    grid = MeteredGrid(InProcessGrid(make_client_app(options), nodes))
    strategy = FedAvg(
        fraction_train=options.fraction, fraction_evaluate=0.0, min_available_nodes=options.clients
    )
    state = random.getstate()
    random.seed(options.seed)
    result = strategy.start(
        grid=grid, initial_arrays=initial_arrays(options), num_rounds=options.rounds
    )
    random.setstate(state)
    assert result.arrays is not None
    return result.arrays, grid


def test_fedavg_is_flowers_fedavg_bit_for_bit() -> None:
    options = SimulateOptions(**SMALL, method="fedavg", seed=3)
    expected, grid = plain_flower(options)
    found = train(options)
    assert bits_of(found.state_dict) == {n: a.numpy().tobytes() for n, a in expected.items()}
    summary = found.result.metrics
    assert summary["bytes_up"] == grid.traffic.bytes_up
    assert summary["bytes_down"] == grid.traffic.bytes_down
    assert summary["fedavg_bytes"] == summary["bytes_up"] + summary["bytes_down"]
    assert summary["embedded_fraction"] == 0.0


@pytest.mark.parametrize("method", ["cmd", "apf", "a-apf", "topk", "fedpaq", "eden"])
def test_every_method_runs_and_counts(method: str) -> None:
    chosen = QUICK if method == "cmd" else SMALL
    summary = run(SimulateOptions(**chosen, method=method), None).metrics
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
    framed = run(SimulateOptions(**QUICK), None).metrics
    plain = run(SimulateOptions(**SMALL, method="fedavg"), None).metrics
    letters = len("float64") - len("int64")
    messages = 3 * (5 - 1)  # on the way down, from the second round on; equal counters are one
    assert plain["fedavg_bytes"] - framed["fedavg_bytes"] == letters * messages


def test_adapters_send_less_and_end_as_a_plain_network(tmp_path: Path) -> None:
    given: dict[str, Any] = {**SMALL, "model": "cnn:8", "rounds": 2, "method": "fedavg"}
    plain = run(SimulateOptions(**given), None).metrics
    found = train(SimulateOptions(**given, adapters=2), tmp_path / "run")
    summary = found.result.metrics
    # Flower's headers of arrays and messages are most of what is left of so small a network.
    # Up to adapters that are equal because they are still zero: Flower sends those once.
    assert summary["fedavg_bytes"] == pytest.approx(plain["fedavg_bytes"], rel=0.01)
    assert summary["payload_up"] + summary["payload_down"] < 0.6 * plain["fedavg_bytes"]
    assert summary["parameters"] < plain["parameters"] / 2
    assert summary["rounds"][0]["accuracy"] == plain["rounds"][0]["accuracy"]
    network = build_model("cnn:8", 1, 10, (8, 8))
    network.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"))
    score = evaluate(network, make_loader(held_out_images(SimulateOptions(**given)), 64))
    assert score.accuracy == summary["accuracy"]


@pytest.mark.parametrize("method", ["eden", "cmd"])
def test_bytes_are_those_of_the_serialised_messages(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 1, 2, 4 and 8 bits: every message is taken apart by Flower's own means."""
    module = pytest.importorskip("flwr.supercore.inflatable.inflatable_object")
    real = InProcessGrid.send_and_receive
    counted = [0, 0]

    def size(message: Message) -> int:
        return sum(len(x.deflate()) for x in module.get_all_nested_objects(message).values())

    def send_and_receive(grid: InProcessGrid, messages: Any, *, timeout: Any = None) -> Any:
        sent = list(messages)
        train = [m.metadata.message_type == "train" for m in sent]
        counted[0] += sum(size(m) for m, t in zip(sent, train, strict=True) if t)
        replies = list(real(grid, sent, timeout=timeout))
        counted[1] += sum(size(r) for r, t in zip(replies, train, strict=True) if t)
        return replies

    monkeypatch.setattr(InProcessGrid, "send_and_receive", send_and_receive)
    chosen = {**(QUICK if method == "cmd" else SMALL), "method": method}
    chosen |= {"clients": 2, "rounds": 4, "train_limit": 40, "test_limit": 20}
    totals = []
    for bits in (1, 2, 4, 8):
        counted[:] = 0, 0
        found = run(SimulateOptions(**chosen, bits=bits), None).metrics
        assert [found["bytes_down"], found["bytes_up"]] == counted
        totals.append(sum(counted))
    assert totals == sorted(totals)
    assert totals[0] < 0.5 * totals[-1]


@pytest.mark.parametrize("aggregate", ["median", "trimmed", "krum"])
def test_robust_rounds(aggregate: str) -> None:
    options = {**QUICK, "clients": 5, "aggregate": aggregate, "bits": 2}
    strategy = make_strategy(SimulateOptions(**options))
    expected = {"median": FedMedian, "trimmed": FedTrimmedAvg, "krum": Krum}[aggregate]
    assert type(strategy.inner) is expected
    result = run(SimulateOptions(**options), None)
    assert result.metrics["refusals"] == []
    assert result.metrics["embedded_fraction"] > 0.3


def test_files(tmp_path: Path) -> None:
    seen: list[Progress] = []
    options = SimulateOptions(**QUICK, bits=8)
    found = train(options, tmp_path / "out", progress=seen.append)
    out = tmp_path / "out"
    assert [event.done for event in seen] == list(range(6))
    assert {event.total for event in seen} == {5}
    assert seen[3].stage == "round 3"
    summary = json.loads((out / "result.json").read_text())
    assert summary == found.result.as_dict()
    assert Result.load(out / "result.json") == found.result
    metrics = summary["metrics"]
    sent = metrics["bytes_up"] + metrics["bytes_down"]
    assert seen[5].note == f"accuracy {metrics['accuracy']:.3f}  {sent / 1e6:.1f} MB"
    with (out / "metrics.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["accuracy"]) for row in rows] == [r["accuracy"] for r in metrics["rounds"]]
    assert [int(row["bytes_up"]) for row in rows] == [r["bytes_up"] for r in metrics["rounds"]]
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert read_about(out / "report.png") == options.as_dict()
    state = load_file(out / "model.safetensors")
    assert bits_of(state) == bits_of(found.state_dict)
    with torch.random.fork_rng():
        model = build_model("cnn", 1, 10, (8, 8))
    model.load_state_dict(state)
    images = torch.randn(4, 1, 8, 8)
    score = evaluate(model, [(images, torch.zeros(4, dtype=torch.int64))])
    assert np.isfinite(score.loss)
    again = train(options)
    assert again.result.out is None
    assert bits_of(again.state_dict) == bits_of(found.state_dict)
    # A finished run is given back with its model, and a second one replaces it.
    kept = train(options, out, resume=True)
    assert bits_of(kept.state_dict) == bits_of(found.state_dict)
    assert kept.result == found.result
    run(SimulateOptions(**{**SMALL, "rounds": 3}, method="fedavg"), out, overwrite=True)
    assert len((out / "metrics.csv").read_text().splitlines()) == 5


def test_an_interrupted_run_keeps_its_rows_and_its_model(tmp_path: Path) -> None:
    def stop(event: Progress) -> None:
        if event.done == 2:
            raise KeyboardInterrupt

    state = random.getstate()
    with pytest.raises(KeyboardInterrupt):
        run(SimulateOptions(**QUICK), tmp_path, progress=stop)
    assert len((tmp_path / "unfinished/metrics.csv").read_text().splitlines()) == 1 + 3
    assert not (tmp_path / "result.json").exists()
    assert random.getstate() == state
    expected = train(SimulateOptions(**{**SMALL, "rounds": 2}, method="fedavg")).state_dict
    kept = load_file(tmp_path / "unfinished/model.safetensors")
    # Nothing is embedded yet, so it is FedAvg's, which makes counters float64.
    counters = {name for name in expected if name.endswith("num_batches_tracked")}
    assert counters
    for name in set(kept) - counters:
        assert torch.equal(kept[name], expected[name]), name


def test_the_picture_shows_the_data() -> None:
    options = SimulateOptions(**QUICK)
    result = run(options, None)
    figure = draw_report(options, result.metrics, result.data)
    left, right, share = figure.axes
    rounds = result.metrics["rounds"]
    sent = np.cumsum([r["bytes_up"] + r["bytes_down"] for r in rounds]) / 1e6
    plain, mine = left.get_lines()
    assert np.allclose(mine.get_xdata(), sent)
    assert np.allclose(mine.get_ydata(), [100 * r["accuracy"] for r in rounds])
    assert plain.get_xdata()[-1] == pytest.approx(result.metrics["fedavg_bytes"] / 1e6)
    (not_sent,) = share.get_lines()
    assert np.allclose(not_sent.get_ydata(), [100 * r["embedded_fraction"] for r in rounds])
    curves = {line.get_label(): line for line in right.get_lines()}
    for label, name in (
        ("down", "bytes_down"),
        ("up", "bytes_up"),
        ("down, sent as FedAvg", "fedavg_bytes_down"),
        ("up, sent as FedAvg", "fedavg_bytes_up"),
    ):
        assert np.allclose(curves.pop(label).get_ydata(), [r[name] / 1e6 for r in rounds[1:]])
    assert not curves  # the ways are apart for all, or both together for all
    for ended in rounds:
        assert ended["fedavg_bytes"] == ended["fedavg_bytes_up"] + ended["fedavg_bytes_down"]
    figure.draw_without_rendering()
    for axes in (left, right):  # no curve can cross a legend
        legend = axes.get_legend()
        assert legend.get_window_extent().y1 < axes.get_window_extent().y0
    assert "weights not sent, %" in [t.get_text() for t in right.get_legend().get_texts()]


def test_global_random_states_are_left_alone() -> None:
    before = random.getstate(), torch.get_rng_state()
    run(SimulateOptions(**{**QUICK, "rounds": 3}), None)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_partial_participation_and_dirichlet() -> None:
    options = {**QUICK, "clients": 4, "fraction": 0.5, "partition": "dirichlet:1"}
    result = run(SimulateOptions(**options), None)
    assert result.metrics["refusals"] == []
    sizes = result.data["images_per_client"]
    assert sum(sizes) == 90
    assert max(sizes) > min(sizes)


@pytest.mark.parametrize("method", ["fedavg", "cmd"])
def test_diverged_training_is_one_sentence(method: str) -> None:
    chosen = QUICK if method == "cmd" else SMALL
    with pytest.raises(InputError, match="lower --lr"):
        run(SimulateOptions(**chosen, method=method, lr=1e30), None)


@pytest.mark.parametrize("method", ["fedavg", "cmd"])
def test_a_round_without_any_update_fails(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every client raises: what would be left is the model of the round before."""

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr("cmd_plugin.jobs.federated.apps._fit", broken)
    chosen = QUICK if method == "cmd" else SMALL
    with pytest.raises(InputError, match="in round 1"):
        run(SimulateOptions(**chosen, method=method), None)


@pytest.mark.parametrize("method", ["cmd", "apf", "topk", "fedpaq", "eden"])
def test_no_client_can_claim_more_images_than_there_are(method: str) -> None:
    strategy = make_strategy(
        SimulateOptions(**(QUICK if method == "cmd" else SMALL), method=method)
    )
    assert strategy.max_examples == 90


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
        run(SimulateOptions(**{**QUICK, **options}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_flowers_engine_gives_the_same_bits(tmp_path: Path) -> None:
    """On ray, with actors of its own, in parallel."""
    pytest.importorskip("ray")
    here = train(SimulateOptions(**QUICK))
    there = train(SimulateOptions(**QUICK, engine="ray"), tmp_path)
    assert bits_of(here.state_dict) == bits_of(there.state_dict)
    # Bytes are not compared: ray's node and message numbers take a few more or less.
    assert [r["accuracy"] for r in here.result.metrics["rounds"]] == [
        r["accuracy"] for r in there.result.metrics["rounds"]
    ]
    assert load_file(tmp_path / "model.safetensors").keys() == here.state_dict.keys()
