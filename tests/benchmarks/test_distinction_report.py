"""Tables of the experiments on class evidence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import distinction_report
from benchmarks.distinction_report import (
    markdown,
    merge,
    read_rows,
    rounded,
    summarise,
    verdicts,
    write_into,
)


def row(seed: int, iou: float, device: str = "cpu", objective: str = "dxai_distilled") -> Any:
    def scores(value: float) -> dict[str, Any]:
        deletion = {"grey": 0.6, "filled": 0.5, "filled_normalised": None}
        return {
            "plant": {"iou": value, "ncc": value, "signed": 0.7, "cosine": 1.0, "remainder": 0.3},
            "auc": {"removal": {"classifier": 0.5, "judge": 0.5}, "deletion": deletion},
        }

    split = {"judge_accuracy": [1.0, 1.0], "judge_removed": [0.5, 0.0], "shortcut": 0.1}
    ours = {"psnr": 30.0, "judge_accuracy": [0.5, 0.0], "cout": 0.1, "split": split}
    return {
        "experiment": "cross",
        "objective": objective,
        "seed": seed,
        "config": {"accelerator": device},
        "found": scores(iou) | ours | {"rivals": {"saliency": scores(0.4), "random": scores(0.1)}},
        "seconds": {"training": 60.0},
    }


def test_files_become_one_and_what_is_there_twice_is_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"all": [row(0, 0.9)], "a": [row(1, 0.8)], "b": [row(0, 0.9), row(0, 0.7, "cuda")]}
    for name, rows in files.items():
        (tmp_path / name).write_text("".join(json.dumps(one) + "\n" for one in rows))
    found = merge(tmp_path / "all", [tmp_path / "a", tmp_path / "b"])
    assert "is the same" in capsys.readouterr().out
    assert [(r["seed"], r["config"]["accelerator"]) for r in found] == [
        *((0, "cpu"), (1, "cpu"), (0, "cuda"))
    ]
    assert read_rows(tmp_path / "all") == found
    merge(tmp_path / "all", [tmp_path / "all"])
    (tmp_path / "b").write_text(json.dumps(row(0, 0.5)))
    merge(tmp_path / "all", [tmp_path / "b"])
    assert "NOT the same" in capsys.readouterr().out


def test_medians_keep_devices_apart_and_thresholds_are_judged() -> None:
    rows = [row(0, 0.9), row(1, 0.5), row(2, 0.87), row(0, 0.1, "cuda")]
    found = {(group[2], name): (value, met) for group, name, value, _, met in verdicts(rows)}
    assert found["cpu", "IoU"] == (0.87, True)
    assert found["cuda", "IoU"] == (0.1, False)
    assert found["cpu", "IoU above rivals"] == (pytest.approx(0.47), True)
    assert summarise(rows[0])["judge moved"] == pytest.approx(0.75)
    shown = markdown(rows)
    assert "| saliency | 0.400 |" in shown
    assert "**missed**" in shown


def test_tables_take_the_place_of_older_ones(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    start, end = distinction_report._START, distinction_report._END
    page.write_text(f"before\n\n{start}\nold\n{end}\n\nafter\n")
    for made in ("one", "two"):
        write_into(page, made)
        assert page.read_text() == f"before\n\n{start}\n\n{made}\n\n{end}\n\nafter\n"
    page.write_text("nothing\n")
    with pytest.raises(ValueError, match="no place"):
        write_into(page, "one")


def test_numbers_are_rounded_wherever_they_lie() -> None:
    assert rounded({"a": [1.23456789, 3, None, "x"]}) == {"a": [1.23457, 3, None, "x"]}
