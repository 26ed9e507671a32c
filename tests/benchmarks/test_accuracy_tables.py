"""What the tables of the comparison say about made-up results."""

from __future__ import annotations

from typing import Any

import pytest
from scipy import stats

from benchmarks import accuracy_tables as tables

NAMES = (
    "raw",
    "ema step 0.9",
    "ema step 0.99",
    "swa",
    "cmd M=10",
    "cmd M=10 mean",
    "cmd M=2, l=0.5",
)


def row(
    seed: int, schedule: str, scores: dict[str, float], norm: str = "groupnorm"
) -> dict[str, Any]:
    return {
        "case": {"data": "digits", "epochs": 3, "label_noise": 0.2},
        "data": "digits",
        "norm": norm,
        "schedule": schedule,
        "seed": seed,
        "train_images": 10,
        "statistics": ["none"],
        "scores": {name: [[value, 1.0]] for name, value in scores.items()},
    }


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    found = []
    for seed in range(3):
        scores = {name: 0.5 + 0.01 * n + 0.1 * seed for n, name in enumerate(NAMES)}
        scores["swa"] -= 0.2
        found += [row(seed, s, scores) for s in ("constant", "cosine")]
        found.append(row(seed, "schedule-free", {"schedule-free x10": 0.3 + 0.1 * seed}))
    return found


def test_an_interval_is_that_of_the_paired_t_test() -> None:
    mine, theirs = [3.0, 4.0, 6.5, 2.0], [2.5, 4.5, 5.0, 1.0]
    expected = stats.ttest_rel(mine, theirs).confidence_interval(0.95)
    mean, half = tables.paired(mine, theirs)
    assert (mean - half, mean + half) == pytest.approx((expected.low, expected.high))


def test_one_seed_has_no_interval() -> None:
    assert tables.paired([2.0], [1.0]) == (1.0, float("inf"))


def test_a_method_is_chosen_without_the_seed_it_is_reported_for() -> None:
    accuracy = {"a": [9.0, 1.0, 2.0], "b": [1.0, 4.0, 3.0]}
    assert tables.chosen_on_others(accuracy, ["a", "b"]) == [1.0, 1.0, 2.0]


def test_schedule_free_stands_beside_both_schedules(rows: list[dict[str, Any]]) -> None:
    found = tables.columns(rows)
    assert [column.schedule for column in found] == ["constant", "cosine"]
    for column in found:
        assert column.accuracy["schedule-free x10"] == pytest.approx([30.0, 40.0, 50.0])


def test_verdicts_count_columns_that_noise_does_not_explain(rows: list[dict[str, Any]]) -> None:
    found = {verdict.name: verdict for verdict in tables.verdicts(tables.columns(rows))}
    assert (found["swa"].better, found["swa"].worse) == (0, 2)
    assert (found["cmd M=10"].better, found["cmd M=10"].worse) == (2, 0)
    assert found["cmd M=10"].worst == pytest.approx(4.0)


def test_the_page_names_every_family_and_method(rows: list[dict[str, Any]]) -> None:
    page = tables.markdown(rows)
    for name in (*NAMES, "schedule-free x10", "EMA", "SWA", tables.BLEND, "CMD, M=10 (paper)"):
        assert f"| {name} |" in page
