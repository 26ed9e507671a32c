"""The images of a decomposition: a data set's own classes, some of them, or planted ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cmd_plugin.data.datasets import ImageData, load_dataset
from cmd_plugin.data.images import ImageStore, LabelledImages, MemoryImages, channel_statistics
from cmd_plugin.distinction.frozen import PixelRange
from cmd_plugin.distinction.plants import plant
from cmd_plugin.errors import InputError
from cmd_plugin.jobs.distinction.options import TrainOptions
from cmd_plugin.kernels.counter_random import CounterRandom, derived_seed

__all__ = ["SplitData", "find_class", "load_split_data", "pixel_range"]

_LABELS = 0x4C424C53


@dataclass(frozen=True)
class SplitData:
    """Images to train and to measure on, as the classifier takes them.

    Attributes:
        name: Of the data set.
        train: Normalised by :attr:`mean` and :attr:`std`.
        test: Held-out ones, normalised alike.
        classes: Name of each class.
        channels: 1 or 3.
        size: Height and width.
        mean: Of each channel, of training images in [0, 1].
        std: Of each channel.
        plants: What was added to the held-out images, in [-1, 1] units; None if nothing.
    """

    name: str
    train: LabelledImages
    test: LabelledImages
    classes: tuple[str, ...]
    channels: int
    size: tuple[int, int]
    mean: Tensor
    std: Tensor
    plants: Tensor | None


def load_split_data(options: TrainOptions, data_root: str | None = None) -> SplitData:
    """Load the images that options name; the same for the same options.

    Args:
        options: What to load.
        data_root: Where it lies, if not where the options say.

    Raises:
        InputError: If the data cannot be used, or a class does not exist.
    """
    data = load_dataset(
        options.data,
        data_root=data_root or options.data_root,
        seed=options.seed,
        train_limit=options.train_limit,
        image_size=options.size,
    )
    parts: list[tuple[ImageStore, Tensor]] = []
    for part in (data.train, data.test):
        assert isinstance(part, LabelledImages)
        parts.append((part.store, part.labels))
    classes, plants = data.classes, None
    if options.planted is not None or options.random_labels:
        classes = ("without", "with") if options.planted else ("heads", "tails")
        drawn = [_drawn(part, options, number) for number, (part, _) in enumerate(parts)]
        parts = [(store, labels) for store, labels, _ in drawn]
        plants = drawn[1][2] if options.planted else None
    elif options.pick:
        chosen = [find_class(name, classes, "--pick") for name in options.pick]
        classes = tuple(classes[label] for label in chosen)
        parts = [_picked(store, labels, chosen) for store, labels in parts]
    return _normalised(data, parts, classes, plants)


def pixel_range(mean: Tensor, std: Tensor) -> PixelRange:
    """What black and white are in images normalised by mean and deviation."""
    return PixelRange((-mean / std).tolist(), ((1.0 - mean) / std).tolist())


def find_class(name: str, classes: tuple[str, ...], option: str) -> int:
    """Return the number of a class that is given by its name or number.

    Raises:
        InputError: If there is none.
    """
    if name in classes:
        return classes.index(name)
    if name.isdecimal() and len(name) < 7 and int(name) < len(classes):
        return int(name)
    raise InputError(
        f"{option} {name} is none of the {len(classes)} classes: give a name ({classes[0]}, ...) "
        "or a number from 0."
    )


def _drawn(
    store: ImageStore, options: TrainOptions, part: int
) -> tuple[ImageStore, Tensor, Tensor]:
    """Images with labels drawn at random, what is planted in place, and the plants."""
    images = 2.0 * store.read(torch.arange(len(store))) - 1.0
    if options.planted == "tint" and images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1).contiguous()
    seed = derived_seed(options.seed, part)
    coins = CounterRandom(seed, torch.arange(len(images)), _LABELS).uniform(1)
    labels = (coins[:, 0] < 0.5).long()
    if options.planted is None:
        return MemoryImages(0.5 * (images + 1.0)), labels, torch.zeros_like(images)
    plants = plant(images, labels, options.planted, seed)
    return MemoryImages(0.5 * (images + plants + 1.0)), labels, plants


def _picked(store: ImageStore, labels: Tensor, chosen: list[int]) -> tuple[ImageStore, Tensor]:
    where = torch.isin(labels, torch.tensor(chosen)).nonzero().flatten()
    numbers = {label: number for number, label in enumerate(chosen)}
    return store.select(where), torch.tensor([numbers[int(x)] for x in labels[where]])


def _normalised(
    data: ImageData,
    parts: list[tuple[ImageStore, Tensor]],
    classes: tuple[str, ...],
    plants: Tensor | None,
) -> SplitData:
    mean, std = channel_statistics(parts[0][0])
    train, test = (LabelledImages(store, labels, mean, std) for store, labels in parts)
    return SplitData(data.name, train, test, classes, len(mean), data.size, mean, std, plants)
