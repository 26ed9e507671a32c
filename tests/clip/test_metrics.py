"""The torchmetrics faces: the state of the statistics over batches, merges and processes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cmd_plugin.clip import FeatureGaussian, GaussianStatistics, WhitenedLikelihood, Whitening
from cmd_plugin.errors import InputError
from tests.helpers.processes import run_ranks

DIM = 5


def batch(seed: int, rows: int = 20) -> Tensor:
    return torch.randn(rows, DIM, generator=torch.Generator().manual_seed(seed)) + 3.0


def statistics(*seeds: int) -> GaussianStatistics:
    result = GaussianStatistics(DIM)
    for seed in seeds:
        result.update(batch(seed))
    return result


def metric(*seeds: int) -> FeatureGaussian:
    result = FeatureGaussian(DIM)
    for seed in seeds:
        result.update(batch(seed))
    return result


def alike(found: FeatureGaussian, *seeds: int) -> bool:
    one, other = found.compute(), statistics(*seeds).compute()
    return one.rows == other.rows and all(
        torch.allclose(a, b, rtol=1e-12, atol=1e-14)
        for a, b in zip(one[1:], other[1:], strict=True)
    )


def test_it_is_the_statistics() -> None:
    assert alike(metric(0, 1, 2), 0, 1, 2)
    whitening = metric(0, 1, 2).whitening("zca", shrinkage="ledoit-wolf")
    expected = Whitening.fit(statistics(0, 1, 2), "zca", shrinkage="ledoit-wolf")
    assert torch.allclose(whitening.matrix, expected.matrix, rtol=1e-10)
    assert whitening.intensity == pytest.approx(expected.intensity, rel=1e-10)


def test_merging_and_forward_and_reset() -> None:
    one, other = metric(0, 1), metric(2)
    one.merge_state(other)
    assert alike(one, 0, 1, 2)
    one.update(batch(3))
    assert alike(one, 0, 1, 2, 3)
    both = FeatureGaussian(DIM)
    last = both(batch(0))
    assert torch.allclose(last.mean, batch(0).double().mean(dim=0))
    both(batch(1))
    assert alike(both, 0, 1)
    both.reset()
    both.update(batch(4))
    assert alike(both, 4)
    empty = FeatureGaussian(DIM)
    empty.merge_state(metric(0))
    assert torch.equal(empty.state, metric(0).state)


def test_copies_are_apart() -> None:
    first = metric(0)
    for again in (first.clone(), copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        again.update(batch(1))
        assert alike(again, 0, 1)
    assert alike(first, 0)


def test_the_sums_stay_float64() -> None:
    first = metric(0)
    module = nn.ModuleList([first]).half().float()
    assert module[0] is first.set_dtype(torch.float16)
    assert first.state.dtype == torch.float64
    assert alike(first, 0)


def test_rows_that_are_not_finite_are_skipped() -> None:
    first = metric(0)
    first.update(torch.full((2, DIM), torch.nan))
    assert alike(first, 0)
    assert first.state[:2].tolist() == [20, 2]


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(InputError, match="dim"):
        FeatureGaussian(0)
    with pytest.raises(InputError, match="normalize"):
        FeatureGaussian(3, normalize="l1")  # type: ignore[arg-type]


def test_the_likelihood_is_the_mean_over_rows() -> None:
    whitening = Whitening.fit(batch(0, 200), shrinkage="none")
    likelihood = WhitenedLikelihood(whitening)
    bad = batch(2)
    bad[3] = torch.nan
    likelihood.update(batch(1))
    likelihood.update(bad)
    kept = torch.cat([batch(1), bad[:3], bad[4:]])
    expected = whitening.log_likelihood(kept).double().mean()
    assert float(likelihood.compute()) == pytest.approx(float(expected), rel=1e-6)
    other = WhitenedLikelihood(whitening)
    other.update(batch(3))
    other.merge_state(likelihood)
    expected = whitening.log_likelihood(torch.cat([kept, batch(3)])).double().mean()
    assert float(other.compute()) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.ddp
@pytest.mark.slow
def test_two_processes_hold_the_gaussian_of_all_rows(tmp_path: Path) -> None:
    run_ranks(Path(__file__).with_name("ddp_metrics.py"), tmp_path)
    expected = statistics(0, 1, 2).compute()
    whitening = Whitening.fit(statistics(0, 1, 2), shrinkage="none")
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found["rows"] == 60
        assert torch.allclose(found["covariance"], expected.covariance, rtol=1e-12)
        assert torch.allclose(found["mean"], expected.mean, rtol=1e-12)
        assert torch.allclose(found["squared"], whitening.squared_norm(batch(5)), rtol=1e-5)
        # Afterwards each goes on with its own rows.
        own = (0, 1, 7) if rank == 0 else (2, 7)
        assert torch.allclose(found["own"], statistics(*own).compute().covariance, rtol=1e-12)
