"""The averages of weights that CMD is compared with, against the things they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks import averages

STEPS = 40


@pytest.fixture(scope="module")
def run() -> Tensor:
    """[40, 7] float64 weights of a run."""
    moves = torch.randn(STEPS, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return moves.cumsum(dim=0)


def follow(average: AveragedModel, model: nn.Linear, rows: Tensor) -> Tensor:
    with torch.no_grad():
        for row in rows:
            model.weight.copy_(row[None])
            average.update_parameters(model)
    return average.module.weight[0].detach()


@pytest.mark.parametrize("taken", [None, torch.arange(3, STEPS, 4)])
def test_an_exponential_row_is_torchs_moving_average(run: Tensor, taken: Tensor | None) -> None:
    model = nn.Linear(7, 1, bias=False).double()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    expected = follow(average, model, run if taken is None else run[taken])
    found = averages.exponential(STEPS, 0.9, taken) @ run
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_an_equal_row_is_torchs_swa(run: Tensor) -> None:
    model = nn.Linear(7, 1, bias=False).double()
    taken = torch.arange(20, STEPS, 5)
    expected = follow(AveragedModel(model), model, run[taken])
    found = averages.equal(STEPS, taken) @ run
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_blend_is_a_line_from_the_last_weights_to_the_average(run: Tensor) -> None:
    tail = averages.exponential(STEPS, 0.5)
    found = averages.blend(tail, 0.3) @ run
    torch.testing.assert_close(found, 0.7 * run[-1] + 0.3 * (tail @ run))


def test_a_power_row_is_the_recursion_it_telescopes(run: Tensor) -> None:
    exponent, until = 6.94, 25
    value = torch.zeros(7, dtype=torch.float64)
    for t in range(1, until + 1):
        beta = (1 - 1 / t) ** (exponent + 1)
        value = beta * value + (1 - beta) * run[t - 1]
    torch.testing.assert_close(averages.power(STEPS, exponent, until) @ run, value)


@pytest.mark.parametrize(("width", "exponent"), [(0.05, 16.97), (0.1, 6.94)])
def test_the_exponent_is_the_published_one_and_gives_the_width(
    width: float, exponent: float
) -> None:
    found = averages.power_exponent(width)
    assert found == pytest.approx(exponent, abs=0.005)
    row = averages.power(20_000, found, 20_000)
    times = torch.arange(20_000) / 20_000
    mean = row @ times.double()
    spread = float((row @ (times.double() - mean) ** 2).sqrt())
    assert spread == pytest.approx(width, rel=1e-3)


def test_inner_products_of_profiles_are_integrals() -> None:
    first, first_time, second, second_time = (
        torch.tensor(x).double() for x in (3.0, 8.0, 5.0, 6.0)
    )
    t = torch.linspace(0, 6, 200_001, dtype=torch.float64)
    profiles = [(g + 1) * t**g / T ** (g + 1) for g, T in ((3.0, 8.0), (5.0, 6.0))]
    found = averages._inner(first, first_time, second, second_time)
    assert float(found) == pytest.approx(float(torch.trapezoid(profiles[0] * profiles[1], t)))


@pytest.mark.parametrize("width", [0.02, 0.05, 0.1, 0.2])
def test_two_stored_power_averages_give_any_other(width: float) -> None:
    steps = 600
    times = torch.arange(10, steps + 1, 10)
    stored = [(averages.power_exponent(w), int(t)) for w in (0.05, 0.1) for t in times]
    rows = torch.stack([averages.power(steps, exponent, t) for exponent, t in stored])
    exponents, moments = torch.tensor(stored, dtype=torch.float64).T
    wanted = averages.power_exponent(width)
    found = averages.reconstruct_power(exponents, moments, wanted, float(steps))
    exact = averages.power(steps, wanted, steps)
    assert float(found.sum()) == pytest.approx(1.0)
    # What is lost is what no combination reaches; the coefficients do not amplify rounding.
    assert float((found @ rows - exact).abs().sum()) < 0.02
    assert float(found.abs().sum()) < 1e4


@pytest.mark.parametrize("method", [averages.reduced_rank, averages.minimal_polynomial])
def test_extrapolation_finds_the_limit_of_a_linear_iteration(method: object) -> None:
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(30, 4, generator=generator, dtype=torch.float64)).Q
    rates = torch.tensor([0.9, 0.7, -0.5, 0.3], dtype=torch.float64)
    limit = torch.randn(30, generator=generator, dtype=torch.float64)
    points = torch.stack([limit + basis @ rates**t for t in range(6)])
    coefficients = method(points)  # type: ignore[operator]
    assert float(coefficients.sum()) == pytest.approx(1.0)
    torch.testing.assert_close(coefficients @ points, limit, rtol=1e-9, atol=1e-9)


def test_no_other_combination_of_moves_is_shorter_than_reduced_ranks(run: Tensor) -> None:
    points = run[-8:]
    moves = points.diff(dim=0)
    found = averages.reduced_rank(points)
    others = torch.randn(200, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    others = found[:-1] + 0.1 * (others - others.mean(dim=1, keepdim=True))
    assert float((found[:-1] @ moves).norm()) <= float((others @ moves).norm(dim=1).min())
