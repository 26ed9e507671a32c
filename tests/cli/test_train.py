"""`cmd-plugin train`: what it prints where, and how it ends."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cmd_plugin import __version__
from cmd_plugin.cli.main import run
from cmd_plugin.jobs.classifier import Classifier
from cmd_plugin.jobs.compare import train
from tests.helpers.commands import exit_code as cmd_plugin

QUICK = ["--train-limit", "120", "--batch-size", "40", "--epochs", "4", "--warmup", "2"]
QUICK += ["--modes", "3", "--samples", "100", "--seeds", "1"]


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that look at words need no picture."""
    monkeypatch.setattr(train, "draw_report", lambda *_: None)
    monkeypatch.setattr(train, "save_figure", lambda *_: None)


def test_json_is_all_there_is_on_stdout(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = "from cmd_plugin.cli.main import run; run()"
    child = subprocess.run(
        [sys.executable, "-c", command, "train", *QUICK, "--out", str(out), "--json"],
        cwd=Path(__file__).parents[2],
        env=os.environ,
        capture_output=True,
        check=False,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    assert child.stderr == ""
    result = json.loads(child.stdout)
    assert result == json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert list(result) == ["job", "options", "data", "metrics", "machine", "seconds", "files"]
    summary = result["metrics"]
    assert set(summary["accuracy"]) == {"as trained", "raw", "ema", "swa", "cmd"}
    for name in ("overhead_percent", "state_bytes_per_parameter", "explained_variance"):
        assert isinstance(summary[name], float), name
    for name in ("parameters", "modes"):
        assert isinstance(summary[name], int), name
    assert (out / "report.png").exists()


@pytest.mark.usefixtures("no_picture")
def test_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cmd_plugin("train", *QUICK, "--out", str(out)) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    for word in ("raw", "EMA (0.99 a step)", "SWA (last quarter)", "CMD (3 modes)"):
        assert word in printed.out
    assert "% of the training time" in printed.out
    assert "9.0 bytes per parameter" in printed.out
    assert "±" not in printed.out.splitlines()[4]  # one seed has no spread


@pytest.mark.usefixtures("no_picture")
def test_embedded_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--mode", "embedded", "--embed-every", "1", "--embed-project", "tie"]
    out = str(tmp_path / "out")
    assert cmd_plugin("train", *QUICK, *options, "--out", out) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    # One event of 10 %, after the last of four epochs: nobody has been written yet.
    assert "embedded (tie), own training" in printed.out
    assert "embedded: 10.0% of the weights at the end, 2.5 % on average over the run" in printed.out
    assert "instead of 0.9 MB" in printed.out
    assert cmd_plugin("train", *QUICK, *options, "--out", out, "--json", "--overwrite") == 0
    summary = json.loads(capsys.readouterr().out)["metrics"]
    assert summary["accuracy"]["embedded"] == summary["accuracy"]["raw"]
    assert 0.099 < summary["embedded"]["embedded_fraction"] < 0.1001


@pytest.mark.usefixtures("no_picture")
def test_spread_over_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cmd_plugin("train", *QUICK, "--seeds", "2", "--out", str(tmp_path / "out")) == 0
    assert "mean ± std over 2 seeds" in capsys.readouterr().out


def test_the_checkpoints_are_one_run_for_decompose(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, modes = tmp_path / "out", tmp_path / "modes"
    assert cmd_plugin("train", *QUICK, "--seeds", "2", "--out", str(out), "--json") == 0
    trained = json.loads(capsys.readouterr().out)["metrics"]
    options = ("--modes", "3", "--samples", "100", "--out", str(modes), "--json")
    assert cmd_plugin("decompose", str(out / "checkpoints"), *options) == 0
    found = json.loads(capsys.readouterr().out)["metrics"]
    assert found["snapshots"] == 4
    # While training BatchNorm's statistics are recalibrated; of checkpoints they are modelled.
    network = load_file(out / "model_cmd.safetensors")
    statistics = sum(t.numel() for name, t in network.items() if "running_" in name)
    assert statistics > 0
    assert found["parameters"] == trained["parameters"] + statistics
    assert found["compression_ratio"] > 1.0


@pytest.mark.usefixtures("no_picture")
def test_interrupt_and_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, left = Classifier.training_step, 7

    def training_step(module: Classifier, *args: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return original(module, *args)

    out = str(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", training_step)
        assert cmd_plugin("train", *QUICK, "--out", out) == 130
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "add --resume" in printed.err
    assert str(tmp_path / "out/unfinished") in printed.err
    with (tmp_path / "out/unfinished/metrics.csv").open(newline="", encoding="utf-8") as stream:
        assert {row["epoch"] for row in csv.DictReader(stream)} == {"0", "1"}
    assert cmd_plugin("train", *QUICK, "--out", out) == 2
    assert "unfinished run: add --resume" in capsys.readouterr().err
    assert cmd_plugin("train", *QUICK, "--out", out, "--resume") == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--modes", "0"], "--modes must be from 1 to 256, got 0"),
        (["--modes", "300"], "--modes must be from 1 to 256, got 300"),
        (["--modes", "many"], "--modes"),
        (["--bogus"], "--bogus"),
        (["--data", "mist"], "unknown data set 'mist': did you mean 'mnist'?"),
        (["--data", "mnist"], "--data-root or CMD_PLUGIN_DATA"),
        (["--model", "resnet19"], "unknown model 'resnet19': did you mean resnet18"),
        (["--model", "vgg11"], "does not take 8x8 images"),
        (["--label-noise", "1"], "--label-noise must be at least 0 and below 1"),
        (["--warmup", "4"], "--epochs must be above --warmup"),
        (["--mode", "embeded"], "--mode must be one of online, embedded, got embeded"),
        (["--embed-percent", "0"], "--embed-percent must be above 0 and at most 100"),
        (["--train-limit", "5"], "cannot choose 5 of 1438 images"),
        (["--resume"], "holds no run to resume"),
    ],
)
def test_bad_input_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert cmd_plugin("train", *QUICK, "--out", str(tmp_path / "out"), *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert sentence in printed.err
    assert not (tmp_path / "out" / "metrics.csv").exists()


@pytest.mark.parametrize("kind", ["file", "below a file", "no permission"])
def test_out_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    out = tmp_path / "out"
    if kind == "no permission":
        out.mkdir(mode=0o500)
        if os.access(out, os.W_OK):
            pytest.skip("this user may write anywhere")
    else:
        out.write_text("", encoding="utf-8")
    target = out / "deep" if kind == "below a file" else out
    assert cmd_plugin("train", *QUICK, "--out", str(target)) == 2
    assert "cannot be written to" in capsys.readouterr().err


def test_diverged_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cmd_plugin("train", *QUICK, "--out", str(tmp_path / "out"), "--lr", "1e30") == 2
    assert "training diverged" in capsys.readouterr().err


def test_a_fault_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr(train, "load_dataset", broken)
    monkeypatch.delenv("CMD_PLUGIN_DEBUG", raising=False)
    assert cmd_plugin("train", "--out", str(tmp_path)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ZeroDivisionError: two lines")
    assert "CMD_PLUGIN_DEBUG=1" in error
    assert error.count("\n") == 1
    monkeypatch.setenv("CMD_PLUGIN_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run(["train", "--out", str(tmp_path)])


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cmd_plugin("--version") == 0
    assert capsys.readouterr().out == f"cmd-plugin {__version__}\n"
    assert cmd_plugin("--help") == 0
    assert "cmd-plugin train" in capsys.readouterr().out
    assert cmd_plugin("train", "--help") == 0
    assert "cmd-plugin train --label-noise 0.2" in capsys.readouterr().out
    assert cmd_plugin() == 2
    assert "Usage" in capsys.readouterr().out
    assert cmd_plugin("trian") == 2
    assert 'error: Unknown command "trian". Did you mean "train"?' in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        "--help",
        "--version",
        "train --help",
        "trian",
        "train --bogus",
        "train --epochs many",
        "train --mode embeded",
        "train --embed-every 2",
    ],
)
def test_help_and_typing_errors_import_nothing_heavy(arguments: str) -> None:
    code = (
        "import sys\n"
        "from cmd_plugin.cli.main import run\n"
        f"try:\n    run({arguments.split()})\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'pytorch_lightning', 'timm', 'sklearn', 'matplotlib', 'numpy', 'flwr'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    root = Path(__file__).parents[2]
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, check=False, text=True
    )
    assert child.returncode == 0, child.stderr


@pytest.mark.usefixtures("no_picture")
def test_a_warning_of_ours_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    options = ["--modes", "200", "--samples", "60"]  # fewer samples than modes
    assert cmd_plugin("train", *QUICK, *options, "--out", str(tmp_path / "out"), "--json") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["metrics"]["modes"] < 200
    assert printed.err.startswith("warning: only ")
    assert printed.err.count("\n") == 1


def test_a_finished_run_is_not_replaced_by_accident(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cmd_plugin("train", *QUICK, "--out", str(out), "--quiet") == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for arguments in ([], ["--overwrite", "--lr", "1e30"], ["--resume", "--lr", "0.01"]):
        assert cmd_plugin("train", *QUICK, "--out", str(out), *arguments) == 2
        assert all(path.read_bytes() == content for path, content in before.items()), arguments
    capsys.readouterr()
    assert cmd_plugin("train", *QUICK, "--out", str(out), "--overwrite", "--quiet") == 0
    assert not (out / "unfinished").exists()
    assert not list(out.rglob("*.tmp"))


def test_python_m_cmd_plugin_is_the_command() -> None:
    command = [sys.executable, "-m", "cmd_plugin", "--version"]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    assert child.stdout == f"cmd-plugin {__version__}\n"
