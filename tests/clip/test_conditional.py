"""The conditional score against a covariance and eigenvectors made for every query."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cmd_plugin.clip import ConditionalWhitening
from cmd_plugin.clip import conditional as module
from cmd_plugin.errors import InputError, NonFiniteError, ShapeError


def rows(count: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -2, dim, dtype=torch.float64)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) * scale + 0.5


def by_covariance(x: Tensor, features: Tensor, k: int, m: int, floor: float = 1e-6) -> Tensor:
    """The definition, one query at a time."""
    result = []
    for query in x:
        cosine = torch.nn.functional.cosine_similarity(query[None], features)
        near = features[cosine.topk(k).indices]
        values, vectors = torch.linalg.eigh(near.T.cov())
        values, vectors = values[-m:], vectors[:, -m:]
        y = (query - near.mean(dim=0)) @ vectors / values.clamp_min(floor * values[-1]).sqrt()
        result.append(y.square().sum())
    return torch.stack(result)


@pytest.mark.parametrize(
    ("count", "dim", "k", "m"),
    [
        (60, 10, 20, 7),
        (60, 10, 20, 10),
        (40, 30, 12, 11),
        (30, 5, 3, 2),
        (30, 5, 2, 1),
    ],
)
@pytest.mark.parametrize("kept", [True, False])
def test_scores_are_those_of_a_covariance_for_every_query(
    count: int, dim: int, k: int, m: int, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_GRAM_ROWS", 8192 if kept else 0)
    features, x = rows(count, dim, 0), rows(7, dim, 1)
    conditional = ConditionalWhitening(features, k, m)
    expected = by_covariance(x, features, k, m)
    assert torch.allclose(conditional.squared_norm(x), expected, rtol=1e-7)
    likelihood = -0.5 * (m * math.log(2 * math.pi) + expected)
    assert torch.allclose(conditional.log_likelihood(x), likelihood, rtol=1e-7)


def test_the_representative_rows_themselves_score_as_well() -> None:
    features = rows(50, 8, 0)
    conditional = ConditionalWhitening(features, 20, 6)
    expected = by_covariance(features, features, 20, 6)
    assert torch.allclose(conditional.squared_norm(features), expected, rtol=1e-7)


def test_with_all_rows_and_directions_it_is_the_whitening_of_all() -> None:
    from cmd_plugin.clip import Whitening

    features, x = rows(50, 8, 0), rows(9, 8, 1)
    whole = Whitening.fit(features, shrinkage="none")
    conditional = ConditionalWhitening(features, 50, 8)
    assert torch.allclose(conditional.squared_norm(x), whole.squared_norm(x), rtol=1e-8)


def test_units_do_not_matter_and_half_precision_is_taken() -> None:
    features, x = rows(50, 8, 0).half(), rows(9, 8, 1).half()
    plain = ConditionalWhitening(features, 20, 6).squared_norm(x)
    for scale in (1e-3, 1e3):
        scaled = ConditionalWhitening(features.double() * scale, 20, 6)
        assert torch.allclose(scaled.squared_norm(x.double() * scale), plain, rtol=1e-8)


def test_components_of_little_variance_are_raised() -> None:
    features, x = rows(50, 8, 0), rows(5, 8, 1)
    features[:, 5:] *= 1e-2
    expected = by_covariance(x, features, 20, 8)
    found = ConditionalWhitening(features, 20, 8).squared_norm(x)
    assert torch.allclose(found, expected, rtol=1e-5)
    assert not torch.allclose(by_covariance(x, features, 20, 8, 0.0), expected, rtol=0.1)


def test_a_query_that_is_not_finite_scores_nan_alone() -> None:
    features, x = rows(50, 8, 0), rows(3, 8, 1)
    conditional = ConditionalWhitening(features, 20, 6)
    expected = conditional.squared_norm(x)
    x[1, 0] = torch.nan
    found = conditional.squared_norm(x)
    assert found.isnan().tolist() == [False, True, False]
    assert torch.equal(found[::2], expected[::2])


def test_a_query_at_the_mean_of_its_neighbours_scores_zero() -> None:
    features = rows(20, 6, 0)
    mean = features.mean(dim=0, keepdim=True)
    assert float(ConditionalWhitening(features, 20, 5).squared_norm(mean)) < 1e-12


def test_neighbours_in_too_few_directions_are_refused() -> None:
    flat = rows(50, 8, 0)
    flat[:, 5:] = flat[:, :3]
    for features in (flat, torch.ones(50, 8)):
        with pytest.raises(InputError, match="span less than 6 directions"):
            ConditionalWhitening(features, 20, 6).squared_norm(rows(1, 8, 0))
    assert ConditionalWhitening(flat, 20, 5).squared_norm(rows(1, 8, 0)).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((1, 1), "neighbours"),
        ((51, 5), "neighbours"),
        ((20, 0), "components"),
        ((20, 9), "components must be in 1..8"),
        ((5, 5), "components must be in 1..4"),
    ],
)
def test_impossible_numbers_are_refused(arguments: tuple[int, int], says: str) -> None:
    with pytest.raises(InputError, match=says):
        ConditionalWhitening(rows(50, 8, 0), *arguments)


def test_features_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(InputError, match="floor"):
        ConditionalWhitening(rows(50, 8, 0), 20, 6, floor=1.0)
    with pytest.raises(NonFiniteError):
        ConditionalWhitening(rows(50, 8, 0).log(), 20, 6)
    with pytest.raises(ShapeError):
        ConditionalWhitening(rows(50, 8, 0), 20, 6).squared_norm(rows(2, 7, 0))
