"""Which images a diffusion model trains on, how often, and which are held out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cmd_plugin.data import LabelledImages, load_dataset
from cmd_plugin.diffusion import ProbeSet, parse_doses, plant_duplicates
from cmd_plugin.errors import InputError
from cmd_plugin.jobs.diffusion.options import TrainOptions

__all__ = ["PlantedData", "load_planted"]

_MOST_SINGLES = 200  # that are watched, of all that are trained on once


class PlantedData(NamedTuple):
    """Images to train on, and images to watch.

    Attributes:
        name: Of the data set.
        train: Training images in [-1, 1], duplicates as often as planted.
        probes: All planted images, some of the others, and images held out.
        shape: (channels, height, width) of an image.
        images: Number of different training images.
    """

    name: str
    train: LabelledImages
    probes: ProbeSet
    shape: tuple[int, int, int]
    images: int


def load_planted(options: TrainOptions) -> PlantedData:
    """Choose training images, plant duplicates, and hold others out.

    Held out is what is left of the training set, which is closest to what was trained on; where
    less than 50 are left, of the data set's own held-out images.

    Raises:
        InputError: If the data cannot be used, or does not hold as many images.
    """
    data = load_dataset(
        options.data, data_root=options.data_root, image_size=options.image_size, seed=options.seed
    )
    train, test = data.train, data.test
    assert isinstance(train, LabelledImages)
    assert isinstance(test, LabelledImages)
    plan = parse_doses(options.duplicate)
    singles = options.singles
    if singles is not None:
        singles = min(singles, len(train) - sum(plan.values()))
        if singles < 1:
            raise InputError(
                f"{data.name} has {len(train)} training images, too few for --duplicate "
                f"{options.duplicate}: plant fewer."
            )
    chosen, doses = plant_duplicates(len(train), plan, singles, options.seed)
    left = torch.ones(len(train), dtype=torch.bool)
    left[chosen] = False
    others, store = left.nonzero().flatten(), train.store
    if len(others) < 50:
        others, store = torch.arange(len(test)), test.store
    generator = torch.Generator().manual_seed(options.seed)
    others = others[torch.randperm(len(others), generator=generator)[: options.held_out]]
    planted = int((doses > 1).sum())
    watched = chosen[: planted + _MOST_SINGLES]
    probes = ProbeSet(
        _centred(train.store.read(watched)), _centred(store.read(others)), doses[: len(watched)]
    )
    rows = chosen.repeat_interleave(doses)
    half = torch.full((data.channels,), 0.5)
    return PlantedData(
        data.name,
        LabelledImages(train.store.select(rows), train.labels[rows], half, half),
        probes,
        (data.channels, *data.size),
        len(chosen),
    )


def _centred(images: Tensor) -> Tensor:
    """From [0, 1] to [-1, 1]."""
    return images * 2.0 - 1.0
