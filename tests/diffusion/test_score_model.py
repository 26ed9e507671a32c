"""Every parametrisation of one Gaussian is the same model; a network is left as it was."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from cmd_plugin.diffusion import NoiseSchedule, ScoreModel, p_laplace
from cmd_plugin.errors import InputError, ShapeError
from tests.helpers.diffusion_toys import F64, LINEAR, gaussian

MEAN = torch.tensor([0.5, -1.0, 0.2, 0.0], dtype=F64)
VARIANCES = torch.tensor([0.1, 1.0, 0.0, 3.0], dtype=F64)
SIGMA = NoiseSchedule("sigma")
FLOW = NoiseSchedule("flow")
STEP = 300
KEPT = LINEAR.level(STEP)[0] ** 2
# The same share of noise in each schedule's own words.
TIMES = {
    "steps": float(STEP),
    "sigma": math.sqrt((1 - KEPT) / KEPT),
    "flow": math.sqrt(1 - KEPT) / (math.sqrt(KEPT) + math.sqrt(1 - KEPT)),
}


def posterior(y: Tensor, signal: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of image and of noise given y = signal x0 + noise e, written in those coordinates."""
    signal, noise = signal[:, None], noise[:, None]
    total = signal**2 * VARIANCES + noise**2
    away = y - signal * MEAN
    return MEAN + signal * VARIANCES / total * away, noise / total * away


def wrapped(schedule: NoiseSchedule, prediction: str) -> ScoreModel:
    def predict(y: Tensor, t: Tensor, _: Tensor | None) -> Tensor:
        signal, noise = schedule.levels(t)
        image, e = posterior(y, signal, noise)
        size = (signal**2 + noise**2).sqrt()[:, None]
        return {
            "epsilon": e,
            "sample": image,
            "v_prediction": (signal[:, None] * e - noise[:, None] * image) / size,
            "score": -e / noise[:, None],
            "flow": e - image,
        }[prediction]

    return ScoreModel(predict, schedule, (4,), prediction)


@pytest.mark.parametrize("schedule", [LINEAR, SIGMA, FLOW], ids=["steps", "sigma", "flow"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction", "score", "flow"])
def test_every_parametrisation_of_one_gaussian_has_one_flux(
    schedule: NoiseSchedule, prediction: str
) -> None:
    images = torch.randn(3, 4, dtype=F64)
    expected = p_laplace(gaussian(MEAN, VARIANCES), images, STEP)
    found = p_laplace(wrapped(schedule, prediction), images, TIMES[schedule.kind])
    assert float((found.value - expected.value).abs().max()) < 1e-5
    assert float((found.squared_error - expected.squared_error).abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("schedule", "step", "kept"),
    [
        (NoiseSchedule.scaled_linear(), 0, 0.99915),
        (NoiseSchedule.scaled_linear(), 10, 0.99043),
        (LINEAR, 10, 0.99781),
        (LINEAR, 50, 0.970),
        (LINEAR, 100, 0.895),
        (LINEAR, 400, 0.194),
    ],
)
def test_schedules_are_the_published_ones(schedule: NoiseSchedule, step: int, kept: float) -> None:
    a, s = schedule.level(step)
    assert a**2 == pytest.approx(kept, abs=6e-4)
    assert a**2 + s**2 == pytest.approx(1.0, rel=1e-12)


class Counts(nn.Module):
    """Has everything that a careless measurement would change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)

    def forward(self, y: Tensor) -> Tensor:
        return self.drop(self.norm(y))


def test_a_network_is_what_it_was_and_random_numbers_go_on_as_before() -> None:
    network = Counts().train()
    network.norm.eval()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    random = torch.get_rng_state()
    model = ScoreModel(lambda y, *_: network(y), LINEAR, (4,), networks=[network])
    one = p_laplace(model, torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), 10)
    two = p_laplace(model, torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), 10)
    assert torch.equal(one.value, two.value)  # no dropout
    assert torch.equal(random, torch.get_rng_state())
    after = network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (network.training, network.norm.training, network.drop.training) == (True, False, True)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_modes_combine_the_two_estimates() -> None:
    condition, nothing = torch.tensor([[2.0]]), torch.tensor([[0.5]])
    model = ScoreModel(
        lambda y, _, c: y * c, LINEAR, (3,), condition=condition, unconditional=nothing
    )
    x, t = torch.randn(2, 3), torch.zeros(2)
    expected = {"conditional": 2.0, "unconditional": 0.5, "gap": 1.5, "guided": 0.5 + 7.5 * 1.5}
    for mode, factor in expected.items():
        torch.testing.assert_close(model.with_mode(mode).noise(x, t), factor * x)  # type: ignore[arg-type]
    torch.testing.assert_close(model.with_mode("guided", 2.0).noise(x, t), 3.5 * x)
    assert model.mode == "conditional"


def test_what_is_no_model_is_refused() -> None:
    def same(y: Tensor, *_: object) -> Tensor:
        return y

    with pytest.raises(InputError, match="prediction type 'x0'"):
        ScoreModel(same, LINEAR, (3,), "x0")
    with pytest.raises(ShapeError, match="positive"):
        ScoreModel(same, LINEAR, ())
    with pytest.raises(InputError, match="unconditional"):
        ScoreModel(same, LINEAR, (3,), mode="gap")
    with pytest.raises(InputError, match="mode"):
        ScoreModel(same, LINEAR, (3,)).with_mode("cfg")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="same shape"):
        p_laplace(ScoreModel(lambda y, *_: y[:, :2], LINEAR, (3,)), torch.zeros(1, 3), 5)
    for table in (torch.tensor([0.5, 0.9]), torch.tensor([1.5]), torch.zeros(0)):
        with pytest.raises(InputError):
            NoiseSchedule("steps", table)
    with pytest.raises(InputError):
        NoiseSchedule("steps")
    with pytest.raises(InputError, match="unknown schedule"):
        NoiseSchedule("cosine")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no image"):
        NoiseSchedule("steps", torch.tensor([0.9, 0.0])).level(1)
    for schedule, t in ((SIGMA, 0.0), (FLOW, 1.0), (FLOW, math.nan)):
        with pytest.raises(InputError):
            schedule.level(t)
