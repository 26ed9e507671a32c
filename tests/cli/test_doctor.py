"""`cmd-plugin doctor`: a table for people, JSON for programs, and an exit code for scripts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cmd_plugin.cli.main import run
from cmd_plugin.jobs import doctor
from cmd_plugin.jobs.doctor import Check

LONG = "built for " + ", ".join(f"capability {n}.0" for n in range(5, 12))
WORKING = [
    Check("pytorch-lightning", "ok", "2.6.6", required=True),
    Check("CUDA device", "ok", LONG),
    Check("extra points", "missing", "h5py (not installed)", 'pip install "cmd-plugin[points]"'),
]
BROKEN = Check("torch", "broken", "2.5.1, needs >=2.6", 'pip install "torch>=2.6"', required=True)


def cli(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        run(["doctor", *arguments])
    assert isinstance(left.value.code, int)
    return left.value.code


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Check]:
    """What the doctor finds; a test may add to it. It prints something, as libraries do."""
    checks = list(WORKING)

    def examine(_: str | None) -> list[Check]:
        sys.stdout.write("a library greets\n")
        return checks

    monkeypatch.setattr(doctor, "examine", examine)
    return checks


@pytest.mark.usefixtures("found")
def test_what_is_optional_may_be_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli() == 0
    out, err = capsys.readouterr()
    assert "All that is required works." in out
    assert '  extra points: pip install "cmd-plugin[points]"' in out.splitlines()
    assert err == "a library greets\n"


def test_what_is_required_may_not(found: list[Check], capsys: pytest.CaptureFixture[str]) -> None:
    found.append(BROKEN)
    assert cli() == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines.index("Required:") + 1 == lines.index('  torch: pip install "torch>=2.6"')
    assert "All that is required works." not in lines


def test_json_is_all_there_is_on_stdout(
    found: list[Check], capsys: pytest.CaptureFixture[str]
) -> None:
    found.append(BROKEN)
    assert cli("--json") == 2
    content = json.loads(capsys.readouterr().out)
    assert content["works"] is False
    assert [Check(**check) for check in content["checks"]] == found


@pytest.mark.usefixtures("found")
def test_the_table_is_readable_at_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli() == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    start = next(n for n, line in enumerate(lines) if line.startswith(" CUDA device"))
    column = lines[start].index("built")
    assert " ".join(line[column:].strip() for line in lines[start : start + 3]).startswith(LONG)


def test_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("--data-root", str(tmp_path / "nowhere"), "--json") == 2
    content = json.loads(capsys.readouterr().out)
    wrong = [check for check in content["checks"] if check["required"] and check["state"] != "ok"]
    assert [check["name"] for check in wrong] == ["data root"]


def test_there_is_no_option_without_a_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("--no-json") == 2
    assert "--no-json" in capsys.readouterr().err
    assert cli("--help") == 0
    shown = capsys.readouterr().out
    assert "--no-json" not in shown
    assert "cmd-plugin doctor --data-root DATA --json" in shown


@pytest.mark.parametrize(
    "arguments", [["--help"], ["decompose", "--help"], ["bench", "kernels", "--help"]]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        "from cmd_plugin.cli.main import run\n"
        f"try:\n    run({arguments!r})\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'numba', 'pytorch_lightning', 'sklearn'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
