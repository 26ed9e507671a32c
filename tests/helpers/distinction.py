"""Small generators, classifiers and images for the tests of class evidence."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cmd_plugin.distinction.decomposition import Decomposer
from cmd_plugin.distinction.frozen import FrozenClassifier, PixelRange
from cmd_plugin.distinction.generator import BranchedGenerator


def images(count: int = 4, channels: int = 1, size: int = 8, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return 2.0 * torch.rand(count, channels, size, size, generator=draw) - 1.0


def generator(channels: int = 1, classes: int = 2, branches: int = 3) -> BranchedGenerator:
    torch.manual_seed(0)
    return BranchedGenerator(channels, classes, branches, width=4, levels=2)


class Linear(nn.Module):
    """Two classes, told apart by the sum of some pixels; its buffers would change in training."""

    def __init__(self, weight: Tensor, bias: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        score = (x * self.weight).flatten(1).sum(dim=1) + self.bias
        return torch.stack([-score, score], dim=1)


def conv_net(channels: int = 1, classes: int = 2) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, classes),
    )


def decomposer(channels: int = 1, classes: int = 2, low: float = -1.0) -> Decomposer:
    return Decomposer(
        generator(channels, classes),
        PixelRange(low, 1.0),
        FrozenClassifier(conv_net(channels, classes)),
    )
