"""The small training problems on which ways to choose weights are compared, and their score."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cmd_plugin.data import load_dataset

__all__ = ["CASES", "QUICK", "Case", "Problem", "batches", "load", "score"]

_TEST_LIMIT = 2000


@dataclass(frozen=True)
class Case:
    """One training problem."""

    data: str
    train_limit: int | None
    label_noise: float
    epochs: int
    warmup: int
    batch_size: int
    rate: float
    width: int


CASES = (
    Case("digits", None, 0.2, 60, 20, 64, 0.05, 16),
    Case("mnist", 1000, 0.2, 40, 13, 64, 0.05, 8),
    Case("cifar10", 2000, 0.0, 40, 13, 64, 0.05, 8),
)
QUICK = (Case("digits", None, 0.2, 30, 10, 64, 0.05, 16),)


@dataclass(frozen=True)
class Problem:
    """The images of a case, for one seed.

    Attributes:
        name: The data set as it was found, ``cifar10-jpeg`` for the lossy copy.
        channels: Image channels.
        classes: Number of classes.
        images: [N, channels, H, W] float32 for training, mixed.
        labels: [N] int64.
        test: Held-out images and labels, mixed.
    """

    name: str
    channels: int
    classes: int
    images: Tensor
    labels: Tensor
    test: tuple[Tensor, Tensor]


def load(case: Case, seed: int, data_root: str | None) -> Problem:
    """Read a case's data; split, subset and label noise depend on the seed."""
    data = load_dataset(
        case.data,
        data_root=data_root,
        label_noise=case.label_noise,
        train_limit=case.train_limit,
        seed=seed,
    )
    train, test = data.train, data.test
    images, labels = _read(train, torch.arange(len(train)))
    # Image folders come sorted by class, and a batch of one class has no representative statistics.
    mixed = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    # One fixed random part of a large test set: dozens of variants are evaluated in every run.
    part = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:_TEST_LIMIT]
    return Problem(
        data.name,
        data.channels,
        len(data.classes),
        images[mixed],
        labels[mixed],
        _read(test, part),
    )


def _read(dataset: Any, indices: Tensor) -> tuple[Tensor, Tensor]:
    images, labels = dataset.__getitems__(indices.tolist())
    return images, labels


def batches(pair: tuple[Tensor, Tensor], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of images and labels in order."""
    yield from zip(pair[0].split(size), pair[1].split(size), strict=True)


@torch.no_grad()
def score(model: nn.Module, test: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Return (accuracy in [0, 1], mean cross-entropy) in the mode the model is in."""
    right = loss = 0.0
    count = 0
    for images, labels in test:
        logits = model(images).float()
        right = right + (logits.argmax(1) == labels).sum()
        loss = loss + cross_entropy(logits, labels, reduction="sum")
        count += len(labels)
    return float(right) / count, float(loss) / count
