"""The memorisation score and its controls, against calculations by hand and planted duplicates."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cmd_plugin.diffusion import (
    MemorizationReport,
    MemorizationScore,
    PixelCodec,
    ScoreModel,
    p_laplace,
    separate,
    sphere_directions,
)
from cmd_plugin.errors import InputError, NonFiniteError, ShapeError, StateMismatch
from tests.helpers.diffusion_toys import F64, LINEAR, gaussian, network_model, smooth_network


def test_every_statistic_is_what_its_name_says() -> None:
    d, t = 6, 300
    network = smooth_network(d)
    model = network_model(network, d)
    images = torch.rand(3, d) * 2 - 1
    report = MemorizationScore(model, t, (1, 2), directions=8, probes=4)(images)
    assert list(report.values) == ["p1", "p2", "mse", "centre_norm", "sharpness", "flipd"]
    a, s = LINEAR.level(t)
    u = sphere_directions((d,), 8).float()
    for n, image in enumerate(images):
        e = network(a * image + s * u).detach()
        cosine = (e * u).sum(1) / (e.norm(dim=1) * u.norm(dim=1))
        expected = {
            "p1": cosine.mean(),
            "p2": (e * u).sum(1).mean() / d,
            "mse": (e - u).square().mean(),
            "centre_norm": network(a * image).detach().norm() / math.sqrt(d),
        }
        sharp = []
        for direction in u[:2]:
            jacobian = torch.autograd.functional.jacobian(network, a * image + s * direction)
            estimate = network(a * image + s * direction).detach()
            sharp.append(s * (jacobian.T @ estimate).norm() / math.sqrt(d))
        expected["sharpness"] = torch.stack(sharp).mean()
        signs = torch.randint(2, (4, d), generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
        jacobian = torch.autograd.functional.jacobian(network, a * image)
        trace = torch.einsum("pi,ij,pj->p", signs, jacobian, signs).mean()
        expected["flipd"] = d - s * trace + network(a * image).detach().square().sum()
        for name, value in expected.items():
            assert float(report.values[name][n, 0]) == pytest.approx(float(value), rel=1e-4), name


def test_evidence_is_larger_where_an_image_is_memorised() -> None:
    d = 12
    known = torch.rand(30, d, dtype=F64) * 2 - 1
    model = ScoreModel.from_data(known, LINEAR)
    score = MemorizationScore(model, (50, 200))
    members, others = score(known[:10]), score(torch.rand(10, d, dtype=F64) * 2 - 1)
    found = separate(others, members)
    for name in ("p1", "p2", "mse", "centre_norm"):
        assert found["auroc"][name][0] == 1.0, name
        assert found["tpr_at_1_fpr"][name][0] == 1.0, name
    assert float(members.values["p1"][:, 0].min()) > 0.999
    assert members.features().shape == (10, 12)


def test_two_halves_of_the_same_images_are_not_told_apart() -> None:
    d, n = 8, 150
    model = gaussian(torch.zeros(d), torch.full((d,), 0.2))
    images = 0.4 * torch.randn(2 * n, d)
    score = MemorizationScore(model, 100, controls=("mse", "centre_norm"))
    found = separate(score(images[:n]), score(images[n:]))["auroc"]
    error = math.sqrt((2 * n + 1) / (12 * n * n))
    for name, values in found.items():
        assert abs(values[0] - 0.5) < 3 * error, name


def test_a_gap_is_looked_at_only_where_there_is_one() -> None:
    d = 5
    network = smooth_network(d)

    def predict(y: Tensor, _: Tensor, c: Tensor | None) -> Tensor:
        assert c is not None
        return network(y) + c

    condition, nothing = torch.randn(1, d), torch.zeros(1, d)
    both = ScoreModel(
        predict,
        LINEAR,
        (d,),
        networks=[network],
        condition=condition,
        unconditional=nothing,
        mode="gap",
    )
    image = torch.randn(2, d)
    report = MemorizationScore(both, 100, directions=4)(image)
    expected = condition.norm() / math.sqrt(d)
    assert report.values["gap_norm"].flatten().tolist() == pytest.approx([float(expected)] * 2)
    # The same gap everywhere: no flux of the gap, and a loss that is the conditional model's.
    assert float(report.values["p1"].abs().max()) < 1e-6
    assert float(report.values["sharpness"].max()) < 1e-6
    alone = p_laplace(both.with_mode("conditional"), image, 100, directions=4)
    torch.testing.assert_close(report.values["mse"], alone.squared_error.mean(2))
    assert "gap_norm" not in MemorizationScore(network_model(network, d), 100).controls


def test_reports_of_parts_join_to_that_of_the_whole() -> None:
    d = 4
    score = MemorizationScore(network_model(smooth_network(d), d), (10, 100), batch_size=5)
    images = torch.randn(5, d)
    whole = score(images)
    joined = MemorizationReport.join([score(images[:2]), score(images[2:])])
    assert len(joined) == 5
    for name, value in whole.values.items():
        torch.testing.assert_close(joined.values[name], value, rtol=1e-5, atol=1e-5)
    with pytest.raises(StateMismatch):
        MemorizationReport.join([whole, MemorizationScore(score.model, 10)(images)])
    with pytest.raises(InputError, match="no report"):
        MemorizationReport.join([])


def test_what_cannot_be_scored_is_refused() -> None:
    model = network_model(smooth_network(4), 4)
    with pytest.raises(InputError, match="controls"):
        MemorizationScore(model, controls=("loss",))
    with pytest.raises(InputError, match="training step"):
        MemorizationScore(model, 2000)
    score = MemorizationScore(model, codec=PixelCodec())
    with pytest.raises(InputError, match=r"\[-1, 1\]"):
        score(torch.full((1, 4), 3.0))
    with pytest.raises(ShapeError, match="resize"):
        score(torch.zeros(1, 5))
    with pytest.raises(NonFiniteError):
        score(torch.full((1, 4), math.nan))


class Denoiser(nn.Module):
    """A small MLP with a time embedding and an input skip."""

    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        self.frequencies = nn.Buffer(2.0 ** torch.arange(8) * math.pi / 1000, persistent=False)
        self.net = nn.Sequential(
            nn.Linear(d + 16, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, d),
        )  # fmt: skip
        self.skip = nn.Linear(d, d)

    def forward(self, y: Tensor, t: Tensor) -> Tensor:
        phase = t.to(y)[:, None] * self.frequencies
        return self.net(torch.cat([y, phase.sin(), phase.cos()], 1)) + self.skip(y)


@pytest.mark.slow
def test_planted_duplicates_are_found_and_held_out_images_are_not() -> None:
    from sklearn.datasets import load_digits

    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    digits = (torch.from_numpy(load_digits().data).float() / 8 - 1)[order]
    planted, singles, held_out = digits[:20], digits[20:420], digits[420:820]
    data = torch.cat([planted.repeat(16, 1), singles])
    torch.manual_seed(0)
    network: Any = Denoiser(64, 256)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, 1500)
    kept = LINEAR.alphas_cumprod
    assert kept is not None
    for _ in range(1500):
        x = data[torch.randint(len(data), (96,))]
        t, e = torch.randint(1000, (96,)), torch.randn(96, 64)
        a = kept[t].float()[:, None]
        loss = (network(a.sqrt() * x + (1 - a).sqrt() * e, t) - e).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model = ScoreModel(lambda y, t, _: network(y, t), LINEAR, (64,), networks=[network])
    score = MemorizationScore(model, (25, 50), controls=("mse", "centre_norm"))
    inside, outside = score(planted), score(held_out)
    found = separate(outside, inside)["auroc"]
    assert found["p1"][0] > 0.95
    assert found["mse"][0] > 0.95
    halves = separate(score(held_out[::2]), score(held_out[1::2]))["auroc"]
    error = math.sqrt(401 / (12 * 200 * 200))
    assert abs(halves["p1"][0] - 0.5) < 3 * error
