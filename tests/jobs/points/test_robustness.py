"""The robustness job: its table, exact resumption, trained networks evaluated again, bad input."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cmd_plugin.errors import InputError, StateMismatch
from cmd_plugin.jobs.points import robustness
from cmd_plugin.jobs.points.options import RobustnessOptions
from cmd_plugin.pointcloud import CORRUPTIONS, corrupt, defences, mean_corruption_error
from cmd_plugin.pointcloud import shape_clouds as clouds
from cmd_plugin.runs.figures import new_figure
from cmd_plugin.runs.progress import Progress
from cmd_plugin.runs.result import Result

SMALL = RobustnessOptions(
    points=32, train_clouds=24, test_clouds=12, epochs=1, rounds=1, width=0.06, threads=1
)
ROWS = ["plain", "refocused", "refocused, trained", "SOR", "EPiC", "EPiC + refocused"]


EVENTS: list[Progress] = []


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished small run, whose progress is in EVENTS."""
    out = tmp_path_factory.mktemp("run") / "out"
    robustness.run(SMALL, out, progress=EVENTS.append)
    return out


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The finished run has the picture; drawing it again and again would be half of the time."""
    monkeypatch.setattr(robustness, "draw_report", lambda *_: new_figure(1, 1))


def never_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        pytest.fail("networks are trained again")

    monkeypatch.setattr(robustness, "train_defences", fail)


def test_the_result_holds_the_7_by_5_table_of_every_row(finished: Path) -> None:
    result = Result.load(finished / "result.json")
    metrics = result.metrics
    assert list(metrics["methods"]) == ROWS
    for row in metrics["methods"].values():
        levels = {name: row["levels"][name] for name in CORRUPTIONS}
        assert [len(values) for values in levels.values()] == [5] * 7
        again = mean_corruption_error(levels, row["levels"]["clean"][0])
        assert (row["mce"], row["rmce"], row["moa"]) == (again.mce, again.rmce, again.moa)
    assert metrics["clouds"] == 12
    assert set(metrics["diversity"]) == {"EPiC", "EPiC + refocused"}
    assert result.data["corruptions"] == "ModelNet-C-style, this seed"
    assert result.files == ("networks.safetensors", "robustness.png", "result.json")
    assert (finished / "robustness.png").stat().st_size > 10_000
    assert set(result.seconds) == {"total", "training", "evaluation"}


@pytest.mark.usefixtures("finished")
def test_progress_counts_epochs_of_all_networks_and_sets() -> None:
    assert [event.done for event in EVENTS] == list(range(1, 5 + 36 + 1))
    assert {event.total for event in EVENTS} == {41}
    assert [event.stage for event in EVENTS] == ["training"] * 5 + ["evaluating"] * 36


def test_a_finished_run_is_not_repeated(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="finished run: add --overwrite"):
        robustness.run(SMALL, finished)
    never_trained(monkeypatch)
    again = robustness.run(SMALL, finished, resume=True)
    assert again.metrics == Result.load(finished / "result.json").metrics


@pytest.mark.parametrize("stage", defences.STAGES)
def test_an_interrupted_run_goes_on_and_ends_as_if_it_was_not(
    stage: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train: Callable[..., Any] = robustness.train_defences
    trained: list[str] = []

    def stopped(*args: Any, **kwargs: Any) -> Any:
        keep = kwargs["after_stage"]

        def after_stage(name: str, networks: Any) -> None:
            if name == stage:
                raise KeyboardInterrupt  # after all the work of the stage, before it is kept
            keep(name, networks)

        return train(*args, **{**kwargs, "after_stage": after_stage})

    def watched(*args: Any, **kwargs: Any) -> Any:
        keep = kwargs["after_stage"]

        def after_stage(name: str, networks: Any) -> None:
            trained.append(name)
            keep(name, networks)

        return train(*args, **{**kwargs, "after_stage": after_stage})

    with monkeypatch.context() as patch:
        patch.setattr(robustness, "train_defences", stopped)
        with pytest.raises(KeyboardInterrupt):
            robustness.run(SMALL, tmp_path)
    with pytest.raises(InputError, match="unfinished run: add --resume"):
        robustness.run(SMALL, tmp_path)
    monkeypatch.setattr(robustness, "train_defences", watched)
    rest = robustness.run(SMALL, tmp_path, resume=True)
    stages = list(defences.STAGES)
    assert trained == stages[stages.index(stage) :]
    assert rest.metrics == Result.load(finished / "result.json").metrics
    whole = load_file(finished / "networks.safetensors")
    parts = load_file(tmp_path / "networks.safetensors")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_trained_networks_are_evaluated_on_other_clouds_without_training(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    never_trained(monkeypatch)
    first = Result.load(finished / "result.json")
    file = finished / "networks.safetensors"
    options = dataclasses.replace(SMALL, networks=file, test_clouds=20, rounding="exact")
    other = robustness.run(options, tmp_path / "other")
    assert other.metrics["clouds"] == 20
    assert other.options["networks"] == str(file)
    # What it kept can be taken in its turn.
    again = dataclasses.replace(SMALL, networks=tmp_path / "other")
    assert robustness.run(again, None).metrics == first.metrics


def test_networks_of_other_options_are_not_taken(finished: Path, tmp_path: Path) -> None:
    wrong = dataclasses.replace(SMALL, networks=finished, lr=0.1)
    with pytest.raises(StateMismatch, match=r"was trained under lr=0\.003, asked for is 0\.1"):
        robustness.run(wrong, tmp_path / "out")
    damaged = tmp_path / "networks.safetensors"
    damaged.write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"networks\.safetensors is damaged"):
        robustness.run(dataclasses.replace(SMALL, networks=damaged), tmp_path / "out")
    with pytest.raises(InputError, match="there is no file"):
        robustness.run(dataclasses.replace(SMALL, networks=tmp_path / "no"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_networks_of_a_run_that_was_stopped_are_not_taken(finished: Path, tmp_path: Path) -> None:
    made = defences.initial_defences(
        lambda: robustness.build_network("pointnet", 12, 0.06), 32, seed=0
    )
    made.load(finished / "networks.safetensors", SMALL.settings)
    path = tmp_path / "networks.safetensors"
    made.save(path, SMALL.settings, finished=("plain", "ensemble"))
    with pytest.raises(InputError, match="not trained yet: finish that run first"):
        robustness.run(dataclasses.replace(SMALL, networks=path), None)


def test_released_files_are_evaluated_as_they_are(finished: Path, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="the extra 'points' is not installed")
    data = clouds(12, 32, seed=0, split="test")

    def write(name: str, points: torch.Tensor) -> None:
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["data"], file["label"] = points.numpy(), data.labels.numpy()[:, None]

    write("clean", data.points)
    for corruption in CORRUPTIONS:
        for level in range(5):
            name = corruption.replace("drop_", "dropout_")
            write(f"{name}_{level}", corrupt(data.points, corruption, level, seed=0))
    options = dataclasses.replace(SMALL, networks=finished, released=tmp_path)
    result = robustness.run(options, tmp_path / "r")
    assert result.data["corruptions"] == "released ModelNet-C"
    # The files hold what is made here from the same clouds and seed.
    first = Result.load(finished / "result.json").metrics
    assert result.metrics["methods"] == first["methods"]
    (tmp_path / "dropout_local_3.h5").unlink()
    with pytest.raises(InputError, match=r"dropout_local_3\.h5"):
        robustness.run(options, tmp_path / "other")
    assert not (tmp_path / "other").exists()  # said before anything is trained
