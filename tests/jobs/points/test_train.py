"""Training of point networks: what is kept, exact resumption, users' own data."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cmd_plugin.errors import InputError
from cmd_plugin.jobs.points import train
from cmd_plugin.jobs.points.options import TrainOptions
from cmd_plugin.runs.progress import Progress
from cmd_plugin.runs.result import Result

QUICK: dict[str, Any] = {
    "points": 48,
    "train_clouds": 48,
    "test_clouds": 24,
    "width": 0.25,
    "epochs": 2,
    "batch_size": 12,
}


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def interrupt_at(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop the training at a held-out evaluation, before anything of that epoch is kept."""
    evaluate, calls = train.evaluate, 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise KeyboardInterrupt
        return evaluate(*arguments)

    monkeypatch.setattr(train, "evaluate", interrupted)


def test_the_result_is_what_the_files_say(tmp_path: Path) -> None:
    out, events = tmp_path / "out", list[Progress]()
    result = train.run(TrainOptions(**QUICK), out, progress=events.append)
    assert Result.load(out / "result.json") == result
    assert 0.0 <= result.metrics["accuracy"] <= 1.0
    assert result.data["name"] == "procedural shapes"
    assert (result.data["train_clouds"], result.data["held_out_clouds"]) == (48, 24)
    assert result.seconds["total"] > result.seconds["training"] > 0
    rows = table(out / "metrics.csv")
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert float(rows[-1]["accuracy"]) == result.metrics["accuracy"]
    assert float(rows[-1]["loss"]) == result.metrics["loss"]
    weights = weights_of(out)
    learnt = [v for k, v in weights.items() if "running" not in k and "tracked" not in k]
    assert sum(tensor.numel() for tensor in learnt) == result.metrics["parameters"]
    assert result.files == ("metrics.csv", "model.safetensors", "result.json")
    assert [event.done for event in events][-1] == events[-1].total == 2
    assert events[-1].note == f"accuracy {result.metrics['accuracy']:.3f}"


@pytest.mark.parametrize("extra", [{}, {"uncritical": True, "fewest": 20}])
def test_a_resumed_run_ends_with_the_same_bits(
    extra: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = TrainOptions(**QUICK, **extra)
    train.run(options, whole)
    with monkeypatch.context() as patch:
        interrupt_at(2, patch)
        with pytest.raises(KeyboardInterrupt):
            train.run(options, parts)
    assert [row["epoch"] for row in table(parts / "unfinished" / "metrics.csv")] == ["0"]
    with pytest.raises(InputError, match="unfinished run: add --resume"):
        train.run(options, parts)  # needs a word from the user
    train.run(options, parts, resume=True)
    expected, found = weights_of(whole), weights_of(parts)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert (whole / "metrics.csv").read_text() == (parts / "metrics.csv").read_text()
    assert not (parts / "unfinished").exists()


def test_a_run_stopped_after_its_training_only_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.run(TrainOptions(**QUICK), whole)

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_point_network", stopped)
        with pytest.raises(KeyboardInterrupt):
            train.run(TrainOptions(**QUICK), parts)
    with monkeypatch.context() as patch:
        interrupt_at(1, patch)  # nothing is evaluated any more
        result = train.run(TrainOptions(**QUICK), parts, resume=True)
    expected, found = weights_of(whole), weights_of(parts)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert len(table(parts / "metrics.csv")) == 2
    assert result.seconds["training"] > 0


def test_other_options_do_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(1, patch)
        with pytest.raises(KeyboardInterrupt):
            train.run(TrainOptions(**QUICK), tmp_path)
    with pytest.raises(InputError, match=r"started with lr=0\.002, now it is 0\.1"):
        train.run(TrainOptions(**QUICK, lr=0.1), tmp_path, resume=True)
    with pytest.raises(InputError, match="no run to resume"):
        train.run(TrainOptions(**QUICK), tmp_path / "nothing", resume=True)


def test_a_diverged_run_leaves_the_finished_one_as_it_was(tmp_path: Path) -> None:
    options = TrainOptions(**QUICK)
    train.run(options, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    wild = TrainOptions(**QUICK, optimizer="sgd", lr=1e30, schedule="constant")
    with pytest.raises(InputError, match="training diverged"):
        train.run(wild, tmp_path, overwrite=True)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert before == after


def test_damaged_state_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(2, patch)
        with pytest.raises(KeyboardInterrupt):
            train.run(TrainOptions(**QUICK), tmp_path)
    metrics = tmp_path / "unfinished" / "metrics.csv"
    kept = metrics.read_bytes()
    metrics.write_bytes(kept.replace(b"raw", b"row"))
    with pytest.raises(InputError, match=r"metrics\.csv"):
        train.run(TrainOptions(**QUICK), tmp_path, resume=True)
    metrics.write_bytes(kept)
    checkpoint = tmp_path / "unfinished" / "state" / "last.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"last\.ckpt is damaged"):
        train.run(TrainOptions(**QUICK), tmp_path, resume=True)


def test_subsets_change_what_is_learnt(tmp_path: Path) -> None:
    train.run(TrainOptions(**QUICK), tmp_path / "whole")
    train.run(TrainOptions(**QUICK, uncritical=True, fewest=20), tmp_path / "subsets")
    name = "feature_model.conv1.weight"
    whole, subsets = weights_of(tmp_path / "whole"), weights_of(tmp_path / "subsets")
    assert not torch.equal(whole[name], subsets[name])


def test_random_numbers_of_the_caller_are_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    result = train.run(TrainOptions(**{**QUICK, "epochs": 1}), None)
    assert torch.equal(before, torch.get_rng_state())
    assert result.metrics["parameters"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "hdf5"}, "CMD_PLUGIN_DATA"),
        ({"data": "hdf5", "data_root": "nowhere"}, "is no folder"),
        ({"data": "hdf5", "data_root": "."}, "no .h5 file with 'train' in its name"),
    ],
)
def test_missing_data_is_said_before_a_folder_is_made(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        train.run(TrainOptions(**changes), "out")
    assert not (tmp_path / "out").exists()


def test_users_own_hdf5_files_are_trained_on(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(0)
    for part, count in (("train", 24), ("test", 12)):
        with h5py.File(tmp_path / f"ply_data_{part}0.h5", "w") as file:
            labels = np.arange(count) % 2
            file["data"] = rng.normal(size=(count, 64, 3)) * (1 + labels)[:, None, None]
            file["label"] = labels[:, None]
    result = train.run(
        TrainOptions(
            data="hdf5", data_root=str(tmp_path), points=48, epochs=2, width=0.25, batch_size=8
        ),
        tmp_path / "out",
    )
    assert result.data["classes"] == ["0", "1"]
    assert (result.data["train_clouds"], result.data["held_out_clouds"]) == (24, 12)


def test_voxels_of_chairs_and_monitors_are_trained_on(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for kind in ("chair", "monitor"):
        with gzip.open(tmp_path / f"modelnet10_{kind}_voxels.npy.gz", "wb") as stream:
            np.save(stream, rng.random((11, 1, 6, 6, 6)) < 0.4)
    options = TrainOptions(
        data="chairs-monitors",
        data_root=str(tmp_path),
        points=48,
        epochs=1,
        width=0.25,
        batch_size=8,
    )
    result = train.run(options, tmp_path / "out")
    assert result.data["classes"] == ["chair", "monitor"]
    assert result.data["held_out_clouds"] == 4
