"""`cmd-plugin points train` and `explain`: what they print where, what they write, how they end."""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cmd_plugin.cli.main import run
from cmd_plugin.training import points as training

QUICK = ["--points", "48", "--train-clouds", "48", "--test-clouds", "24", "--width", "0.25"]
QUICK += ["--epochs", "2", "--batch-size", "12"]


def cmd_plugin(*arguments: str) -> int:
    """Run the command in this process; its exit code."""
    with pytest.raises(SystemExit) as ended:
        run(["points", *arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished quick run."""
    out = tmp_path_factory.mktemp("run") / "out"
    assert cmd_plugin("train", *QUICK, "--out", str(out)) == 0
    return out


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def test_json_is_all_there_is_on_stdout(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = "from cmd_plugin.cli.main import run; run()"
    child = subprocess.run(
        [sys.executable, "-c", command, "points", "train", *QUICK, "--out", str(out), "--json"],
        cwd=Path(__file__).parents[2],
        env=os.environ,
        capture_output=True,
        check=False,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    assert child.stderr == ""
    summary = json.loads(child.stdout)
    assert summary == json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert 0.0 <= summary["accuracy"] <= 1.0
    assert summary["data"]["name"] == "procedural shapes"
    assert summary["data"]["held_out_clouds"] == 24
    rows = table(out / "metrics.csv")
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert float(rows[-1]["accuracy"]) == summary["accuracy"]


@pytest.mark.parametrize("extra", [[], ["--uncritical", "--fewest", "20"]])
def test_a_resumed_run_ends_with_the_same_bits(
    extra: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cmd_plugin("train", *QUICK, *extra, "--out", str(whole)) == 0
    evaluate, calls = training.evaluate, 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:  # after the second epoch's training, before anything of it is kept
            raise KeyboardInterrupt
        return evaluate(*arguments)

    monkeypatch.setattr(training, "evaluate", interrupted)
    assert cmd_plugin("train", *QUICK, *extra, "--out", str(parts)) == 130
    monkeypatch.undo()
    assert (
        cmd_plugin("train", *QUICK, *extra, "--out", str(parts)) == 2
    )  # needs a word from the user
    assert cmd_plugin("train", *QUICK, *extra, "--out", str(parts), "--resume") == 0
    expected, found = weights_of(whole), weights_of(parts)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert (whole / "metrics.csv").read_text() == (parts / "metrics.csv").read_text()


def test_subsets_change_what_is_learnt(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cmd_plugin("train", *QUICK, "--uncritical", "--fewest", "20", "--out", str(out)) == 0
    name = "feature_model.conv1.weight"
    assert not torch.equal(weights_of(trained)[name], weights_of(out)[name])


@pytest.mark.parametrize("measure", ["fbi", "critical", "critical++", "entropy"])
def test_explain_writes_a_page_a_picture_and_a_table(
    measure: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("plotly")
    cloud = np.random.default_rng(0).normal(size=(200, 3))
    np.save(tmp_path / "cloud.npy", cloud)
    out = tmp_path / "made" / "view.html"
    arguments = [str(tmp_path / "cloud.npy"), "--weights", str(trained / "model.safetensors")]
    arguments += ["--measure", measure, "--out", str(out), "--refocus", "--json"]
    assert cmd_plugin("explain", *arguments) == 0
    result = json.loads(capsys.readouterr().out)
    page = out.read_text(encoding="utf-8")
    assert "Plotly.newPlot" in page
    assert 'src="http' not in page  # self-contained
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    rows = table(out.with_suffix(".csv"))
    assert len(rows) == 48  # as many as it was trained on
    assert sum(float(row["critical++"]) for row in rows) == 256
    assert sum(float(row["critical++"]) > 0 for row in rows) == result["critical_points"]
    if measure == "entropy":
        total = sum(float(row["entropy"]) for row in rows)
        assert total == pytest.approx(result["entropy"], rel=1e-5)
    assert result["refocused"]["kept"] == 48  # fewer points than the minimum of 64
    assert 0.0 < result["probability"] <= 1.0


def test_explain_takes_weights_of_others_and_names_of_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("plotly")
    from cmd_plugin.pointcloud import build_network

    torch.save(build_network("dgcnn", 3, width=0.25).state_dict(), tmp_path / "w.pt")
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")
    np.save(tmp_path / "c.npy", np.random.default_rng(0).normal(size=(90, 3)))
    common = [str(tmp_path / "c.npy"), "--weights", str(tmp_path / "w.pt"), "--points", "60"]
    common += ["--out", str(tmp_path / "v.html"), "--width", "0.25", "--axes", "xzy", "--up", "y"]
    names = ["--classes", str(tmp_path / "names.txt")]
    assert cmd_plugin("explain", *common, "--model", "dgcnn", *names) == 0
    shown = capsys.readouterr().out
    assert any(f"answer: {name} (" in shown for name in ("ant", "bee", "cat"))
    assert "pool: amax over 60 tokens of 256 channels" in shown
    assert cmd_plugin("explain", *common) == 2
    assert "pass --model" in capsys.readouterr().err


def test_explain_says_so_if_other_axes_suit_the_network_better(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("plotly")
    from cmd_plugin.pointcloud import build_network

    network = build_network("pointnet", 2, width=0.25)
    with torch.no_grad():  # answers 0 the surer, the further the cloud reaches along its y
        for weight in network.parameters():
            weight.zero_()
        for number in range(1, 6):
            getattr(network.feature_model, f"conv{number}").weight[0, 1 if number == 1 else 0] = 1.0
            getattr(network.feature_model, f"bn{number}").weight.fill_(1.0)
        for number in (1, 2, 3):
            getattr(network, f"linear{number}").weight[0, 0] = 8.0 if number == 3 else 1.0
        network.bn1.weight.fill_(1.0)
        network.bn2.weight.fill_(1.0)
    torch.save(network.state_dict(), tmp_path / "w.pt")
    flat = np.random.default_rng(0).uniform(-1, 1, size=(90, 3)) * [0.1, 0.01, 1.0]
    np.save(tmp_path / "c.npy", flat)
    common = [str(tmp_path / "c.npy"), "--weights", str(tmp_path / "w.pt"), "--points", "60"]
    common += ["--out", str(tmp_path / "v.html"), "--width", "0.25", "--model", "pointnet"]
    assert cmd_plugin("explain", *common) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("axes: ")]
    assert len(said) == 1
    proposed = said[0].split("--axes ")[1][:3]
    assert proposed[1] == "z"
    assert "with xyz as here 5" in said[0]  # hardly surer than a coin
    assert cmd_plugin("explain", *common, "--axes", proposed) == 0
    assert "axes: " not in capsys.readouterr().out
    # Proposals are to be typed as they stand, whatever the order was.
    assert cmd_plugin("explain", *common, "--axes", "zxy", "--json") == 0
    axes = json.loads(capsys.readouterr().out)["axes"]
    assert (axes["given"], axes["better"][1]) == ("zxy", "z")
    assert axes["better_confidence"] > 0.9 > 0.7 > axes["confidence"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "shpes"], "unknown --data"),
        (["train", "--data", "hdf5"], "CMD_PLUGIN_DATA"),
        (["train", "--data", "hdf5", "--data-root", "nowhere"], "is no folder"),
        (["train", "--model", "pointnext"], "--model must be one of"),
        (["train", "--lr", "0"], "--lr must be above 0"),
        (["train", "--epochs", "0"], "--epochs must be at least 1"),
        (["train", "--batch-size", "1"], "--batch-size must be at least 2"),
        (["train", "--width", "nan"], "--width must be above 0"),
        (["train", "--resume", "--out", "nothing-here", *QUICK], "no run to resume"),
        (["explain", "a.npy", "--weights", "b.pt", "--out", "v.png"], "must end in .html"),
        (["explain", "a.npy", "--weights", "b.pt", "--axes", "xyy"], "x, y and z once"),
        (["explain", "a.npy", "--weights", "b.pt", "--up", "w"], "--up must be"),
        (["explain", "a.npy", "--weights", "b.pt"], "there is no file b.pt"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cmd_plugin(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_measure_that_does_not_exist_is_named(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("plotly")
    np.save(tmp_path / "c.npy", np.random.default_rng(0).normal(size=(90, 3)))
    weights = str(trained / "model.safetensors")
    arguments = [str(tmp_path / "c.npy"), "--weights", weights, "--measure", "lime"]
    assert cmd_plugin("explain", *arguments, "--out", str(tmp_path / "v.html")) == 2
    assert "unknown measure 'lime'" in capsys.readouterr().err


def test_a_diverged_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    wild = ["--optimizer", "sgd", "--lr", "1e30", "--schedule", "constant", "--out", out]
    assert cmd_plugin("train", *QUICK, *wild) == 2
    assert "training diverged" in capsys.readouterr().err


def test_users_own_hdf5_files_are_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(0)
    for part, count in (("train", 24), ("test", 12)):
        with h5py.File(tmp_path / f"ply_data_{part}0.h5", "w") as file:
            labels = np.arange(count) % 2
            file["data"] = rng.normal(size=(count, 64, 3)) * (1 + labels)[:, None, None]
            file["label"] = labels[:, None]
    arguments = ["--data", "hdf5", "--data-root", str(tmp_path), "--points", "48", "--json"]
    arguments += ["--epochs", "2", "--width", "0.25", "--batch-size", "8"]
    assert cmd_plugin("train", *arguments, "--out", str(tmp_path / "out")) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["data"]["classes"] == ["0", "1"]
    assert (summary["data"]["train_clouds"], summary["data"]["held_out_clouds"]) == (24, 12)


def test_voxels_of_chairs_and_monitors_are_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for kind in ("chair", "monitor"):
        with gzip.open(tmp_path / f"modelnet10_{kind}_voxels.npy.gz", "wb") as stream:
            np.save(stream, rng.random((11, 1, 6, 6, 6)) < 0.4)
    arguments = ["--data", "chairs-monitors", "--data-root", str(tmp_path), "--points", "48"]
    arguments += ["--epochs", "1", "--width", "0.25", "--batch-size", "8", "--json"]
    assert cmd_plugin("train", *arguments, "--out", str(tmp_path / "out")) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["data"]["classes"] == ["chair", "monitor"]
    assert summary["data"]["held_out_clouds"] == 4


def test_help_shows_a_runnable_example(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("train", "explain"):
        assert cmd_plugin(verb, "--help") == 0
        assert f"cmd-plugin points {verb} " in capsys.readouterr().out
