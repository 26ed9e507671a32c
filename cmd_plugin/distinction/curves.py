"""What happens to a classifier when evidence is taken away, bit by bit, with limits to compare to.

All images here are in [-1, 1], where 0 is mid-grey. Areas under curves are divided by the accuracy
at the start and by the largest share, so that they lie around [0, 1]; lower is better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, softmax

from cmd_plugin.errors import ShapeError

__all__ = [
    "DELETED_SHARES",
    "REMOVED_SHARES",
    "Curve",
    "counterfactual_transition",
    "deletion_curve",
    "fill_grey",
    "fill_in",
    "greedy_ranking",
    "heatmap_part",
    "normalised_area",
    "removal_curve",
]

Classify = Callable[[Tensor], Tensor]
Fill = Callable[[Tensor, Tensor], Tensor]

REMOVED_SHARES = tuple(step / 10 for step in range(11))
DELETED_SHARES = (0.0, 0.05, 0.1, 0.15, 0.2)
_SWEEPS = 64
_AT_ONCE = 512


class Curve(NamedTuple):
    """Accuracy as evidence goes.

    Attributes:
        shares: How much was taken away, from 0 up.
        accuracy: In [0, 1], at each.
    """

    shares: tuple[float, ...]
    accuracy: tuple[float, ...]

    @property
    def area(self) -> float:
        """Area under the curve, by trapezoids, over the accuracy at the start and the last share.

        NaN where the classifier was right on none of the images to begin with.
        """
        if not self.accuracy[0]:
            return math.nan
        height = torch.tensor(self.accuracy, dtype=torch.float64)
        area = torch.trapezoid(height, torch.tensor(self.shares, dtype=torch.float64))
        return float(area) / self.accuracy[0] / self.shares[-1]


@torch.no_grad()
def removal_curve(
    classify: Classify,
    images: Tensor,
    part: Tensor,
    labels: Tensor,
    shares: Sequence[float] = REMOVED_SHARES,
) -> Curve:
    """Accuracy on ``x - share * part``: the DXAI paper's protocol.

    Args:
        classify: Maps images to class logits [B, k].
        images: [B, C, H, W].
        part: What is taken away, [B, C, H, W]: the distinct part, or :func:`heatmap_part`.
        labels: [B] int64.
        shares: From 0 up.
    """
    _check(images, labels, part)
    found = [_accuracy(classify, images - share * part, labels) for share in shares]
    return Curve(tuple(shares), tuple(found))


def heatmap_part(images: Tensor, maps: Tensor) -> Tensor:
    """What a heatmap would take away: the image times the map's size, whose largest is 1 per image.

    Args:
        images: [B, C, H, W].
        maps: [B, 1 or C, H, W].
    """
    size = maps.abs()
    largest = size.flatten(1).amax(dim=1).clamp_min(torch.finfo(size.dtype).tiny)
    return size / largest[:, None, None, None] * images


@torch.no_grad()
def deletion_curve(
    classify: Classify,
    images: Tensor,
    ranking: Tensor,
    labels: Tensor,
    shares: Sequence[float] = DELETED_SHARES,
    *,
    fill: Fill | None = None,
) -> Curve:
    """Accuracy with the pixels that are ranked highest deleted.

    Args:
        classify: Maps images to class logits [B, k].
        images: [B, C, H, W].
        ranking: [B, 1 or C, H, W], of which the mean size over channels counts.
        labels: [B] int64.
        shares: Of the pixels, from 0 up.
        fill: What becomes of deleted pixels: :func:`fill_grey` by default, or :func:`fill_in`.
    """
    _check(images, labels, ranking)
    order = _order(ranking)
    found = []
    for share in shares:
        deleted = _first(order, share, images)
        found.append(_accuracy(classify, (fill or fill_grey)(images, deleted), labels))
    return Curve(tuple(shares), tuple(found))


def fill_grey(images: Tensor, deleted: Tensor) -> Tensor:
    """Mid-grey in the place of deleted pixels.

    Args:
        images: [B, C, H, W].
        deleted: [B, 1, H, W] bool.
    """
    return images.masked_fill(deleted, 0.0)


def fill_in(images: Tensor, deleted: Tensor) -> Tensor:
    """What the neighbours say in the place of deleted pixels, so that images stay likely ones.

    Each is the mean of the four or so pixels around it, which may be deleted ones in turn (a
    discrete membrane): ROAD (Rong et al., ICML 2022) solves the same without the noise it adds.

    Args:
        images: [B, C, H, W].
        deleted: [B, 1, H, W] bool.
    """
    gone = deleted.to(images.dtype)
    kept = 1.0 - gone
    weight = avg_pool2d(kept, 3, 1, 1, count_include_pad=True)
    mean = (images * kept).sum(dim=(2, 3), keepdim=True) / kept.sum(
        dim=(2, 3), keepdim=True
    ).clamp_min(1.0)
    near = avg_pool2d(images * kept, 3, 1, 1, count_include_pad=True) / weight.clamp_min(1e-6)
    filled = torch.where(deleted, torch.where(weight > 0, near, mean), images)
    for _ in range(_SWEEPS):
        around = avg_pool2d(filled, 3, 1, 1, count_include_pad=False)
        filled = torch.where(deleted, around, images)
    return filled


@torch.no_grad()
def greedy_ranking(
    classify: Classify,
    images: Tensor,
    labels: Tensor,
    shares: Sequence[float] = DELETED_SHARES,
    *,
    patch: int = 1,
    fill: Fill | None = None,
) -> Tensor:
    """Rank pixels by trying: at each share, those whose deletion costs the class most go next.

    The lower limit that rankings are compared with: it asks the classifier about every patch at
    every step, which no explanation does.

    Args:
        classify: Maps images to class logits [B, k].
        images: [B, C, H, W]; height and width are multiples of ``patch``.
        labels: [B] int64.
        shares: At which something is deleted.
        patch: Side of the squares that are deleted together.
        fill: As in :func:`deletion_curve`.

    Returns:
        [B, 1, H, W], higher is earlier.

    Raises:
        ShapeError: If the patches do not fit.
    """
    _check(images, labels, images)
    height, width = images.shape[-2:]
    if patch < 1 or height % patch or width % patch:
        raise ShapeError(f"patches of {patch} pixels do not fit into {height}x{width} images.")
    rows, columns = height // patch, width // patch
    count = rows * columns
    fill = fill or fill_grey
    each = torch.eye(count, dtype=torch.bool, device=images.device).reshape(count, 1, rows, columns)
    found = torch.zeros(len(images), 1, rows, columns, device=images.device)
    steps = [round(share * count) for share in shares if share > 0.0]
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        deleted = torch.zeros(count, dtype=torch.bool, device=images.device)
        for step, wanted in enumerate(steps):
            more = wanted - int(deleted.sum())
            tried = _grown(each | deleted.reshape(1, 1, rows, columns), patch)
            many = image.expand(count, *image.shape)
            cost = torch.cat(
                [
                    softmax(classify(fill(x, gone)), dim=1)[:, label]
                    for x, gone in zip(
                        torch.split(many, _AT_ONCE), torch.split(tried, _AT_ONCE), strict=True
                    )
                ]
            )
            cost = cost.masked_fill(deleted, torch.inf)
            chosen = cost.argsort(stable=True)[: max(more, 0)]
            deleted[chosen] = True
            found[number].view(-1)[chosen] = float(len(steps) - step)
    return _grown(found, patch)


def normalised_area(area: float, at_random: float, greedy: float) -> float | None:
    """Where an area lies between that of a random ranking, 0, and the greedy one, 1.

    None if the two are the same, so that nothing lies between, or an area is not known.
    """
    width = at_random - greedy
    return (at_random - area) / width if width and math.isfinite(area + width) else None


@torch.no_grad()
def counterfactual_transition(
    classify: Classify,
    images: Tensor,
    changed: Tensor,
    labels: Tensor,
    targets: Tensor,
    steps: int = 10,
) -> Tensor:
    """COUT (Khorram and Fuxin, CVPR 2022): how soon a change brings another class, in [-1, 1].

    Pixels are put in the place of those of the image in the order of how much they change; COUT is
    the area under the probability of the new class minus that under the old one's.

    Args:
        classify: Maps images to class logits [B, k].
        images: [B, C, H, W].
        changed: What they become: for a decomposition, the agnostic part.
        labels: The class they were, [B] int64.
        targets: The class they shall become, [B] int64.
        steps: Steps on the way.

    Returns:
        [B] float32, higher is better.
    """
    _check(images, labels, changed)
    order = _order(changed - images)
    before, after = [], []
    for step in range(steps + 1):
        taken = _first(order, step / steps, images)
        chance = softmax(classify(torch.where(taken, changed, images)).float(), dim=1)
        before.append(chance.gather(1, labels[:, None])[:, 0])
        after.append(chance.gather(1, targets[:, None])[:, 0])
    old, new = (torch.trapezoid(torch.stack(rows), dim=0) / steps for rows in (before, after))
    return new - old


def _check(images: Tensor, labels: Tensor, other: Tensor) -> None:
    same = other.shape[0] == images.shape[0] and other.shape[2:] == images.shape[2:]
    if images.ndim != 4 or labels.shape != images.shape[:1] or not same or not len(images):
        raise ShapeError(
            f"images {tuple(images.shape)}, labels {tuple(labels.shape)} and maps "
            f"{tuple(other.shape)} do not go together: give [B, C, H, W], [B] and the like."
        )


def _accuracy(classify: Classify, images: Tensor, labels: Tensor) -> float:
    answers = torch.cat([classify(part).argmax(dim=1) for part in torch.split(images, _AT_ONCE)])
    return float((answers == labels).double().mean())


def _order(maps: Tensor) -> Tensor:
    """Number of each pixel, the largest first, [B, H * W]; ties in the order of reading."""
    return maps.abs().mean(dim=1).flatten(1).argsort(dim=1, descending=True, stable=True)


def _first(order: Tensor, share: float, images: Tensor) -> Tensor:
    """The first pixels of an order, [B, 1, H, W] bool."""
    chosen = torch.zeros_like(order, dtype=torch.bool)
    chosen.scatter_(1, order[:, : round(share * order.shape[1])], value=True)
    return chosen.reshape(len(images), 1, *images.shape[-2:])


def _grown(maps: Tensor, patch: int) -> Tensor:
    if patch == 1:
        return maps
    return interpolate(maps.float(), scale_factor=patch, mode="nearest").to(maps.dtype)
