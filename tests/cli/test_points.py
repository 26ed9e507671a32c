"""`cmd-plugin points`: what a user who types something wrong is told."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.commands import exit_code

QUICK = ["--points", "48", "--train-clouds", "48", "--test-clouds", "24", "--width", "0.25"]
QUICK += ["--epochs", "2", "--batch-size", "12"]


cmd_plugin = partial(exit_code, "points")


@pytest.fixture
def _pydantic() -> None:
    """Where it is loaded, cyclopts checks values and defaults once more."""
    pytest.importorskip("pydantic")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "shpes"], "--data must be one of"),
        (["train", "--data", "hdf5"], "CMD_PLUGIN_DATA"),
        (["train", "--data", "hdf5", "--data-root", "nowhere"], "is no folder"),
        (["train", "--model", "pointnext"], "--model must be one of"),
        (["train", "--lr", "0"], "--lr must be above 0"),
        (["train", "--epochs", "0"], "--epochs must be at least 1"),
        (["train", "--batch-size", "1"], "--batch-size must be at least 2"),
        (["train", "--width", "nan"], "--width must be above 0"),
        (["train", "--fewest", "20"], "--fewest has an effect only with --uncritical"),
        (["train", "--resume", "--out", "nothing-here", *QUICK], "no run to resume"),
        (["explain", "a.npy", "--weights", "b.pt", "--axes", "xyy"], "--axes must be one of"),
        (["explain", "a.npy", "--weights", "b.pt", "--up", "w"], "--up must be"),
        (["explain", "a.npy", "--weights", "b.pt", "--measure", "lime"], "--measure must be one"),
        (["explain", "a.npy", "--weights", "b.pt"], "there is no file"),
        (["explain", "a.npy"], "--weights"),
        (["robustness", "--rounding", "up"], "--rounding must be one of"),
        (["robustness", "--released", "nowhere", *QUICK, "--epochs", "1"], "nowhere"),
    ],
)
@pytest.mark.usefixtures("_pydantic")
def test_bad_input_is_one_sentence(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", np.random.default_rng(0).normal(size=(90, 3)))
    assert cmd_plugin(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_help_shows_a_runnable_example(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("train", "explain", "robustness"):
        assert cmd_plugin(verb, "--help") == 0
        assert f"cmd-plugin points {verb}" in capsys.readouterr().out
