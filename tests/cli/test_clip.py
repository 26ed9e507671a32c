"""`cmd-plugin clip`: what a user who types something wrong is told."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from cmd_plugin.cli.main import run
from cmd_plugin.jobs.clip import report
from tests.helpers.commands import exit_code

cmd_plugin = partial(exit_code, "clip")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit"], "requires an argument"),
        (["fit", "nowhere.npy"], "nowhere.npy does not exist"),
        (["fit", "{rows}", "--basis", "ica"], "--basis must be one of pca, zca, cholesky"),
        (["fit", "{rows}", "--floor", "1"], "--floor must be at least 0 and below 1"),
        (["fit", "{rows}", "--shrinkage", "lw"], "--shrinkage must be auto, none, oas"),
        (["fit", "{rows}", "--shard", "3"], "--shard is written NUMBER/COUNT"),
        (["fit", "{rows}", "--modality", "sound"], "--modality must be one of image, text"),
        (["fit", "{rows}", "--weights", "w.pt"], "--weights has an effect only with --model"),
        (["fit", "{rows}", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["fit", "{folder}"], "give --model, or embeddings"),
        (["score", "{rows}"], "--whitening"),
        (["score", "{rows}", "--whitening", "{folder}"], "there is no whitening"),
        (["score", "{rows}", "--whitening", "x", "--format", "xml"], "--format must be one of"),
        (["merge", "{folder}"], "there are no statistics"),
        (["compare", "{rows}", "{rows}", "--permutations", "5"], "--permutations must be at least"),
        (["compare", "{rows}", "{rows}", "--level", "2"], "--level must be above 0 and below 1"),
        (["align", "{rows}"], "holds one set of embeddings: give pairs"),
        (["report", "{rows}", "--temperature", "0"], "--temperature must be above 0"),
        (["report", "{rows}", "--shift", "none"], "--shift must be one of both, image, text"),
        (["fit", "{rows}", "--resume"], "no run to resume"),
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
    np.save("rows.npy", np.random.default_rng(0).normal(size=(100, 4)))
    Path("folder").mkdir()
    words = [word.format(rows="rows.npy", folder="folder") for word in arguments]
    assert cmd_plugin(*words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not list(Path().rglob("*.json"))


def test_each_command_has_a_runnable_example(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("fit", "score", "report", "merge", "compare", "align"):
        with pytest.raises(SystemExit) as ended:
            run(["clip", verb, "--help"])
        assert ended.value.code == 0
        assert f"cmd-plugin clip {verb} " in capsys.readouterr().out


def test_a_warning_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "_write", lambda *_: None)  # pictures take time
    np.save("pairs.npy", np.random.default_rng(0).normal(size=(2, 50, 8)))
    assert cmd_plugin("report", "pairs.npy", "--group-size", "25", "--shown", "0") == 0
    assert capsys.readouterr().err.count("50 rows are less than 10 for each of 8 features") == 1
