"""Two processes over gloo on the loopback interface."""

from __future__ import annotations

import json
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_toys import CASES, distributed_run, same
from clip_toys import geometry_run

from tests.helpers.processes import run_ranks

pytest.importorskip("lightning")

pytestmark = [pytest.mark.ddp, pytest.mark.slow]

Results = dict[str, tuple[dict[str, Any], dict[str, Any]]]


def free_ports(count: int) -> list[str]:
    """Distinct ports that nobody listens on."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [str(probe.getsockname()[1]) for probe in probes]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What both ranks ended with in every case; two processes go through all cases."""
    folder = tmp_path_factory.mktemp("ddp")
    script, ports = Path(__file__).parents[1] / "helpers" / "ddp_run.py", free_ports(len(CASES) + 1)
    run_ranks(script, folder, *ports)
    found = {
        name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]
        for name in (*CASES, "geometry")
    }
    return {name: (first, second) for name, (first, second) in found.items()}


@pytest.mark.parametrize("case", ["plain", "namespace", "tied", "pooled"])
def test_two_processes_equal_one(results: Results, case: str) -> None:
    """Same batches, so the same run up to the order in which gradients are summed."""
    first, second = results[case]
    alone = distributed_run(**CASES[case])
    assert same(first["weights"], second["weights"])
    for name, weight in alone["weights"].items():
        assert torch.allclose(first["weights"][name], weight, atol=1e-5), name
    assert torch.allclose(first["modelled"], alone["modelled"], atol=1e-4)
    one, two = alone["state"]["modes"]["tracker"], first["state"]["modes"]["tracker"]
    assert torch.equal(one["references"], two["references"])
    assert torch.equal(one["mode"], two["mode"])
    if case in ("tied", "pooled"):  # the same members, whatever the rounding of the sums
        one, two = alone["state"]["modes"]["embedder"], first["state"]["modes"]["embedder"]
        assert torch.equal(one["embedded"], two["embedded"])
        assert one["embedded"].float().mean() > 0.5
    shared = alone["metrics"].keys() & second["metrics"].keys()
    assert shared >= {"val_loss", "cmd/val_loss", "cmd/val_sum", "cmd/val_acc"}
    for name in shared:
        assert first["metrics"][name] == pytest.approx(second["metrics"][name], rel=1e-6), name
        assert first["metrics"][name] == pytest.approx(alone["metrics"][name], rel=1e-3), name
    assert first["metrics"]["cmd/val_loss"] != first["metrics"]["val_loss"]
    assert first["metrics"]["cmd/rank_zero"] == second["metrics"]["cmd/rank_zero"] == 1.0
    mean = (first["test_loss"] + second["test_loss"]) / 2  # logged without sync_dist
    assert mean == pytest.approx(alone["test_loss"], rel=1e-3)


@pytest.mark.parametrize("case", list(CASES))
def test_both_ranks_have_the_same_state(results: Results, case: str) -> None:
    first, second = results[case]
    assert first["state"]["modes"]["updates"] == 6
    assert same(first["state"], second["state"])
    assert torch.equal(first["modelled"], second["modelled"])


def test_recalibrated_statistics_are_those_of_all_processes(results: Results) -> None:
    """Each process has batches of its own; what is shown and saved is the mean over both."""
    first, second = results["recalibrated"]
    assert not torch.equal(first["mean"], second["mean"])
    statistics = first["state"]["statistics"]
    assert {name.rpartition(".")[2] for name in statistics} == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }
    assert same(statistics, second["state"]["statistics"])
    own = [rank["own_statistics"] for rank in (first, second)]
    assert not same(own[0], own[1])
    for name in ("net.1.running_mean", "net.1.running_var"):
        assert torch.allclose(statistics[name], (own[0][name] + own[1][name]) / 2, rtol=1e-6)
    assert first["metrics"]["cmd/val_loss"] == second["metrics"]["cmd/val_loss"]


def test_embedded_statistics_agree_between_processes(results: Results) -> None:
    """What is embedded follows rank 0's references; what is free stays each process's own."""
    first, second = results["embedded"]
    layout = json.loads(first["state"]["modes"]["layout"])
    sizes = [int(torch.tensor(shape).prod()) for shape in layout["shapes"]]
    at = layout["names"].index("net.1.running_mean")
    # Members of the event that ended the latest snapshot are not written yet.
    embedder = first["state"]["modes"]["embedder"]
    embedded = embedder["embedded"].split(sizes)[at]
    agree = first["mean_after"] == second["mean_after"]
    assert (agree & embedded).any()
    assert not agree[~embedded].any()
    assert torch.equal(first["mean_after"][~agree], first["mean"][~agree])
    assert torch.equal(second["mean_after"][~agree], second["mean"][~agree])
    for name in first["weights"]:
        if "running" not in name:
            assert same(first["weights"][name], second["weights"][name]), name


@pytest.mark.parametrize("case", ["norm", "options"])
def test_statistics_of_rank_zero_are_modelled(results: Results, case: str) -> None:
    """BatchNorm's running statistics differ between processes when the snapshot is taken."""
    first, second = results[case]
    assert not torch.equal(first["mean"], second["mean"])
    layout = json.loads(first["state"]["modes"]["layout"])
    at = layout["names"].index("net.1.running_mean")
    start = sum(int(torch.tensor(shape).prod()) for shape in layout["shapes"][:at])
    for rank in (first, second):
        modelled = rank["modelled"][start : start + len(first["mean"])]
        assert (modelled - first["mean"]).norm() < (modelled - second["mean"]).norm()


def test_the_geometry_of_two_processes_is_that_of_one(results: Results) -> None:
    """Each has half of the pairs; what is logged is of all of them."""
    first, second = results["geometry"]
    assert first["metrics"] == second["metrics"]
    alone = geometry_run()
    assert first["metrics"].keys() == alone["metrics"].keys()
    # Gradients of a contrastive loss see the other pairs of their own process only, so the weights
    # differ, and with them what is measured on them; the number of pairs does not.
    assert first["metrics"]["geometry/skipped"] == alone["metrics"]["geometry/skipped"] == 0.0
    for name, value in first["expected"].items():
        assert first["metrics"][f"geometry/{name}"] == pytest.approx(value, rel=1e-5), name
