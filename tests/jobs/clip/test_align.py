"""Aligned pairs are found in a mixed gallery, and what that costs is measured beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cmd_plugin.clip import Alignment, fit_alignment
from cmd_plugin.errors import InputError
from cmd_plugin.jobs.clip import align
from cmd_plugin.jobs.clip.inputs import open_embeddings
from cmd_plugin.jobs.clip.options import AlignOptions
from tests.jobs.clip.test_report import pairs


def recalls(images: np.ndarray, texts: np.ndarray, k: int) -> tuple[float, float]:
    """Share of texts whose image is among the k nearest, in a mixed gallery and among images."""
    images, texts = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, texts))
    found = [0, 0]
    for row, text in enumerate(texts):
        others = np.delete(texts, row, axis=0)
        for place, gallery in enumerate((np.concatenate([images, others]), images)):
            found[place] += int((gallery @ text >= images[row] @ text).sum() <= k)
    return found[0] / len(texts), found[1] / len(texts)


def test_retrieval_is_tested_on_the_half_that_was_not_fitted_on(tmp_path: Path) -> None:
    path = pairs(tmp_path / "pairs.npy", 90)
    result = align.run(AlignOptions(input=path, seed=3), tmp_path / "out")
    images, texts = torch.from_numpy(np.load(path))
    order = torch.randperm(90, generator=torch.Generator().manual_seed(3))
    expected = []
    for test, train in ((order[:45], order[45:]), (order[45:], order[:45])):
        fitted = fit_alignment(images[train], texts[train], "centre")
        moved = fitted.apply(images[test], "image"), fitted.apply(texts[test], "text")
        expected.append(recalls(moved[0].numpy(), moved[1].numpy(), 5))
    found = result.metrics["retrieval"]
    mixed, alone = np.mean(expected, axis=0)
    assert found["centred"]["text_to_image"]["mixed"]["5"] == pytest.approx(mixed)
    assert found["centred"]["text_to_image"]["alone"]["5"] == pytest.approx(alone)
    # The gap hides nearly every image.
    assert found["raw"]["text_to_image"]["mixed"]["10"] < 0.05
    assert found["whitened"]["text_to_image"]["mixed"]["10"] > 0.4
    assert result.data["gallery"] == [45, 45]


@pytest.mark.parametrize(("name", "method"), [("centred", "centre"), ("whitened", "whiten")])
def test_what_is_written_was_fitted_on_all_pairs(tmp_path: Path, name: str, method: str) -> None:
    path = pairs(tmp_path / "pairs.npy", 60)
    align.run(AlignOptions(input=path), tmp_path / "out")
    images, texts = torch.from_numpy(np.load(path))
    fitted = fit_alignment(images, texts, method, shrinkage=0.7)  # type: ignore[arg-type]
    written = open_embeddings(tmp_path / f"out/{name}.npy").pair()
    for rows, x, modality in zip(written, (images, texts), ("image", "text"), strict=True):
        torch.testing.assert_close(rows.all(), fitted.apply(x, modality).float())  # type: ignore[arg-type]
        assert rows.all().norm(dim=1) == pytest.approx(1.0)
    loaded = Alignment.load(tmp_path / f"out/{name}.safetensors")
    assert torch.equal(loaded.apply(texts, "text"), fitted.apply(texts, "text"))


def test_what_holds_no_pairs_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds one set of embeddings: give pairs, a \.npy of"):
        align.run(AlignOptions(input=saved))
    with pytest.raises(InputError, match="holds 19 pairs, and at least 20 are needed"):
        align.run(AlignOptions(input=pairs(tmp_path / "few.npy", 19)))
    (tmp_path / "c.txt").write_text("a\n")
    with pytest.raises(InputError, match=r"--captions belong to images, and .* holds embeddings"):
        align.run(AlignOptions(input=saved, captions=tmp_path / "c.txt"))
    with pytest.raises(InputError, match="--shrinkage must be"):
        AlignOptions(input=saved, shrinkage="much")


def test_mixed_search_among_coco_pairs(real: Callable[[str], Path], tmp_path: Path) -> None:
    path = real("pairs_b16_coco500_unit")
    found = align.run(AlignOptions(input=path), tmp_path / "out").metrics["retrieval"]
    texts = {name: one["text_to_image"] for name, one in found.items()}
    assert texts["raw"]["mixed"]["10"] == 0.0
    assert texts["centred"]["mixed"]["10"] >= 0.42
    assert texts["whitened"]["mixed"]["10"] >= 0.48
    # What search among images alone loses: of centring nearly nothing, of the whitening that
    # spreads most directions (as was measured elsewhere) much, of the default nothing.
    assert texts["raw"]["alone"]["1"] == pytest.approx(0.596, abs=0.03)
    assert texts["centred"]["alone"]["1"] == pytest.approx(0.582, abs=0.03)
    assert texts["whitened"]["alone"]["1"] >= 0.58
    assert texts["whitened"]["mixed"]["10"] >= 0.65
    spread = align.run(AlignOptions(input=path, shrinkage="ledoit-wolf")).metrics["retrieval"]
    strong = spread["whitened"]["text_to_image"]
    assert strong["mixed"]["10"] == pytest.approx(0.544, abs=0.03)
    assert strong["alone"]["1"] == pytest.approx(0.471, abs=0.03)
