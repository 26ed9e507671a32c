"""Images whose class is something that we put there, and what maps find of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cmd_plugin.distinction.masks import mask_iou
from cmd_plugin.distinction.names import PLANT_NAMES
from cmd_plugin.errors import InputError, ShapeError
from cmd_plugin.kernels.counter_random import CounterRandom

__all__ = ["Recovery", "plant", "plant_recovery", "plant_remainder"]

_SIDE, _CROSS = 5, 0.8
_NOISE = 0.25
_TINT = 0.25
_PURPOSE = 0x504C4E54


def plant(images: Tensor, labels: Tensor, kind: str, seed: int = 0) -> Tensor:
    """Return what is added to the images of class 1: zeros for the others.

    ``cross``: a 5x5 X of +0.8 at a random place, which a heatmap can show. ``noise``: N(0, 0.25^2)
    everywhere, which none can. ``tint``: +0.25 of the first of three colours everywhere.

    Args:
        images: [N, C, H, W] in [-1, 1].
        labels: [N] int64, 0 or 1.
        kind: One of :data:`cmd_plugin.distinction.names.PLANT_NAMES`.
        seed: In [0, 2^63); an image's plant depends on it and on the image's number alone.

    Returns:
        [N, C, H, W]; the planted images are the sum, which may leave [-1, 1].

    Raises:
        InputError: If there is no such kind, or the images are too small or have no colour for it.
    """
    if kind not in PLANT_NAMES:
        raise InputError(f"unknown plant {kind!r}: choose one of {', '.join(PLANT_NAMES)}.")
    count, channels, height, width = images.shape
    if kind == "cross" and min(height, width) < _SIDE:
        raise InputError(f"a cross needs images of at least {_SIDE}x{_SIDE} pixels.")
    if kind == "tint" and channels != 3:
        raise InputError(f"a tint needs images with three colours, these have {channels} channels.")
    random = CounterRandom(seed, torch.arange(count), _PURPOSE)
    if kind == "tint":
        made = torch.zeros_like(images)
        made[:, 0] = _TINT
    elif kind == "noise":
        made = _NOISE * random.normal(channels * height * width).to(images.dtype)
        made = made.reshape(images.shape)
    else:
        made = _crosses(images, random)
    return made * (labels == 1).to(images.dtype)[:, None, None, None]


def _crosses(images: Tensor, random: CounterRandom) -> Tensor:
    height, width = images.shape[-2:]
    corner = torch.cat(
        [random.integers(1, height - _SIDE + 1), random.integers(1, width - _SIDE + 1)], dim=1
    )
    row, column = (
        torch.arange(size)[None] - corner[:, i : i + 1] for i, size in enumerate((height, width))
    )
    inside = [(place >= 0) & (place < _SIDE) for place in (row, column)]
    row, column = row[:, :, None], column[:, None, :]
    on = (row == column) | (row + column == _SIDE - 1)
    on = on & inside[0][:, :, None] & inside[1][:, None, :]
    return (_CROSS * on[:, None].to(images.dtype)).expand_as(images).clone()


class Recovery(NamedTuple):
    """How much of a plant a map holds: means over the images that have one.

    Attributes:
        ncc: Pearson correlation over pixels of the sizes of map and plant.
        signed: The same with their signs.
        iou: Overlap of the plant with as many of the map's largest pixels; see :func:`mask_iou`.
        cosine: Of the channels' means of the map with those of the plant: whether a colour is kept;
            of one channel it is a sign.
    """

    ncc: float
    signed: float
    iou: float
    cosine: float


def plant_recovery(maps: Tensor, plants: Tensor) -> Recovery:
    """Compare maps with what was planted.

    Args:
        maps: [N, C or 1, H, W].
        plants: [N, C, H, W]; images without one are left out.

    Raises:
        ShapeError: If the shapes do not fit.
        InputError: If no image has a plant.
    """
    found, planted = _planted(maps, plants)
    sizes = found.abs().mean(dim=1), planted.abs().mean(dim=1)
    colours = found.mean(dim=(2, 3)), planted.mean(dim=(2, 3))
    return Recovery(
        ncc=float(_pearson(*sizes).mean()),
        signed=float(_pearson(found, planted).mean()),
        iou=float(mask_iou(found, sizes[1] > 0).mean()),
        cosine=float(torch.cosine_similarity(*colours).mean()),
    )


def plant_remainder(part: Tensor, plants: Tensor) -> float:
    """How far images are from clean ones without a part, over how far they are with it.

    ``|x - part - clean|^2 / |x - clean|^2`` over the images that have a plant: 0 takes all of the
    plant and nothing else, 1 is as good as nothing. It depends on the part's scale, as it should.

    Args:
        part: What is taken away, [N, C or 1, H, W], in the units of the plants.
        plants: [N, C, H, W].

    Raises:
        ShapeError: If the shapes do not fit.
        InputError: If no image has a plant.
    """
    found, planted = _planted(part, plants)
    return float((found - planted).square().sum() / planted.square().sum())


def _planted(maps: Tensor, plants: Tensor) -> tuple[Tensor, Tensor]:
    """Maps and plants of the images that have one, in float64 and of one shape."""
    same = maps.shape[0] == plants.shape[0] and maps.shape[2:] == plants.shape[2:]
    if maps.ndim != 4 or not same or maps.shape[1] not in (1, plants.shape[1]):
        raise ShapeError(f"maps {tuple(maps.shape)} do not fit plants {tuple(plants.shape)}.")
    chosen = plants.flatten(1).any(dim=1)
    if not bool(chosen.any()):
        raise InputError("no image has a plant: there is nothing to recover.")
    planted = plants[chosen].double()
    return maps[chosen].double().expand_as(planted), planted


def _pearson(one: Tensor, other: Tensor) -> Tensor:
    """Correlation over all but the first dimension; 0 where one is constant."""
    a, b = (x.flatten(1) - x.flatten(1).mean(dim=1, keepdim=True) for x in (one, other))
    scale = a.norm(dim=1) * b.norm(dim=1)
    flat = scale <= 1e-9 * one.flatten(1).norm(dim=1) * other.flatten(1).norm(dim=1)
    return torch.where(flat, 0.0, (a * b).sum(dim=1) / scale.clamp_min(1e-300))
