"""What the page of a report says was measured, and the page needs nothing but itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmd_plugin.errors import InputError
from cmd_plugin.jobs.clip import report
from cmd_plugin.jobs.clip.options import ReportOptions
from cmd_plugin.runs.figures import read_about
from tests.jobs.clip.conftest import draw


def pairs(path: Path, count: int = 100) -> Path:
    """Images and texts with something in common, apart in their first value."""
    common, images, texts = (draw(count, seed) for seed in range(3))
    apart = np.zeros(6, np.float32)
    apart[2] = 20.0
    np.save(path, np.stack([common + 0.3 * images + apart, common + 0.3 * texts]))
    return path


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the pictures, which take most of the time."""
    monkeypatch.setattr(report, "_write", lambda *_: None)


def read_page(out: Path) -> str:
    """The page, which asks for nothing from anywhere."""
    page = (out / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"(?:src|href)=\"(?!data:image/png;base64,)", page) == []
    assert "<script" not in page
    assert "http" not in page
    return page


def test_pairs_are_reported(tmp_path: Path) -> None:
    path = pairs(tmp_path / "pairs.npy")
    options = ReportOptions(input=path, group_size=50, shown=3)
    found = report.run(options, tmp_path / "out").metrics
    images, texts = np.load(path).astype(float)
    units = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, texts)]
    gap = np.linalg.norm(units[0].mean(axis=0) - units[1].mean(axis=0))
    assert found["pairs"]["gap"] == pytest.approx(gap)
    cosines = units[0] @ units[1].T
    first = float((cosines.argmax(axis=1) == np.arange(100)).mean())
    assert found["pairs"]["recall"]["image_to_text"]["1"] == pytest.approx(first)
    assert found["pairs"]["separability"][0]["feature"] == 2
    assert found["pairs"]["separability"][0]["accuracy"] == 1.0
    alphas, losses = (found["pairs"]["alpha"][name] for name in ("alphas", "loss"))
    assert 0.0 in alphas
    logits = cosines / 0.01

    def entropy(x: np.ndarray) -> float:
        high = x.max(axis=1)
        return float((np.log(np.exp(x - high[:, None]).sum(axis=1)) + high - x.diagonal()).mean())

    assert losses[alphas.index(0.0)] == pytest.approx((entropy(logits) + entropy(logits.T)) / 2)
    for name, x in (("image", images), ("text", texts)):
        one = found[name]
        norms = np.linalg.norm(x - x.mean(axis=0), axis=1)
        assert one["radius"] == pytest.approx(norms.mean(), rel=1e-6)
        assert one["thickness"] == pytest.approx(norms.std(ddof=1), rel=1e-6)
        assert one["squared_norm"]["in_sample"] == pytest.approx(6 * 0.99, rel=1e-5)
        assert [test["group_size"] for test in one["normality"]] == [100, 50]
    page = read_page(tmp_path / "out")
    names = ("spectrum", "norms", "normality", "normalization", "separability", "alpha")
    for name in names:
        assert read_about(tmp_path / f"out/{name}.png") == {"input": str(path)}
    assert page.count("data:image/png") == len(names)
    for text in (f"{found['pairs']['gap']:.3f}", "R@10", "group size", "Least and most likely"):
        assert text in page


def test_images_are_shown(photos: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "input": photos,
        "model": "tests.helpers.clip_encoder:SmallPair",
        "untrained": True,
        "workers": 0,
        "shrinkage": "0.2",
        "shown": 4,
    }
    found = report.run(ReportOptions(**given), tmp_path / "out")
    assert {"least_likely.png", "most_likely.png", "left_out.csv"} <= set(found.files)
    page = read_page(tmp_path / "out")
    assert "Least and most likely images" in page
    assert "random, seed 0" in page
    # The embeddings say where their images are: a second report shows them without an encoder.
    again = ReportOptions(input=tmp_path / "out/embeddings.npy", shrinkage="0.2", shown=4)
    second = report.run(again, tmp_path / "again")
    assert "least_likely.png" in second.files
    assert second.metrics == found.metrics
    one, two = (tmp_path / name / "least_likely.png" for name in ("out", "again"))
    from PIL import Image

    assert np.array_equal(np.array(Image.open(one)), np.array(Image.open(two)))


def test_the_extremes_are_the_extremes(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cmd_plugin.clip import Whitening
    from cmd_plugin.jobs.clip.geometry import measure_set
    from cmd_plugin.jobs.clip.inputs import open_embeddings
    from cmd_plugin.runs.job import Job

    monkeypatch.setattr("cmd_plugin.jobs.clip.geometry._PIECE", 50)
    options = ReportOptions(input=saved, shown=5, group_size=60)
    rows = open_embeddings(saved).single(None)
    with Job("clip report", options, None) as job:
        found = measure_set(job, options, rows, 0, len(rows))
    squared = Whitening.fit(rows.all()).leave_one_out(rows.all())
    assert list(found.lowest) == squared.argsort(descending=True)[:5].tolist()
    assert list(found.highest) == squared.argsort()[:5].tolist()


@pytest.mark.usefixtures("undrawn")
def test_rows_that_are_no_numbers_are_left_out_of_everything(tmp_path: Path) -> None:
    path = pairs(tmp_path / "pairs.npy")
    values = np.load(path)
    values[0, 3, 1], values[1, 8, 0] = np.nan, np.inf
    np.save(path, values)
    options = ReportOptions(input=path, group_size=40, shown=1)
    found = report.run(options).metrics
    assert (found["image"]["skipped_rows"], found["text"]["skipped_rows"]) == (1, 1)
    assert found["pairs"]["pairs"] == 98


@pytest.mark.filterwarnings("ignore:45 rows are less than 10")
def test_fewer_rows_than_dimensions_are_shrunk_and_reported(tmp_path: Path) -> None:
    np.save(tmp_path / "few.npy", draw(45, dim=60))
    options = ReportOptions(input=tmp_path / "few.npy", modality="image", shown=0)
    found = report.run(options, tmp_path / "out").metrics["image"]
    assert found["shrinkage"] == "oas"
    assert [test["group_size"] for test in found["normality"]] == [45]
    assert "Least and most likely" not in read_page(tmp_path / "out")
    np.save(tmp_path / "few.npy", draw(39))
    with pytest.raises(InputError, match="holds 39 rows, and a report needs at least 40"):
        report.run(options)


@pytest.mark.filterwarnings("ignore:500 rows are less", "ignore:the features look L2-normalised")
def test_the_pairs_of_coco_have_the_numbers_measured_elsewhere(
    real: Callable[[str], Path], tmp_path: Path
) -> None:
    path = real("pairs_b16_coco500_unit")
    found = report.run(ReportOptions(input=path), tmp_path / "out").metrics
    pairs = found["pairs"]
    assert pairs["gap"] == pytest.approx(0.8513, abs=1e-4)
    assert pairs["paired_cosine"] == pytest.approx(0.310, abs=5e-4)
    assert pairs["recall"]["image_to_text"]["1"] == pytest.approx(0.552)
    assert pairs["recall"]["text_to_image"]["1"] == pytest.approx(0.506)
    assert pairs["alpha"]["best"] == 0.0
    assert min(pairs["alpha"]["loss"]) == pytest.approx(1.801, abs=1e-3)
    assert found["image"]["conformity"]["mean"] == pytest.approx(0.5315, abs=5e-5)
    assert found["text"]["conformity"]["mean"] == pytest.approx(0.5152, abs=5e-5)
    assert "divided by their norms before" in read_page(tmp_path / "out")
