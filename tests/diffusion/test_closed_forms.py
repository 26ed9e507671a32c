"""Exact models: mixtures against automatic differentiation, data sets against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cmd_plugin.diffusion import ScoreModel, p_laplace
from cmd_plugin.errors import InputError, ShapeError
from tests.helpers.diffusion_toys import F64, LINEAR


@pytest.mark.parametrize("kind", ["round", "axes", "full"])
def test_a_mixture_returns_minus_s_times_the_gradient_of_the_log_density(kind: str) -> None:
    d, t = 3, 400
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    means = torch.randn(3, d, dtype=F64)
    root = torch.randn(3, d, d, dtype=F64)
    given = {
        "round": torch.tensor([0.1, 0.5, 1.0], dtype=F64),
        "axes": torch.rand(3, d, dtype=F64),
        "full": root @ root.mT,
    }[kind]
    full = given
    if kind == "round":
        full = given[:, None, None] * torch.eye(d, dtype=F64)
    elif kind == "axes":
        full = torch.diag_embed(given)
    a, s = LINEAR.level(t)
    x = torch.randn(6, d, dtype=F64, requires_grad=True)

    def log_density(x: Tensor) -> Tensor:
        parts = [
            torch.distributions.MultivariateNormal(
                a * mean, a * a * cov + s * s * torch.eye(d, dtype=F64)
            ).log_prob(x)
            for mean, cov in zip(means, full, strict=True)
        ]
        return torch.logsumexp(torch.stack(parts) + (weights / 6).log()[:, None], 0)

    (score,) = torch.autograd.grad(log_density(x).sum(), x)
    model = ScoreModel.from_mixture(weights, means, given, LINEAR)
    found = model.noise(x.detach(), torch.full((6,), t, dtype=F64))
    torch.testing.assert_close(found, -s * score, rtol=1e-9, atol=1e-10)


def test_far_from_every_mode_the_score_is_still_right() -> None:
    """A density by raw exp is 0 / 0 there."""
    model = ScoreModel.from_mixture(
        torch.ones(2), torch.tensor([[0.0], [1.0]]), torch.tensor([0.1, 0.1]), LINEAR
    )
    assert float(model.noise(torch.tensor([[500.0]]), torch.tensor([10.0]))) > 100.0


def test_weights_count_as_repetitions() -> None:
    data = torch.randn(5, 4, dtype=F64)
    counts = torch.tensor([1, 3, 2, 1, 5])
    weighted = ScoreModel.from_data(data, LINEAR, counts)
    repeated = ScoreModel.from_data(data.repeat_interleave(counts, 0), LINEAR)
    image = torch.randn(3, 4, dtype=F64)
    one, other = (p_laplace(model, image, (50, 300, 600)) for model in (weighted, repeated))
    torch.testing.assert_close(one.value, other.value, rtol=1e-10, atol=1e-12)


def test_a_bandwidth_makes_a_mixture() -> None:
    data = torch.randn(5, 4, dtype=F64)
    width = torch.full((5,), 0.3**2, dtype=F64)
    one = ScoreModel.from_data(data, LINEAR, bandwidth=0.3)
    other = ScoreModel.from_mixture(torch.ones(5, dtype=F64), data, width, LINEAR)
    x, t = torch.randn(6, 4, dtype=F64), torch.full((6,), 200, dtype=F64)
    torch.testing.assert_close(one.noise(x, t), other.noise(x, t), rtol=1e-9, atol=1e-10)


def test_members_are_sinks_and_others_follow_their_nearest_neighbour() -> None:
    from sklearn.datasets import load_digits

    digits = torch.from_numpy(load_digits().data)[:700] / 8.0 - 1.0
    members, others = digits[:600], digits[600:640]
    model = ScoreModel.from_data(members, LINEAR)
    inside = p_laplace(model, members[:20], (10, 50, 100), 1, batch_size=2048)
    assert float(inside.value.min()) > 0.999
    nearest = torch.cdist(others, members).amin(1)
    times = (10, 50, 100)
    outside = p_laplace(model, others, times, 1, directions=16, batch_size=2048)
    for number, t in enumerate(times):
        a, s = LINEAR.level(t)
        expected = 1 / (1 + a**2 * nearest**2 / (s**2 * 64)).sqrt()
        assert abs(float((outside.value[:, number, 0] - expected).mean())) < 0.03


def test_impossible_mixtures_are_refused() -> None:
    means, ones = torch.zeros(2, 3), torch.ones(2)
    with pytest.raises(InputError, match="weights"):
        ScoreModel.from_mixture(torch.tensor([1.0, 0.0]), means, ones, LINEAR)
    with pytest.raises(ShapeError, match="covariances"):
        ScoreModel.from_mixture(ones, means, torch.ones(3), LINEAR)
    with pytest.raises(InputError, match="eigenvalue"):
        ScoreModel.from_mixture(ones, means, -torch.eye(3).expand(2, 3, 3), LINEAR)
    with pytest.raises(InputError, match="bandwidth"):
        ScoreModel.from_data(means, LINEAR, bandwidth=math.nan)
    with pytest.raises(InputError, match="at least one"):
        ScoreModel.from_data(means[:0], LINEAR)
