"""The points robustness command: what it prints and writes, reuse of networks, bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cmd_plugin.cli.main import run
from cmd_plugin.pointcloud import CORRUPTIONS, corrupt, mean_corruption_error, shape_clouds

Run = Callable[..., tuple[int, str, str]]
SMALL = ("--points", 32, "--train-clouds", 24, "--test-clouds", 12, "--epochs", 1, "--rounds", 1)
SMALL = (*SMALL, "--width", 0.06, "--threads", 1)
ROWS = ["plain", "refocused", "refocused, trained", "SOR", "EPiC", "EPiC + refocused"]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            run(["points", "robustness", *map(str, arguments)])
        shown = capsys.readouterr()
        return int(end.value.code or 0), shown.out, shown.err

    return call


def test_json_holds_the_7_by_5_table_of_every_row(command: Run, tmp_path: Path) -> None:
    out = tmp_path / "r"
    code, printed, errors = command(*SMALL, "--out", out, "--json")
    assert (code, errors) == (0, "")
    result = json.loads(printed)
    assert result == json.loads((out / "result.json").read_text())
    assert list(result["methods"]) == ROWS
    for row in result["methods"].values():
        levels = {name: row["levels"][name] for name in CORRUPTIONS}
        assert [len(values) for values in levels.values()] == [5] * 7
        again = mean_corruption_error(levels, row["levels"]["clean"][0])
        assert (row["mce"], row["rmce"], row["moa"]) == (again.mce, again.rmce, again.moa)
    assert result["clouds"] == 12
    assert set(result["diversity"]) == {"EPiC", "EPiC + refocused"}
    assert result["networks_reused"] == []
    assert (out / "robustness.png").stat().st_size > 10_000
    # The same command again: trained networks are there, the answer is the same.
    code, printed, _ = command(*SMALL, "--out", out, "--json")
    again = json.loads(printed)
    assert again["networks_reused"] == ["plain", "ensemble", "subset"]
    assert again["methods"] == result["methods"]


def test_an_interrupted_run_goes_on_and_ends_as_if_it_was_not(
    command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cmd_plugin.pointcloud import defences

    whole = json.loads(command(*SMALL, "--out", tmp_path / "whole", "--json")[1])
    with monkeypatch.context() as patch:

        class Interrupted(defences.EPiCTraining):
            def run(self, *_: object, **__: object) -> list[float]:
                raise KeyboardInterrupt

        patch.setattr(defences, "EPiCTraining", Interrupted)
        code, printed, errors = command(*SMALL, "--out", tmp_path / "cut", "--json")
    assert (code, printed) == (130, "")
    assert "the same command goes on" in errors
    rest = json.loads(command(*SMALL, "--out", tmp_path / "cut", "--json")[1])
    assert rest["networks_reused"] == ["plain"]
    assert rest["methods"] == whole["methods"]


def test_tables_for_people(command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    code, printed, _ = command(*SMALL, "--out", tmp_path / "r", "--rounding", "exact")
    assert code == 0
    for name in (*ROWS, *CORRUPTIONS, "mCE", "RmCE", "vote"):
        assert name in printed
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert f"{result['methods']['EPiC']['mce']:.3f}" in printed
    assert str(tmp_path / "r" / "robustness.png") in printed.replace("\n", "")


def test_released_files_are_evaluated_as_they_are(command: Run, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="the extra 'points' is not installed")
    data = shape_clouds(12, 40, seed=0, split="test")

    def write(name: str, points: torch.Tensor) -> None:
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["data"], file["label"] = points.numpy(), data.labels.numpy()[:, None]

    write("clean", data.points)
    for corruption in CORRUPTIONS:
        for level in range(5):
            name = corruption.replace("drop_", "dropout_")
            write(f"{name}_{level}", corrupt(data.points, corruption, level, seed=9))
    code, printed, _ = command(
        *SMALL, "--out", tmp_path / "r", "--released", tmp_path, "--json", "--seed", 1
    )
    assert code == 0
    assert json.loads(printed)["corruptions"] == "released ModelNet-C"
    (tmp_path / "dropout_local_3.h5").unlink()
    code, _, errors = command(
        *SMALL, "--out", tmp_path / "r", "--released", tmp_path, "--json", "--seed", 1
    )
    assert code == 2
    assert "dropout_local_3.h5" in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "alexnet"), "--model must be one of pointnet"),
        (("--rounding", "floor"), "--rounding must be one of official, exact"),
        (("--epochs", 0), "--epochs must be at least 1"),
        (("--width", 0), "--width must be above 0"),
        (("--batch-size", 1), "--batch-size must be at least 2"),
        (("--seed", -1), "--seed must be at least 0"),
        (("--data", "cubes"), "unknown --data 'cubes'"),
        (("--data", "chairs-monitors"), "--data-root"),
    ],
)
def test_bad_options_end_in_one_sentence(
    command: Run, tmp_path: Path, arguments: tuple[object, ...], message: str
) -> None:
    code, printed, errors = command(*SMALL, "--out", tmp_path / "r", *arguments)
    assert (code, printed) == (2, "")
    assert message in errors
    assert errors.count("\n") == 1


def test_networks_of_other_options_are_not_taken(command: Run, tmp_path: Path) -> None:
    out = tmp_path / "r"
    assert command(*SMALL, "--out", out, "--json")[0] == 0
    code, _, errors = command(*SMALL, "--out", out, "--json", "--lr", 0.1)
    assert code == 2
    assert "was trained under" in errors
    (out / "networks.safetensors").write_bytes(b"damaged")
    code, _, errors = command(*SMALL, "--out", out, "--json")
    assert code == 2
    assert "networks.safetensors cannot be read" in errors
