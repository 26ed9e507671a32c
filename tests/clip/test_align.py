"""Alignment of the modalities for mixed search: what it takes off, and what it brings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from cmd_plugin.clip import Alignment, fit_alignment, modality_gap, recall_at
from cmd_plugin.errors import InputError, ShapeError
from cmd_plugin.runs import Schema


def two(count: int = 90, dim: int = 6) -> tuple[Tensor, Tensor]:
    x = torch.randn(2, count, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x[0] + 1.0, x[0] + 0.5 * x[1] - 1.0


def test_centring_takes_off_the_mean_of_unit_vectors() -> None:
    images, texts = two()
    found = fit_alignment(images, texts, "centre")
    expected = normalize(normalize(texts) - normalize(texts).mean(dim=0))
    assert torch.allclose(found.apply(texts, "text"), expected)
    aligned = modality_gap(found.apply(images, "image"), found.apply(texts, "text"))
    assert aligned.l2m < 0.2 < 1.0 < modality_gap(images, texts).l2m


def test_whitening_is_symmetric_and_makes_directions_equally_wide() -> None:
    images, texts = two()
    found = fit_alignment(images, texts, "whiten", shrinkage="none", normalise=False)
    matrix = found.matrices["image"]
    assert torch.allclose(matrix, matrix.T)
    white = (images - images.mean(dim=0)) @ matrix
    assert torch.allclose(white.T @ white / (len(white) - 1), torch.eye(6, dtype=torch.float64))
    assert torch.allclose(found.apply(images, "image"), normalize(white))


@pytest.mark.parametrize("method", ["centre", "whiten"])
def test_a_file_holds_all_of_it(method: str, tmp_path: Path) -> None:
    images, texts = two()
    found = fit_alignment(images, texts, method)  # type: ignore[arg-type]
    found.save(tmp_path / "a.safetensors")
    again = Alignment.load(tmp_path / "a.safetensors")
    for name, x in (("image", images), ("text", texts)):
        assert torch.equal(again.apply(x, name), found.apply(x, name))  # type: ignore[arg-type]


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    fit_alignment(*two()).save(path)
    schema = Schema("clip-alignment", 1, "a modality alignment")
    tensors, about = schema.load(path)
    for damage in ({"mean.text": tensors["mean.text"][:2]}, {"matrix.text": torch.zeros(2)}):
        schema.save(path, {**tensors, **damage}, about)
        with pytest.raises(InputError, match="is damaged"):
            Alignment.load(path)
    schema.save(path, tensors, {**about, "method": "none"})
    with pytest.raises(InputError, match="is damaged"):
        Alignment.load(path)


def test_mixed_search_on_the_other_half_of_the_coco_pairs(stored: Callable[[str], Tensor]) -> None:
    images, texts = stored("pairs_b16_coco500_unit")
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    first, second = order[:250], order[250:]
    own = torch.arange(250) + 250  # a caption is no answer to itself

    def search(x: Tensor, t: Tensor) -> tuple[float, float]:
        mixed = recall_at(t, torch.cat((x, t)), (10,), leave_out=own)[10]
        return mixed, recall_at(t, x, (1,))[1]

    assert search(images[second], texts[second]) == pytest.approx((0.0, 0.596))
    found = {}
    for method in ("centre", "whiten"):
        fitted = fit_alignment(images[first], texts[first], method)  # type: ignore[arg-type]
        found[method] = search(
            fitted.apply(images[second], "image"), fitted.apply(texts[second], "text")
        )
    assert found["centre"][0] >= 0.42
    assert found["whiten"][0] >= 0.48
    assert min(found["centre"][1], found["whiten"][1]) > 0.55  # little is lost among images alone
    weak = fit_alignment(images[first], texts[first], shrinkage="ledoit-wolf")
    assert search(weak.apply(images[second], "image"), weak.apply(texts[second], "text"))[1] < 0.5


def test_what_does_not_fit_is_refused() -> None:
    images, texts = two()
    found = fit_alignment(images, texts)
    with pytest.raises(ShapeError, match="3 columns and the alignment 6"):
        found.apply(images[:, :3], "image")
    with pytest.raises(InputError, match="image or text"):
        found.apply(images, "sound")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="centre or whiten"):
        fit_alignment(images, texts, "zca")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="of one model"):
        fit_alignment(images, texts[:, :2])
