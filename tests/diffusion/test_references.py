"""Differentiated references against finite differences and local dimensions known beforehand."""

from __future__ import annotations

import pytest
import torch

from cmd_plugin.diffusion import NoiseSchedule, lid_flipd, p_laplace_exact
from cmd_plugin.diffusion.references import vector_jacobian
from cmd_plugin.errors import InputError
from tests.helpers.diffusion_toys import F64, data_level, gaussian, network_model, smooth_network


def test_the_p_laplacian_of_a_round_gaussian_is_the_closed_form() -> None:
    schedule, t, _ = data_level()
    for d, variance in ((2, 0.5), (3, 2.0)):
        model = gaussian(torch.zeros(d, dtype=F64), torch.full((d,), variance, dtype=F64), schedule)
        x = torch.randn(5, d, dtype=F64)
        r = x.norm(dim=1)
        for p in (1, 2, 3):
            expected = -(d + p - 2) * r ** (p - 2) / variance ** (p - 1)
            found = p_laplace_exact(model, x, t, p).value
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_random_signs_estimate_the_trace() -> None:
    d = 30
    model = network_model(smooth_network(d).double(), d)
    image = torch.randn(1, d, dtype=F64)
    full = p_laplace_exact(model, image, 300, 2, trace="full")
    guesses = torch.tensor(
        [
            float(
                p_laplace_exact(model, image, 300, 2, trace="hutchinson", probes=16, seed=s).trace
            )
            for s in range(20)
        ]
    )
    error = float(guesses.std()) / 20**0.5
    assert abs(float(guesses.mean()) - float(full.trace)) < 4 * error
    assert full.antisymmetry is not None
    assert float(full.antisymmetry) > 0.1  # a learned score is no gradient
    assert p_laplace_exact(model, image, 300, trace="hutchinson").antisymmetry is None


def test_products_with_the_jacobian_are_finite_differences() -> None:
    d = 8
    model = network_model(smooth_network(d).double(), d)
    x, u, v = (torch.randn(2, d, dtype=F64) for _ in range(3))
    t = torch.full((2,), 100.0)
    _, product = vector_jacobian(model, x, t, u)
    step = 1e-6
    with torch.no_grad():
        slope = (model.noise(x + step * v, t) - model.noise(x - step * v, t)) / (2 * step)
    torch.testing.assert_close((product * v).sum(1), (u * slope).sum(1), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dimension", [0, 3, 8])
def test_flipd_reads_the_dimension_of_the_data(dimension: int) -> None:
    d = 8
    variances = torch.zeros(d, dtype=F64)
    variances[:dimension] = 1.0
    schedule = NoiseSchedule("steps", torch.tensor([0.9999]))
    model = gaussian(torch.zeros(d, dtype=F64), variances, schedule)
    found = lid_flipd(model, torch.zeros(1, d, dtype=F64), 0)
    assert float(found) == pytest.approx(dimension, abs=0.01)


def test_unknown_traces_are_refused() -> None:
    model = network_model(smooth_network(4), 4)
    with pytest.raises(InputError, match="trace"):
        p_laplace_exact(model, torch.zeros(1, 4), 10, trace="exact")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="probes"):
        p_laplace_exact(model, torch.zeros(1, 4), 10, trace="hutchinson", probes=0)
