"""Small generators, classifiers and images for the tests of class evidence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cmd_plugin.distinction.artefact import save_decomposer
from cmd_plugin.distinction.decomposition import Decomposer
from cmd_plugin.distinction.frozen import FrozenClassifier, PixelRange
from cmd_plugin.distinction.generator import BranchedGenerator
from cmd_plugin.jobs.distinction.data import load_split_data, pixel_range
from cmd_plugin.jobs.distinction.model import CLASSIFIER, EXPLAINER, JUDGE
from cmd_plugin.jobs.distinction.options import TrainOptions
from cmd_plugin.networks.named import build_model
from cmd_plugin.networks.weights import save_weights


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


def model_folder(folder: Path, **options: Any) -> TrainOptions:
    """Write what `distinction train` leaves, with networks that were never trained."""
    small: dict[str, Any] = {
        "train_limit": 60,
        "image_size": 8,
        "model": "cnn:4",
        "judge": "cnn:4",
        "width": 4,
        "branches": 2,
        "threads": 1,
    }
    given = TrainOptions(**{**small, **options})
    data = load_split_data(given)
    shape: dict[str, Any] = {
        "channels": data.channels,
        "classes": len(data.classes),
        "size": data.size,
    }
    folder.mkdir(parents=True, exist_ok=True)
    networks = {}
    for number, (name, place) in enumerate(((given.model, CLASSIFIER), (given.judge, JUDGE))):
        torch.manual_seed(number)
        networks[place] = build_model(name, **shape).eval()
        save_weights(folder / place, networks[place].state_dict())
    torch.manual_seed(2)
    net = BranchedGenerator(data.channels, len(data.classes), given.branches, given.width, levels=1)
    explained = None if given.objective == "distinction" else networks[CLASSIFIER]
    frozen = None if explained is None else FrozenClassifier(explained)
    about = {"classes": list(data.classes), "channels": data.channels, "size": list(data.size)}
    about |= {"mean": data.mean.tolist(), "std": data.std.tolist()}
    save_decomposer(
        folder / EXPLAINER, Decomposer(net, pixel_range(data.mean, data.std), frozen), about
    )
    content = {"job": "distinction train", "options": given.as_dict(), "files": []}
    empty: dict[str, Any] = {name: {} for name in ("data", "metrics", "machine", "seconds")}
    (folder / "result.json").write_text(json.dumps({**content, **empty}), encoding="utf-8")
    return given
