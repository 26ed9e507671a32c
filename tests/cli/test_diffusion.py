"""`cmd-plugin diffusion`: what a user who types something wrong is told."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from cmd_plugin.cli.main import run
from tests.helpers.commands import exit_code

cmd_plugin = partial(exit_code, "diffusion")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--duplicate", "many"], "is no dose"),
        (["train", "--model", "vit"], "--model must be one of mlp, unet"),
        (["train", "--lr-end", "0"], "--lr-end must be above 0 and at most 1"),
        (["train", "--data", "mnist", "--data-root", "nowhere"], "nowhere"),
        (["train", "--resume"], "no run to resume"),
        (["memorization"], "--model is missing"),
        (["memorization", "--model", "folder"], "folder holds no model"),
        (["memorization", "--model", "folder", "--suspects", "a"], "go together"),
        (
            ["memorization", "--model", "folder", "--accelerator", "tpu"],
            "must be one of cpu",
        ),
        (["memorization", "--model", "folder", "--samples", "-1"], "--samples must be at least 0"),
        (["calibrate"], "requires an argument"),
        (["calibrate", "rows.npy"], "--model is missing"),
        (["detect", "rows.npy", "--model", "folder"], "--reference is missing"),
        (["detect", "rows.npy", "--model", "folder", "--directions", "3"], "3 is odd"),
        (["detect", "a", "b", "--model", "folder", "--reference", "c"], "put them together"),
        (["fewshot", "rows.npy", "--model", "folder", "--per-class", "4"], "--per-class must be"),
        (["fewshot", "rows.npy", "--model", "folder", "--gate", "tree"], "--gate must be one of"),
    ],
)
def test_an_error_is_one_sentence(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("rows.npy", np.zeros((3, 8, 8), dtype=np.uint8))
    Path("folder").mkdir()
    assert cmd_plugin(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not list(Path().rglob("*.json"))


def test_each_command_has_a_runnable_example(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("train", "memorization", "calibrate", "detect", "fewshot"):
        with pytest.raises(SystemExit) as ended:
            run(["diffusion", verb, "--help"])
        assert ended.value.code == 0
        assert f"cmd-plugin diffusion {verb} " in capsys.readouterr().out
