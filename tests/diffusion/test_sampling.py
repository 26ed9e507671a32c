"""Samples against the closed-form flow of a Gaussian, for every schedule, and against data."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from cmd_plugin.diffusion import NoiseSchedule, ScoreModel, draw_samples
from cmd_plugin.errors import InputError, NonFiniteError, ShapeError
from tests.helpers.diffusion_toys import F64, LINEAR, gaussian

MEAN = torch.tensor([0.5, -1.0, 2.0], dtype=F64)
VARIANCES = torch.tensor([0.04, 1.0, 2.25], dtype=F64)


@pytest.mark.parametrize("schedule", [LINEAR, NoiseSchedule("sigma"), NoiseSchedule("flow")])
def test_ddim_follows_the_flow_of_a_gaussian(schedule: NoiseSchedule) -> None:
    model = gaussian(MEAN, VARIANCES, schedule)
    found = draw_samples(model, 20, steps=1000, seed=3).double()
    # Along the flow of probability, a Gaussian's standardised coordinates never change.
    start = torch.randn(20, 3, generator=torch.Generator().manual_seed(3)).double()
    a, s = schedule.level({"steps": 999, "sigma": 80.0, "flow": 0.999}[schedule.kind])
    standard = (start - a * MEAN) / (a**2 * VARIANCES + s**2).sqrt()
    torch.testing.assert_close(found, MEAN + VARIANCES.sqrt() * standard, rtol=0, atol=0.03)


def test_noise_on_the_way_has_the_variance_it_should() -> None:
    found = draw_samples(gaussian(MEAN, VARIANCES), 4000, steps=200, eta=1.0, batch_size=4000)
    # Each step maps a Gaussian linearly and adds noise: its variance is known to the last digit.
    known = torch.ones(3, dtype=F64)
    levels = [LINEAR.level(t) for t in torch.linspace(999, 0, 200).double().round().tolist()]
    for (a, s), (later_a, later_s) in itertools.pairwise(levels):
        slope = s / (a**2 * VARIANCES + s**2)
        sigma = later_s / s * math.sqrt(1 - a**2 / later_a**2)
        gain = later_a * (1 - s * slope) / a + math.sqrt(later_s**2 - sigma**2) * slope
        known = gain**2 * known + sigma**2
    a, s = levels[-1]
    known = known * ((1 - s**2 / (a**2 * VARIANCES + s**2)) / a) ** 2
    assert torch.all((found.mean(0) - MEAN).abs() < 4 * (VARIANCES / 4000).sqrt() + 1e-3)
    assert torch.all((found.double().var(0) / known - 1).abs() < 4 * math.sqrt(2 / 4000))
    assert torch.all((known / VARIANCES - 1).abs() < 0.2)


def test_what_knows_its_data_by_heart_makes_nothing_else() -> None:
    known = torch.rand(5, 1, 3, 3) * 2 - 1
    model = ScoreModel.from_data(known, LINEAR)
    for eta in (0.0, 1.0):
        found = draw_samples(model, 30, eta=eta, clamp=True)
        assert float(torch.cdist(found.flatten(1), known.flatten(1)).amin(1).max()) < 1e-3
        assert float(found.abs().max()) <= 1.0


def test_neither_batches_nor_a_schedule_of_few_steps_change_what_is_drawn() -> None:
    model = gaussian(MEAN, VARIANCES, NoiseSchedule.linear(20))
    one = draw_samples(model, 7, steps=50, eta=0.5, seed=1)
    torch.testing.assert_close(draw_samples(model, 7, steps=20, eta=0.5, seed=1, batch_size=2), one)
    assert not torch.equal(draw_samples(model, 7, steps=20, eta=0.5, seed=2), one)


def test_each_image_has_its_condition_and_a_schedule_that_ends_in_noise_is_walked() -> None:
    table = torch.cat([NoiseSchedule.linear(50).alphas_cumprod[:-1], torch.zeros(1)])  # type: ignore[index]
    schedule = NoiseSchedule("steps", table)

    def predict(y: torch.Tensor, t: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        assert condition is not None
        signal, noise = (level.to(y)[:, None] for level in schedule.levels(t))
        return (y - signal * condition) / noise  # the only image there is

    model = ScoreModel(predict, schedule, (2,), condition=torch.zeros(1, 2))
    wanted = torch.rand(3, 2)
    torch.testing.assert_close(draw_samples(model, 3, condition=wanted, batch_size=2), wanted)
    torch.testing.assert_close(draw_samples(model, 3), torch.zeros(3, 2))
    with pytest.raises(ShapeError, match="2 conditions for 3"):
        draw_samples(model, 3, condition=wanted[:2])


def test_what_cannot_be_drawn_is_refused() -> None:
    model = gaussian(MEAN, VARIANCES)
    for options in ({"count": 0}, {"steps": 1}, {"eta": 1.5}):
        with pytest.raises(InputError, match="must be"):
            draw_samples(model, **{"count": 1, **options})  # type: ignore[arg-type]
    broken = ScoreModel(lambda y, *_: y * math.nan, LINEAR, (3,))
    with pytest.raises(NonFiniteError, match="float32"):
        draw_samples(broken, 2, steps=3)
