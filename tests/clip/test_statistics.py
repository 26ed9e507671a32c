"""Sums over rows against numpy on all rows at once: in any split, any order, from any shift."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cmd_plugin.clip import GaussianStatistics
from cmd_plugin.errors import InputError, ShapeError, StateMismatch

DIM = 6


def features(rows: int, dim: int = DIM, seed: int = 0) -> Tensor:
    """Correlated rows far from the origin, of variances from 1 to 1e-4."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    scale = torch.logspace(0, -2, dim, dtype=torch.float64)
    return torch.randn(rows, dim, generator=generator, dtype=torch.float64) @ mixing * scale + 9.0


def gathered(*batches: Tensor, **options: object) -> GaussianStatistics:
    statistics = GaussianStatistics(batches[0].shape[1], **options)  # type: ignore[arg-type]
    for batch in batches:
        statistics.update(batch)
    return statistics


def numbers(statistics: GaussianStatistics) -> dict[str, Tensor]:
    gaussian = statistics.compute()
    return {
        "mean": gaussian.mean,
        "covariance": gaussian.covariance,
        # In units of its own size: of two rows it is zero.
        "third": 1.0 + statistics.central()["third"] / statistics.central()["fourth"] ** 0.75,
        "fourth": statistics.central()["fourth"],
        "units": statistics.unit_mean,
        "norm": torch.tensor(statistics.mean_norm, dtype=torch.float64),
    }


def by_numpy(x: Tensor) -> dict[str, Tensor]:
    rows = x.double().numpy()
    z = rows - rows.mean(axis=0)
    size = (z**2).sum(axis=1)
    norm = np.linalg.norm(rows, axis=1)
    found = {
        "mean": rows.mean(axis=0),
        "covariance": np.cov(rows.T),
        "third": 1.0 + (size[:, None] * z).sum(axis=0) / (size**2).sum() ** 0.75,
        "fourth": (size**2).sum(),
        "units": (rows / norm[:, None]).mean(axis=0),
        "norm": norm.mean(),
    }
    return {name: torch.as_tensor(value) for name, value in found.items()}


def alike(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-10) -> bool:
    """Whether each entry differs by at most the tolerance of that entry's largest number."""
    return all(
        (v - other[k]).abs().max() <= tolerance * other[k].abs().max() for k, v in one.items()
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_floating_dtype_is_summed_exactly(dtype: torch.dtype) -> None:
    x = features(700).to(dtype)
    assert alike(numbers(gathered(x)), by_numpy(x))


@pytest.mark.parametrize("dim", [1, 192, 193, 400])
def test_features_of_one_strip_and_of_several(dim: int) -> None:
    x = features(30, dim)
    covariance = gathered(x).compute().covariance
    expected = torch.as_tensor(np.cov(x.numpy().T)).reshape(dim, dim)
    assert (covariance - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert torch.equal(covariance, covariance.T)


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) >= 2),
    st.integers(1, 4),
    st.integers(0, 2**31),
)
def test_any_split_order_and_grouping_is_one_fit(sizes: list[int], ranks: int, seed: int) -> None:
    x = features(sum(sizes), seed=seed)
    parts = list(x.split(sizes))
    order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(seed)).tolist()
    shares = [GaussianStatistics(DIM) for _ in range(ranks)]
    for number, place in enumerate(order):
        shares[number % ranks].update(parts[place])
    total = GaussianStatistics(DIM)
    for share in shares:
        total.merge(share)
    assert total.rows == len(x)
    assert alike(numbers(total), by_numpy(x))


def test_merging_is_associative_and_an_empty_one_changes_nothing() -> None:
    a, b, c = (features(20, seed=s) for s in range(3))
    left = gathered(a)
    left.merge(gathered(b))
    left.merge(gathered(c))
    inner, right = gathered(b), gathered(a)
    inner.merge(gathered(c))
    right.merge(inner)
    assert alike(numbers(left), numbers(right))
    before = left.state_dict()
    left.merge(GaussianStatistics(DIM))
    assert all(torch.equal(v, left.state_dict()[k]) for k, v in before.items() if k != "config")
    empty = GaussianStatistics(DIM)
    empty.merge(left)
    assert alike(numbers(empty), numbers(left), 0.0)


def test_raw_sums_in_single_precision_would_be_wrong_where_these_are_right() -> None:
    """The case of the specification: a large mean, and directions of little variance."""
    x = (features(1184, 40) * torch.logspace(0, -2, 40) + 8.0).float()
    raw = x.T @ x / len(x) - torch.outer(x.mean(dim=0), x.mean(dim=0))
    smallest = np.linalg.eigvalsh(np.cov(x.double().numpy().T))[0]
    ours = torch.linalg.eigvalsh(gathered(*x.split(100)).compute().covariance)[0]
    assert torch.linalg.eigvalsh(raw.double())[0] < 0.0
    assert abs(float(ours) / smallest - 1.0) < 1e-6


def test_rows_that_are_not_finite_are_skipped_and_counted() -> None:
    x = features(20).float()
    bad = x.clone()
    bad[0, 1], bad[7, 0], bad[7, 3], bad[19, 5] = torch.nan, torch.inf, -torch.inf, torch.inf
    statistics = gathered(bad[:1], bad[1:])
    assert (statistics.rows, statistics.skipped) == (17, 3)
    assert alike(numbers(statistics), by_numpy(x[[i for i in range(20) if i not in (0, 7, 19)]]))


def test_unit_rows_are_those_divided_by_their_norms() -> None:
    x = features(30)
    x[4] = 0.0
    statistics = gathered(x, normalize="l2")
    kept = torch.cat([x[:4], x[5:]])
    assert (statistics.rows, statistics.skipped) == (29, 1)
    assert alike(numbers(statistics), by_numpy(kept / kept.norm(dim=1, keepdim=True)))


def test_a_row_of_zeros_counts_as_a_row_without_direction() -> None:
    x = features(5)
    x[2] = 0.0
    expected = torch.nn.functional.normalize(x, dim=1).mean(dim=0)
    assert torch.allclose(gathered(x).unit_mean, expected, rtol=1e-14)


def test_arrays_on_disk_are_read_in_blocks(tmp_path: Path) -> None:
    x = features(1500).float()
    np.save(tmp_path / "x.npy", x.numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    statistics = GaussianStatistics(DIM)
    statistics.update(mapped)
    assert alike(numbers(statistics), numbers(gathered(x)), 0.0)
    swapped = GaussianStatistics(DIM)
    swapped.update(x.numpy().astype(">f4"))
    assert alike(numbers(swapped), numbers(gathered(x)), 0.0)


def test_what_is_not_floating_rows_is_refused_and_nothing_changes() -> None:
    statistics = gathered(features(4))
    for bad in (features(4)[0], features(4).long(), features(4, 5), np.zeros((2, DIM), int)):
        with pytest.raises(ShapeError, match="floating"):
            statistics.update(bad)
    assert statistics.rows == 4


def test_too_few_rows_are_said_to_be_too_few() -> None:
    statistics = GaussianStatistics(DIM)
    for ask in (lambda: statistics.mean, lambda: statistics.unit_mean, statistics.compute):
        with pytest.raises(InputError, match="update them"):
            ask()
    statistics.update(features(1))
    with pytest.raises(InputError, match="at least 2"):
        statistics.compute()


def test_different_things_do_not_merge_or_load() -> None:
    one = GaussianStatistics(DIM, about={"model": "a"})
    for other in (
        GaussianStatistics(DIM, about={"model": "b"}),
        GaussianStatistics(DIM, normalize="l2", about={"model": "a"}),
        GaussianStatistics(DIM + 1, about={"model": "a"}),
    ):
        with pytest.raises(StateMismatch, match="merged"):
            one.merge(other)
        with pytest.raises(StateMismatch):
            one.load_state_dict(other.state_dict())


def test_a_file_keeps_what_the_rows_are(tmp_path: Path) -> None:
    statistics = gathered(features(9), normalize="l2", about={"model": "ViT-B-32"})
    statistics.save(tmp_path / "s.safetensors")
    again = GaussianStatistics.load(tmp_path / "s.safetensors")
    assert again.about == {"model": "ViT-B-32"}
    assert again.normalize == "l2"
    assert alike(numbers(again), numbers(statistics), 0.0)


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(InputError, match="dim"):
        GaussianStatistics(0)
    with pytest.raises(InputError, match="normalize"):
        GaussianStatistics(3, normalize="l1")  # type: ignore[arg-type]
