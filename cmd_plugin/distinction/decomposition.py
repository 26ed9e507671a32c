"""An image as a sum: what speaks for a class, and the rest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softmax

from cmd_plugin.distinction.frozen import FrozenClassifier, PixelRange
from cmd_plugin.distinction.generator import BranchedGenerator
from cmd_plugin.errors import InputError, NonFiniteError, ShapeError
from cmd_plugin.networks.measuring import undisturbed

__all__ = ["Decomposer", "Decomposition", "decompose", "distinct_of_every_class"]

_AT_ONCE = 256  # images, if nobody says
_LABELS = (torch.int64, torch.int32, torch.int16, torch.uint8)


class Decomposer(nn.Module):
    """A trained generator with the classifier it explains: what :func:`decompose` needs.

    Args:
        generator: Works on images in [-1, 1].
        pixels: What black and white are in the images that are decomposed.
        classifier: The classifier, or None if the branches tell the data's classes apart.
    """

    def __init__(
        self,
        generator: BranchedGenerator,
        pixels: PixelRange,
        classifier: FrozenClassifier | None = None,
    ) -> None:
        super().__init__()
        self.generator, self.pixels, self.classifier = generator, pixels, classifier

    def branches(self, images: Tensor, classes: Tensor) -> Tensor:
        """Return [B, n, C, H, W] in the units of the images; mid-grey is part of the last branch.

        Args:
            images: [B, C, H, W].
            classes: [B] int64.
        """
        made = self.generator(self.pixels.to_unit(images), classes)
        return self.in_units(made)

    def in_units(self, made: Tensor) -> Tensor:
        """The generator's branches [B, n, C, H, W] in the units of the images."""
        scaled = made * self.pixels.half_width
        return torch.cat([scaled[:, :-1], scaled[:, -1:] + self.pixels.middle], dim=1)

    def logits(self, images: Tensor) -> Tensor:
        """The classifier's logits [B, k].

        Raises:
            InputError: If there is no classifier.
        """
        if self.classifier is None:
            raise InputError(
                "no classifier is explained here, so there is no prediction: give target, the "
                "class to decompose for."
            )
        logits: Tensor = self.classifier(images)
        return logits


@dataclass(frozen=True)
class Decomposition:
    """Images as sums; everything has the images' units, dtype and device.

    ``distinct + agnostic`` and ``branches.sum(1) + residual`` are the image to round-off.

    Attributes:
        distinct: What speaks for the target class, [B, C, H, W].
        agnostic: The image without it, [B, C, H, W].
        branches: [B, n, C, H, W]; the first is ``distinct``.
        residual: What the branches do not add up to, [B, C, H, W].
        target: The class of each image, [B] int64.
        before: The classifier's probability of the target on the image, [B]; None without one.
        after: The same on ``agnostic``.
    """

    distinct: Tensor
    agnostic: Tensor
    branches: Tensor
    residual: Tensor
    target: Tensor
    before: Tensor | None
    after: Tensor | None

    @property
    def reconstruction(self) -> Tensor:
        """What the branches add up to, [B, C, H, W]."""
        return self.branches.sum(dim=1)


def decompose(
    decomposer: Decomposer,
    images: Tensor,
    target: int | list[int] | Tensor | None = None,
    *,
    internal_batch_size: int | None = None,
) -> Decomposition:
    """Split images into what speaks for a class and the rest, by one pass of the generator.

    Args:
        decomposer: A trained one; left exactly as it was, as is its classifier.
        images: [B, C, H, W] floating point, as the classifier takes them.
        target: The class, for all images or for each; by default the classifier's own answer.
        internal_batch_size: Images at a time, for the memory's sake; by default 256.

    Raises:
        ShapeError: If images or target have another shape or dtype.
        NonFiniteError: If the images hold NaN or infinite values.
        InputError: If a class does not exist, or none is given and there is no classifier.
    """
    _check(decomposer, images)
    with undisturbed(decomposer):
        parts = [
            _decompose(decomposer, part, chosen)
            for part, chosen in _parts(decomposer, images, target, internal_batch_size)
        ]
    if len(parts) == 1:
        return parts[0]
    joined: dict[str, Any] = {}
    for name in vars(parts[0]):
        pieces = [getattr(part, name) for part in parts]
        joined[name] = None if pieces[0] is None else torch.cat(pieces)
    return Decomposition(**joined)


def distinct_of_every_class(
    decomposer: Decomposer, images: Tensor, *, internal_batch_size: int | None = None
) -> Tensor:
    """Return what speaks for each of the k classes, [B, k, C, H, W]; the encoder runs once.

    Args:
        decomposer: A trained one.
        images: [B, C, H, W].
        internal_batch_size: Images at a time.

    Raises:
        ShapeError: If the images have another shape or dtype.
        NonFiniteError: If they hold NaN or infinite values.
    """
    _check(decomposer, images)
    generator, found = decomposer.generator, []
    with undisturbed(decomposer):
        for part in torch.split(images, _batch(internal_batch_size)):
            features = generator.encode(decomposer.pixels.to_unit(part.to(_dtype(decomposer))))
            rows = [
                decomposer.in_units(
                    generator.decode(features, torch.full((len(part),), label, device=part.device))
                )[:, 0]
                for label in range(generator.classes)
            ]
            found.append(torch.stack(rows, dim=1).to(images.dtype))
    return torch.cat(found)


def _decompose(decomposer: Decomposer, images: Tensor, target: Tensor | None) -> Decomposition:
    plain = images.to(_dtype(decomposer))
    logits = None if decomposer.classifier is None else decomposer.logits(plain)
    if target is None:
        target = decomposer.logits(plain).argmax(dim=1) if logits is None else logits.argmax(dim=1)
    branches = decomposer.branches(plain, target).to(images.dtype)
    distinct = branches[:, 0]
    agnostic = images - distinct
    before = after = None
    if logits is not None:
        before = _probability(logits, target).to(images.dtype)
        after = _probability(decomposer.logits(agnostic.to(plain.dtype)), target).to(images.dtype)
    residual = images - branches.sum(dim=1)
    return Decomposition(distinct, agnostic, branches, residual, target, before, after)


def _probability(logits: Tensor, target: Tensor) -> Tensor:
    return softmax(logits.float(), dim=1).gather(1, target[:, None])[:, 0]


def _check(decomposer: Decomposer, images: Tensor) -> None:
    channels = decomposer.generator.channels
    if images.ndim != 4 or images.shape[1] != channels or not images.is_floating_point():
        raise ShapeError(
            f"images must be floating point of shape [B, {channels}, H, W], got {images.dtype} "
            f"{tuple(images.shape)}."
        )
    if images.numel() == 0:
        raise ShapeError(f"there is nothing to decompose: images are {tuple(images.shape)}.")
    bad = int((~images.isfinite()).flatten(1).any(dim=1).sum())
    if bad:
        raise NonFiniteError(f"{bad} of {len(images)} images hold NaN or infinite values.")


def _parts(
    decomposer: Decomposer,
    images: Tensor,
    target: int | list[int] | Tensor | None,
    size: int | None,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    count, batch = len(images), _batch(size)
    if target is None:
        for part in torch.split(images, batch):
            yield part, None
        return
    labels = torch.as_tensor(target, device=images.device)
    if labels.numel() == 1:
        labels = labels.reshape(1).expand(count)
    if labels.shape != (count,) or labels.dtype not in _LABELS:
        raise ShapeError(
            f"target must be a whole number or one for each of the {count} images, got "
            f"{labels.dtype} {tuple(labels.shape)}."
        )
    classes = decomposer.generator.classes
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise InputError(f"target must be from 0 to {classes - 1}, got {target}.")
    parts = torch.split(images, batch), torch.split(labels.long(), batch)
    yield from zip(*parts, strict=True)


def _batch(size: int | None) -> int:
    if size is not None and size < 1:
        raise InputError(f"internal_batch_size must be at least 1, got {size}.")
    return size or _AT_ONCE


def _dtype(decomposer: Decomposer) -> torch.dtype:
    return decomposer.generator.stem.weight.dtype
