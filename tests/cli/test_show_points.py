"""What the points commands print, from the result alone, in a terminal of 80 columns."""

from __future__ import annotations

import dataclasses

import pytest

from cmd_plugin.cli.show_points import show_explain, show_robustness, show_train
from cmd_plugin.jobs.points import robustness
from cmd_plugin.jobs.points.options import RobustnessOptions
from cmd_plugin.pointcloud import CORRUPTIONS
from cmd_plugin.runs.figures import new_figure
from cmd_plugin.runs.result import Result

ROWS = ["plain", "refocused", "refocused, trained", "SOR", "EPiC", "EPiC + refocused"]
AXES = {"given": "xyz", "confidence": 0.52, "better": None, "better_confidence": None}
FOUND = {
    "answer": "mug",
    "probability": 0.1313,
    "pool": "amax over 48 tokens of 256 channels",
    "entropy": 0.602,
    "critical_points": 33,
    "axes": AXES,
    "left_out": {},
}


def result(job: str, **content: object) -> Result:
    parts: dict[str, object] = {"options": {}, "data": {}, "metrics": {}, "machine": {}}
    return Result(job=job, seconds={"training": 12.3}, files=(), **{**parts, **content})  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def test_a_training_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    show_train(
        result(
            "points train",
            options={"model": "pointnet"},
            data={"name": "procedural shapes", "held_out_clouds": 24},
            metrics={"accuracy": 0.9583, "loss": 0.1234, "parameters": 52588},
        )
    )
    assert capsys.readouterr().out.splitlines() == [
        "pointnet on procedural shapes: 95.83 % of 24 held-out clouds right, loss 0.1234,",
        "52,588 weights, 12 s of training",
    ]


def test_an_answer_its_focus_and_doubts_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    show_explain(result("points explain", data={"points": 48}, metrics=FOUND))
    assert capsys.readouterr().out.splitlines() == [
        "answer: mug (13.1 %), pool: amax over 48 tokens of 256 channels",
        "focus: H = 0.602, 33 critical points of 48",
    ]
    metrics = {
        **FOUND,
        "refocused": {
            "answer": "box [1]",
            "probability": 0.5,
            "kept": 30,
            "outlier_auroc": 0.4,
            "counts_tell_outliers": False,
        },
        "axes": {**AXES, "better": "xzy", "better_confidence": 0.981},
        "left_out": {"view.html": "plotly is needed here."},
    }
    show_explain(result("points explain", data={"points": 48}, metrics=metrics))
    assert capsys.readouterr().out.splitlines()[2:] == [
        "refocused on 30 points: box [1] (50.0 %)",
        "on this network counts rank planted outliers with AUROC 0.40, too badly to ",
        "refocus by them",
        "axes: with --axes xzy the network is 98.1 % sure of its answer, with xyz as here",
        "52.0 %: was it trained with another axis up?",
        "left out view.html: plotly is needed here.",
    ]


def test_several_clouds_are_shown_one_after_another(capsys: pytest.CaptureFixture[str]) -> None:
    without = {**FOUND, "entropy": None, "critical_points": None, "left_out": {"critical++": "no."}}
    data = {"points": {"a": 48, "b": 30}, "trained_on": 48}
    metrics = {"clouds": {"a": FOUND, "b": without}}
    show_explain(result("points explain", data=data, metrics=metrics))
    assert capsys.readouterr().out.splitlines() == [
        "a:",
        "answer: mug (13.1 %), pool: amax over 48 tokens of 256 channels",
        "focus: H = 0.602, 33 critical points of 48",
        "b:",
        "answer: mug (13.1 %), pool: amax over 48 tokens of 256 channels",
        "points: 30, while the network was trained on 48",
        "left out critical++: no.",
    ]


def test_tables_fit_into_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = RobustnessOptions(
        points=32, train_clouds=24, test_clouds=12, epochs=1, rounds=1, width=0.06, threads=1
    )
    monkeypatch.setattr(robustness, "draw_report", lambda *_: new_figure(1, 1))
    found = robustness.run(options, None)
    for row in found.metrics["methods"].values():
        row["ce"] = {name: value + 10 for name, value in row["ce"].items()}  # the widest there is
    show_robustness(found)
    printed = capsys.readouterr().out
    for name in (*ROWS, *CORRUPTIONS, "mCE", "RmCE", "vote"):
        assert name in printed
    assert f"{found.metrics['methods']['EPiC']['mce']:.3f}" in printed
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= 80
    tables, _, sentence = printed.partition("EPiC's members")
    assert sentence.rstrip().endswith(".")
    cell = found.metrics["methods"]["SOR"]["levels"]["add_local"][3]
    line = [line for line in tables.splitlines() if line.startswith("  SOR")][-1]
    assert line.split()[4] == f"{cell:.3f}"
    taken = dataclasses.replace(found, options={**found.options, "networks": "old"})
    show_robustness(taken)
    assert "networks were taken from old" in capsys.readouterr().out
