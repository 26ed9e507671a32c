"""The generator of both methods: n small U-Nets side by side, whose outputs add up to the image.

After the DXAI paper (arXiv 2401.00320) and *Additive Class Distinction Maps using Branched-GANs*
(arXiv 2305.02899), with other choices where theirs stand in the way: no normalisation at the input
and none at the head, so that colour and contrast reach the output and a branch can be empty; a skip
connection at full resolution; and the encoder, which knows of no class, runs once for all classes.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, leaky_relu, pad
from typing_extensions import override

from cmd_plugin.distinction.codes import ClassCodes, NoisyCodes
from cmd_plugin.errors import InputError, ShapeError

__all__ = ["BranchedGenerator", "Features"]

_CODE = 16  # numbers that describe a class
_WIDEST = 8  # a branch has at most so many times its first width
_SLOPE = 0.2
_HEAD_STD = 0.02
_MOST = 4096  # of anything that is counted: a damaged file shall not fill the memory


class Features(NamedTuple):
    """What the encoder knows of images.

    Attributes:
        maps: One tensor a resolution, the finest first.
        size: Height and width of the images, to which the branches are cut.
    """

    maps: tuple[Tensor, ...]
    size: tuple[int, int]


class BranchedGenerator(nn.Module):
    """Decomposes images into branches: the first is what speaks for a class, the others are not.

    The branches share nothing but the image and the code of the class; they run as grouped
    convolutions. What they add up to is trained to be the image.

    Args:
        channels: Of the images.
        classes: Number of classes k.
        branches: Number of branches n, at least 2.
        width: Channels of a branch at full resolution; a multiple of 8 is fast.
        levels: How often the resolution is halved: 2 up to 32 pixels, 3 for 64, 4 for 128.
        noise: Numbers of noise that the code of a class is made of as well, as in the papers; 0 has
            one code a class.

    Raises:
        InputError: If a number is out of range.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        branches: int = 3,
        width: int = 8,
        levels: int = 2,
        noise: int = 0,
    ) -> None:
        super().__init__()
        bounds = {"channels": 1, "classes": 2, "branches": 2, "width": 1, "levels": 1, "noise": 0}
        self.settings = {
            "channels": channels,
            "classes": classes,
            "branches": branches,
            "width": width,
            "levels": levels,
            "noise": noise,
        }
        for name, least in bounds.items():
            if not least <= self.settings[name] <= _MOST:
                raise InputError(
                    f"{name} must be from {least} to {_MOST}, got {self.settings[name]}."
                )
        self.channels, self.classes, self.branches = channels, classes, branches
        self.levels = levels
        widths = [width * min(2**level, _WIDEST) for level in range(levels + 1)]
        # The image is the same for all branches, so their first layer needs no groups.
        self.stem = nn.Conv2d(channels, branches * width, 3, padding=1)
        # Detail is recognised before it is averaged: without this block a pattern of single pixels
        # is found late in the training, and where strokes cross it not at all.
        self.flat = _Block(branches, width, width)
        self.down = nn.ModuleList(
            _Block(branches, first, second) for first, second in pairwise(widths)
        )
        self.codes: ClassCodes | NoisyCodes
        self.codes = NoisyCodes(classes, _CODE, noise) if noise else ClassCodes(classes, _CODE)
        self.middle = _Block(branches, widths[-1], widths[-1], styled=True)
        self.up = nn.ModuleList(
            _Block(branches, deep + flat, flat, styled=True)
            for flat, deep in reversed([*pairwise(widths)])
        )
        self.head = nn.Conv2d(branches * width, branches * channels, 1, groups=branches)
        nn.init.normal_(self.head.weight, std=_HEAD_STD)
        assert self.head.bias is not None
        nn.init.zeros_(self.head.bias)

    @override
    def forward(self, images: Tensor, classes: Tensor) -> Tensor:
        """Return the branches for a class of each image.

        Args:
            images: [B, C, H, W], around [-1, 1], of any height and width.
            classes: [B] int64.

        Returns:
            [B, n, C, H, W].

        Raises:
            ShapeError: If the shapes do not fit.
        """
        return self.decode(self.encode(images), classes)

    def encode(self, images: Tensor) -> Features:
        """Return what :meth:`decode` needs of images, whatever the class.

        Raises:
            ShapeError: If the images are not [B, C, H, W].
        """
        if images.ndim != 4 or images.shape[1] != self.channels:
            raise ShapeError(
                f"images must be [B, {self.channels}, H, W], got {tuple(images.shape)}."
            )
        height, width = images.shape[-2:]
        step = 2**self.levels
        grown = pad(images, (0, -width % step, 0, -height % step), mode="replicate")
        features = [self.flat(self.stem(grown))]
        for block in self.down:
            features.append(block(_halved(features[-1])))
        return Features(tuple(features), (height, width))

    def decode(self, features: Features, classes: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the branches, [B, n, C, H, W], for a class of each image.

        Args:
            features: Of :meth:`encode`.
            classes: [B] int64.
            noise: [B, noise], of a generator that takes some; by default the same for all images.

        Raises:
            ShapeError: If there is not one class for each image.
        """
        *flat, deepest = features.maps
        if classes.shape != deepest.shape[:1]:
            raise ShapeError(
                f"classes must be [{len(deepest)}], one of each image, got {tuple(classes.shape)}."
            )
        codes = self.codes(classes, noise)
        x: Tensor = self.middle(deepest, codes)
        for block in self.up:
            x = block(self._joined(_doubled(x), flat.pop()), codes)
        x = self.head(leaky_relu(x, _SLOPE))
        height, width = features.size
        x = x.reshape(len(x), self.branches, self.channels, *x.shape[-2:])
        return x[..., :height, :width]

    def _joined(self, deep: Tensor, flat: Tensor) -> Tensor:
        """Both, with the channels of each branch side by side."""
        parts = [x.reshape(len(x), self.branches, -1, *x.shape[-2:]) for x in (deep, flat)]
        return torch.cat(parts, dim=2).flatten(1, 2)


class _Block(nn.Module):
    """Two convolutions with normalisation inside and a way around them, in every branch.

    Args:
        branches: n; branch i has the channels i * w to (i + 1) * w.
        inputs: Channels of a branch.
        outputs: Channels of a branch.
        styled: Whether the code of a class scales and shifts the features.
    """

    def __init__(self, branches: int, inputs: int, outputs: int, *, styled: bool = False) -> None:
        super().__init__()
        grouped: dict[str, Any] = {"groups": branches}
        self.norm1 = nn.GroupNorm(branches, branches * inputs)
        self.conv1 = nn.Conv2d(branches * inputs, branches * outputs, 3, padding=1, **grouped)
        self.norm2 = nn.GroupNorm(branches, branches * outputs)
        self.conv2 = nn.Conv2d(branches * outputs, branches * outputs, 3, padding=1, **grouped)
        self.around = nn.Conv2d(branches * inputs, branches * outputs, 1, **grouped)
        self.style = nn.Linear(_CODE, 2 * branches * outputs) if styled else None

    @override
    def forward(self, x: Tensor, codes: Tensor | None = None) -> Tensor:
        inner = self.conv1(leaky_relu(self.norm1(x), _SLOPE))
        inner = self.norm2(inner)
        if self.style is not None:
            scale, shift = self.style(codes)[:, :, None, None].chunk(2, dim=1)
            inner = (1.0 + scale) * inner + shift
        inner = self.conv2(leaky_relu(inner, _SLOPE))
        total: Tensor = inner + self.around(x)
        return total / math.sqrt(2.0)


def _halved(x: Tensor) -> Tensor:
    return avg_pool2d(x, 2)  # of an area, interpolate has no deterministic gradient on a GPU


def _doubled(x: Tensor) -> Tensor:
    return interpolate(x, scale_factor=2.0, mode="nearest")
