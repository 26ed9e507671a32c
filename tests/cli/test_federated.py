"""`cmd-plugin federated simulate`: what it prints where, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import exit_code as cmd_plugin

SMALL = ["federated", "simulate", "--clients", "3", "--rounds", "5"]
SMALL += ["--train-limit", "90", "--test-limit", "60"]
QUICK = [*SMALL, "--warmup", "2", "--samples", "100", "--modes", "3"]


def test_json_is_all_there_is_on_stdout(tmp_path: Path) -> None:
    pytest.importorskip("flwr")
    out = tmp_path / "out"
    command = "from cmd_plugin.cli.main import run; run()"
    child = subprocess.run(
        [sys.executable, "-c", command, *QUICK, "--out", str(out), "--json"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        check=False,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    assert child.stderr == ""
    result = json.loads(child.stdout)
    assert result == json.loads((out / "result.json").read_text(encoding="utf-8"))
    summary = result["metrics"]
    for name in ("accuracy", "embedded_fraction"):
        assert isinstance(summary[name], float), name
    for name in ("bytes_up", "bytes_down", "fedavg_bytes"):
        assert isinstance(summary[name], int), name
    assert len(summary["rounds"]) == 6


def test_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("flwr")
    arguments = (*SMALL, "--method", "topk", "--out", str(tmp_path))
    assert cmd_plugin(*arguments) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "topk with 3 clients on digits, iid" in printed.out
    assert "% of FedAvg's" in printed.out
    for name in ("result.json", "metrics.csv", "model.safetensors", "report.png"):
        assert f"wrote {tmp_path / name}" in printed.out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--method", "sgd"], "--method must be one of fedavg, cmd"),
        (["--partition", "dirichlet"], "--partition must be iid or dirichlet:ALPHA"),
        (["--rounds", "2"], "--rounds must be above --warmup (2), got 2"),
        (["--fraction", "1.5"], "--fraction must be above 0 and at most 1, got 1.5"),
        (["--bits", "16"], "--bits must be 1, 2, 4 or 8, got 16"),
        (["--data", "mist"], "unknown data set 'mist': did you mean 'mnist'?"),
        (["--bogus"], "--bogus"),
        (["--topk", "0.2"], "--topk has an effect only with --method topk, and it is cmd"),
        (["--method", "fedavg"], "--warmup has an effect only with --method cmd, and it is fedavg"),
    ],
)
def test_bad_input_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    pytest.importorskip("flwr")
    assert cmd_plugin(*QUICK, "--out", str(tmp_path / "out"), *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert sentence in printed.err
    assert not (tmp_path / "out").exists()


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cmd_plugin("federated", "simulate", "--help") == 0
    assert "cmd-plugin federated simulate" in capsys.readouterr().out
    assert cmd_plugin("federated") == 2
    printed = capsys.readouterr()
    assert "simulate" in printed.out
    assert printed.err == ""


def test_a_missing_flower_names_the_extra() -> None:
    code = (
        "import sys\n"
        "sys.modules['flwr'] = None\n"
        "from cmd_plugin.cli.main import run\n"
        "run(['federated', 'simulate', '--out', 'never-made'])\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        check=False,
        text=True,
    )
    assert child.returncode == 2
    assert 'pip install "cmd-plugin[federated]"' in child.stderr
    assert child.stderr.count("\n") == 1
