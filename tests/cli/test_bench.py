"""``cmd-plugin bench kernels``: a table for people, JSON for programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cmd_plugin.cli.main import run
from cmd_plugin.cli.show_bench import show
from cmd_plugin.runs.result import Result

SMALL = ["--size", "2000", "--repeats", "1", "--no-compile", "--device", "cpu"]


def cli(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        run(["bench", "kernels", *map(str, arguments)])
    return int(left.value.code or 0)


def test_json_has_one_row_a_kernel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--kernel", "swap_out", "--kernel", "update_affine"]
    assert cli(*SMALL, *chosen, "--threads", "1", "--out", tmp_path, "--json") == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    rows = result["metrics"]["kernels"]
    assert [row["kernel"] for row in rows] == ["update_affine", "swap_out"]
    assert not err
    assert {"commit", "versions", "processor"} <= result["machine"].keys()
    assert result["machine"]["threads"] == 1
    for row in rows:
        wanted = {"backend", "bytes_per_weight", "gbps", "fraction_of_copy", "speedup_vs_eager"}
        assert {*wanted, "max_error"} <= row.keys()
        assert row["size"] == 2000


def test_the_table_fits_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(*SMALL, "--kernel", "coefficient_drift", "--out", tmp_path) == 0
    out = capsys.readouterr().out
    assert "coefficient_drift" in out
    assert "2,000 weights" in out
    shown = [line for line in out.splitlines() if not line.startswith("wrote")]
    assert max(map(len, shown)) <= 80


def test_large_numbers_are_whole_at_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kernel that takes half a minute on a CPU, and the rate of one on a large GPU."""
    monkeypatch.setenv("COLUMNS", "80")
    row = {
        "kernel": "update_and_reconstruct",
        "backend": "triton",
        "device": "cuda",
        "size": 1_000_000_000,
        "bytes_per_weight": 25,
        "seconds": 34.56789,
        "gbps": 3456.7,
        "fraction_of_copy": 0.987,
        "fastest_of_copy": 0.991,
        "speedup_vs_eager": 123.4,
        "speedup_vs_compile": 99.9,
        "max_error": 1.2e-7,
    }
    machine = {"accelerator": "NVIDIA H100 80GB HBM3", "processor": "x", "threads": 16}
    parts = {"options": {}, "data": {}, "seconds": {}, "files": ()}
    metrics = {"kernels": [row, {**row, "speedup_vs_compile": None, "max_error": None}]}
    show(Result("bench kernels", metrics=metrics, machine=machine, **parts))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    first, second = (line.split() for line in lines if line.startswith(" update"))
    numbers = ["triton", "34568", "25", "3457", "99%", "123x"]
    assert first[1:] == [*numbers, "99.9x", "1e-07"]
    assert second[1:] == [*numbers, "-", "wrong"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernel", "nonsense"], "unknown kernel 'nonsense'"),
        (["--size", "3"], "size must be at least 1000"),
        (["--threads", "0"], "--threads must be at least 1"),
    ],
)
def test_wrong_input(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(*arguments, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("--help") == 0
    assert "cmd-plugin bench kernels --size 1000000" in " ".join(capsys.readouterr().out.split())
