"""Conformity: exact against every pair, streaming, and the paper's estimate with its bound."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from cmd_plugin.clip import (
    GaussianStatistics,
    conformity,
    conformity_to,
    estimate_conformity,
    unit_mean,
)
from cmd_plugin.errors import InputError, NonFiniteError, ShapeError


def cloud(count: int = 60, dim: int = 9, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) + 1.0


def test_conformity_is_the_mean_cosine_to_all_others() -> None:
    x = cloud()
    cosines = cosine_similarity(x[:, None], x[None], dim=2)
    expected = (cosines.sum(dim=1) - 1.0) / (len(x) - 1)
    assert torch.allclose(conformity(x), expected, rtol=0.0, atol=1e-12)


def test_against_a_reference_nothing_is_left_out() -> None:
    x, reference = cloud(), cloud(30, seed=1)
    expected = cosine_similarity(x[:, None], reference[None], dim=2).mean(dim=1)
    assert torch.allclose(conformity(x, reference), expected, rtol=0.0, atol=1e-12)
    assert torch.equal(conformity_to(x, unit_mean(reference)), conformity(x, reference))


def test_only_directions_count() -> None:
    x = cloud()
    scaled = x * torch.linspace(1e-3, 1e3, len(x), dtype=x.dtype)[:, None]
    assert torch.allclose(conformity(scaled), conformity(x), rtol=0.0, atol=1e-12)


def test_the_mean_of_all_follows_from_the_mean_unit_vector() -> None:
    x = cloud()
    expected = (len(x) * unit_mean(x).square().sum() - 1.0) / (len(x) - 1)
    assert float(conformity(x).mean()) == pytest.approx(float(expected), abs=1e-12)


def test_statistics_that_were_streamed_give_the_same_mean() -> None:
    x = cloud()
    statistics = GaussianStatistics(x.shape[1])
    for part in x.split(7):
        statistics.update(part)
    assert torch.allclose(statistics.unit_mean, unit_mean(x), rtol=0.0, atol=1e-14)


def test_an_array_on_disk_is_read_in_blocks(tmp_path: Path) -> None:
    x = cloud()
    np.save(tmp_path / "x.npy", x.numpy())
    stored = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert torch.allclose(conformity(stored), conformity(x), rtol=0.0, atol=1e-14)


def test_the_estimate_keeps_its_bound_and_both_regressions() -> None:
    x = cloud() * torch.linspace(0.5, 2.0, 60, dtype=torch.float64)[:, None]
    found = estimate_conformity(x)
    assert torch.allclose(found.exact, conformity(x), rtol=0.0, atol=1e-12)
    mean = x.mean(dim=0)
    assert torch.allclose(found.cosine, cosine_similarity(x, mean[None]), rtol=0.0, atol=1e-12)
    c, s = found.exact.numpy(), found.cosine.numpy()
    slope, offset = np.polyfit(s, c, 1)
    assert (found.slope, found.offset) == pytest.approx((slope, offset), abs=1e-9)
    slope, offset = np.polyfit(c, s, 1)
    assert (found.inverse_slope, found.inverse_offset) == pytest.approx((slope, offset), abs=1e-9)
    assert found.pearson == pytest.approx(np.corrcoef(c, s)[0, 1], abs=1e-12)
    assert 0.0 < found.error <= found.bound <= found.norm_variation


def test_of_unit_vectors_the_estimate_is_exact() -> None:
    found = estimate_conformity(torch.nn.functional.normalize(cloud()))
    assert found.pearson == pytest.approx(1.0, abs=1e-12)
    assert found.error < 1e-12
    assert found.norm_variation < 1e-12


@pytest.mark.parametrize(
    ("name", "mean", "spread", "length", "pearson", "error", "bound"),
    [
        ("text_b32_lvis1203", 0.7426, 0.0323, 0.8619, 0.999981, 0.0031, 0.0046),
        ("image_b32_photos130", 0.5542, 0.0420, 0.7468, 0.998716, None, None),
    ],
)
def test_measured_numbers_of_raw_embeddings(
    stored: Callable[[str], Tensor],
    name: str,
    mean: float,
    spread: float,
    length: float,
    pearson: float,
    error: float | None,
    bound: float | None,
) -> None:
    x = stored(name)
    found = estimate_conformity(x)
    assert float(found.exact.mean()) == pytest.approx(mean, abs=5e-5)
    assert float(found.exact.std()) == pytest.approx(spread, abs=5e-5)
    assert float(unit_mean(x).norm()) == pytest.approx(length, abs=5e-5)
    assert found.pearson == pytest.approx(pearson, abs=5e-7)
    if error is not None:
        assert (found.error, found.bound) == pytest.approx((error, bound), abs=5e-5)


def test_measured_numbers_of_the_coco_pairs(stored: Callable[[str], Tensor]) -> None:
    images, texts = stored("pairs_b16_coco500_unit")
    for x, mean, spread, length, inverse in (
        (images, 0.5315, 0.0477, 0.7297, 1.368),
        (texts, 0.5152, 0.0587, 0.7184, 1.389),
    ):
        found = estimate_conformity(x)
        assert float(found.exact.mean()) == pytest.approx(mean, abs=5e-5)
        assert float(found.exact.std()) == pytest.approx(spread, abs=5e-5)
        assert float(unit_mean(x).norm()) == pytest.approx(length, abs=5e-5)
        assert found.inverse_slope == pytest.approx(inverse, abs=5e-4)


def test_what_has_no_direction_or_number_is_refused() -> None:
    x = cloud()
    with pytest.raises(InputError, match="1 of 60 rows of x are zero"):
        conformity(x * (torch.arange(60) != 4)[:, None])
    bad = x.clone()
    bad[3, 1] = torch.nan
    with pytest.raises(NonFiniteError, match="1 of 60 rows of x"):
        conformity(bad)
    with pytest.raises(InputError, match="at least 2"):
        conformity(x[:1])
    with pytest.raises(ShapeError, match="embeddings"):
        unit_mean(x[0])
    with pytest.raises(InputError, match="0 rows"):
        unit_mean(x[:0])
    with pytest.raises(ShapeError, match=r"\[B, d\] and \[d\]"):
        conformity_to(x, torch.zeros(4))
    with pytest.raises(InputError, match="mean of x is zero"):
        estimate_conformity(torch.cat((torch.eye(3), -torch.eye(3))))
    with pytest.raises(InputError, match="equally common"):
        estimate_conformity(torch.ones(4, 3))
    assert conformity_to(x[:0], unit_mean(x)).shape == (0,)
