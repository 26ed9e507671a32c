"""Natural order: digits compare as numbers, folder by folder."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmd_plugin.data.order import natural_key


def ordered_from_the_back(items: list[Any]) -> list[Any]:
    backwards = items[::-1]
    backwards.sort(key=natural_key)
    return backwards


@pytest.mark.parametrize(
    "ordered",
    [
        ["1.png", "2.png", "10.png"],
        ["a", "a0", "a1", "a2", "a10", "b"],
        ["epoch=2-step=9", "epoch=2-step=10", "epoch=10-step=1"],
        ["x" + "9" * 5000, "x1" + "0" * 5000],
        ["1a2", "1a10", "1b1", "2a1"],
    ],
)
def test_digits_compare_as_numbers(ordered: list[str]) -> None:
    assert ordered_from_the_back(ordered) == ordered


@pytest.mark.parametrize("kind", [str, Path, PurePosixPath])
def test_paths_are_compared_folder_by_folder(kind: type) -> None:
    ordered = [
        "run/checkpoint-20/model-2.bin",
        "run/checkpoint-20/model-10.bin",
        "run/checkpoint-100/model-1.bin",
        "run/checkpoint-1000/model-1.bin",
        "run-2/checkpoint-1/model-1.bin",
    ]
    paths = [kind(name) for name in ordered]
    assert ordered_from_the_back(paths) == paths


def test_leading_zeros_do_not_change_the_number_and_equal_numbers_keep_one_order() -> None:
    names = ["007", "8", "07", "7", "06"]
    expected = ["06", "007", "07", "7", "8"]
    assert sorted(names, key=natural_key) == expected
    assert ordered_from_the_back(names) == expected


@given(numbers=st.lists(st.integers(0, 10**12), unique=True))
def test_numbered_files_sort_like_their_numbers(numbers: list[int]) -> None:
    names = [f"frame-{number}.png" for number in numbers]
    expected = [f"frame-{number}.png" for number in sorted(numbers)]
    assert sorted(names, key=natural_key) == expected


@given(names=st.lists(st.text(), unique=True))
def test_any_names_have_one_order(names: list[str]) -> None:
    once = sorted(names, key=natural_key)
    assert ordered_from_the_back(names) == once
