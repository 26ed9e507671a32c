"""``cmd-plugin bench kernels``: a table for people, JSON lines for programs."""

from __future__ import annotations

import json

import pytest

from cmd_plugin.cli.main import run

SMALL = ["--size", "2000", "--repeats", "1", "--no-compile", "--device", "cpu"]


def cli(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        run(["bench", "kernels", *arguments])
    return int(left.value.code or 0)


def test_json_is_one_line_a_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--kernel", "swap_out", "--kernel", "update_affine"]
    assert cli(*SMALL, *chosen, "--threads", "1", "--json") == 0
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["kernel"] for row in rows] == ["update_affine", "swap_out"]
    assert not err
    for row in rows:
        wanted = ("backend", "bytes_per_weight", "gbps", "fraction_of_copy", "speedup_vs_eager")
        assert {*wanted, "max_error", "commit", "versions", "processor"} <= row.keys()
        assert row["size"] == 2000
        assert row["threads"] == 1


def test_the_table_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(*SMALL, "--kernel", "coefficient_drift") == 0
    out = capsys.readouterr().out
    assert "coefficient_drift" in out
    assert "2,000 weights" in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernel", "nonsense"], "unknown kernel 'nonsense'"),
        (["--size", "3"], "size must be at least 1000"),
        (["--threads", "0"], "--threads must be at least 1"),
    ],
)
def test_wrong_input(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(*arguments) == 2
    assert message in capsys.readouterr().err


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("--help") == 0
    assert "cmd-plugin bench kernels --size 1000000" in " ".join(capsys.readouterr().out.split())
