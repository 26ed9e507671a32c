"""Models whose noise estimate is known, for the tests of the diffusion room."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cmd_plugin.diffusion import NoiseSchedule, ScoreModel

F64 = torch.float64
LINEAR = NoiseSchedule.linear()


def gaussian(mean: Tensor, variances: Tensor, schedule: NoiseSchedule = LINEAR) -> ScoreModel:
    """Data N(mean, diag variances)."""
    weight = torch.ones(1, dtype=mean.dtype)
    return ScoreModel.from_mixture(weight, mean[None], variances[None], schedule)


def data_level(noise: float = 1e-4) -> tuple[NoiseSchedule, float, float]:
    """A schedule, a time so early that noised data is data, and the s of that time."""
    schedule = NoiseSchedule("sigma")
    return schedule, noise, schedule.level(noise)[1]


def circle(count: int) -> Tensor:
    """Evenly spaced directions of length sqrt(2) in the plane, opposite ones side by side."""
    angle = torch.arange(count // 2, dtype=F64) * (2.0 * math.pi / count)
    half = torch.stack([angle.cos(), angle.sin()], 1) * math.sqrt(2.0)
    return torch.stack([half, -half], 1).reshape(count, 2)


def smooth_network(d: int, seed: int = 0) -> torch.nn.Module:
    """A small random network of flat images; smooth, so that derivatives can be checked."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(d, 32), torch.nn.Tanh(), torch.nn.Linear(32, d)
    ).eval()


def network_model(network: torch.nn.Module, d: int, schedule: NoiseSchedule = LINEAR) -> ScoreModel:
    """A network that does not look at the time."""
    return ScoreModel(lambda y, *_: network(y), schedule, (d,), networks=[network])
