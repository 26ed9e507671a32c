"""Two sets of embeddings are told apart where they differ, and only there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cmd_plugin.errors import InputError, ShapeError
from cmd_plugin.jobs.clip import compare
from cmd_plugin.jobs.clip.options import CompareOptions
from tests.jobs.clip.conftest import draw


def options(tmp_path: Path, new: np.ndarray, **more: object) -> CompareOptions:
    np.save(tmp_path / "a.npy", draw(120))
    np.save(tmp_path / "b.npy", new)
    chosen = {"permutations": 199, **more}
    return CompareOptions(reference=tmp_path / "a.npy", sample=tmp_path / "b.npy", **chosen)  # type: ignore[arg-type]


def test_a_shift_is_seen_and_the_same_law_is_not(tmp_path: Path) -> None:
    alike = compare.run(options(tmp_path, draw(90, 1))).metrics
    assert not alike["alarm"]
    assert alike["p_value"] > 0.05
    assert alike["auc"] == pytest.approx(0.5, abs=0.15)
    moved = compare.run(options(tmp_path, draw(90, 1) + np.float32(2))).metrics
    assert moved["alarm"]
    assert moved["p_value"] == pytest.approx(1 / 200)
    assert moved["auc"] > 0.8
    assert moved["mmd"] > alike["mmd"]
    assert moved["mean_norm"]["sample"] > moved["mean_norm"]["reference"]


def test_lengths_count_only_where_they_are_asked_for(tmp_path: Path) -> None:
    longer = draw(120, 1) * np.float32(1.5)
    assert compare.run(options(tmp_path, longer)).metrics["alarm"]
    assert not compare.run(options(tmp_path, longer, normalize="l2")).metrics["alarm"]


def test_rows_are_drawn_and_those_without_numbers_left_out(tmp_path: Path) -> None:
    new = draw(90, 1)
    new[4] = np.nan
    result = compare.run(options(tmp_path, new, most_rows=50), tmp_path / "out")
    assert result.metrics["rows"] == [50, 50]
    assert result.data["sample"]["rows"] == 90
    assert result.metrics["mean_norm"]["sample"] < 100


def test_sets_that_do_not_compare_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ShapeError, match=r"rows of 6 values and .* of 7: compare embeddings of one"
    ):
        compare.run(options(tmp_path, draw(90, dim=7)))
    with pytest.raises(InputError, match="the sample has 5 finite rows, and at least 10"):
        compare.run(options(tmp_path, draw(5)))


def test_coco_photos_are_no_imagenet_photos(real: Callable[[str], Path]) -> None:
    photos, coco = real("image_b16_photos1000"), real("image_b16_coco159")
    found = compare.run(CompareOptions(reference=photos, sample=coco, permutations=199)).metrics
    assert found["alarm"]
    assert found["auc"] > 0.85
