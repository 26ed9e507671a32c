"""Seeded choices over labels: stratified subsets, held-out splits and label noise.

All of them use a generator of their own, so that they neither read nor advance the global random
state.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cmd_plugin.errors import InputError

__all__ = ["corrupt_labels", "split_indices", "stratified_subset"]


def stratified_subset(labels: Tensor, count: int, seed: int) -> Tensor:
    """Choose `count` items so that every class keeps its share.

    Shares are rounded by largest remainder; a class is never rounded down to nothing while `count`
    allows one of each.

    Args:
        labels: Class of each item, shape [N], int64.
        count: How many items to choose, from the number of classes present up to N.
        seed: Seed of the choice.

    Returns:
        Chosen indices in ascending order, shape [count], int64.

    Raises:
        InputError: If `count` is smaller than the number of classes present or larger than N.
    """
    present, sizes = np.unique(labels.numpy(), return_counts=True)
    if not len(present) <= count <= len(labels):
        message = (
            f"cannot choose {count} of {len(labels)} images: pass a number from {len(present)} "
            f"(one of each class) to {len(labels)}."
        )
        raise InputError(message)
    exact = sizes * (count / len(labels))
    quota = np.maximum(np.floor(exact).astype(np.int64), 1)
    # Raising rare classes to one may overshoot; then the classes with the most to spare give back.
    while quota.sum() > count:
        quota[np.argmax(np.where(quota > 1, quota - exact, -np.inf))] -= 1
    by_remainder = np.argsort(-(exact - quota), kind="stable")
    quota[by_remainder[: count - quota.sum()]] += 1

    generator = np.random.default_rng(seed)
    where = [np.flatnonzero(labels.numpy() == value) for value in present]
    chosen = [
        generator.choice(indices, size=int(size), replace=False)
        for indices, size in zip(where, quota, strict=True)
    ]
    return torch.from_numpy(np.sort(np.concatenate(chosen)))


def split_indices(
    labels: Tensor, test_fraction: float, seed: int, classes: tuple[str, ...]
) -> tuple[Tensor, Tensor]:
    """Split items into a training and a held-out part with equal class shares.

    Args:
        labels: Class of each item, shape [N], int64.
        test_fraction: Share of the held-out part, in (0, 1).
        seed: Seed of the split.
        classes: Class names, for the error message.

    Returns:
        Training indices and held-out indices, both ascending int64.

    Raises:
        InputError: If the fraction is outside (0, 1) or a class has fewer than two images.
    """
    if not 0.0 < test_fraction < 1.0:
        raise InputError(f"test_fraction must be between 0 and 1, got {test_fraction}.")
    sizes = torch.bincount(labels, minlength=len(classes))
    lonely = [name for name, size in zip(classes, sizes.tolist(), strict=True) if size == 1]
    if lonely:
        message = (
            f"class {lonely[0]!r} has a single image, too few for a training and a held-out set: "
            "add images or pass a separate test set."
        )
        raise InputError(message)
    count = round(len(labels) * test_fraction)
    count = min(max(count, len(classes)), len(labels) - len(classes))
    test = stratified_subset(labels, count, seed)
    keep = torch.ones(len(labels), dtype=torch.bool)
    keep[test] = False
    return keep.nonzero().flatten(), test


def corrupt_labels(labels: Tensor, fraction: float, classes: int, seed: int) -> Tensor:
    """Replace a share of the labels by a uniformly drawn *other* class.

    Args:
        labels: Class of each item, shape [N], int64; left as it is.
        fraction: Share of labels to replace, in [0, 1); `round(fraction * N)` labels change.
        classes: Number of classes, at least 2.
        seed: Seed of which labels change and into what.

    Returns:
        New labels, shape [N], int64.

    Raises:
        InputError: If the fraction is outside [0, 1).
    """
    if not 0.0 <= fraction < 1.0:
        raise InputError(f"label noise must be at least 0 and below 1, got {fraction}.")
    count = round(fraction * len(labels))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=generator)[:count]
    shift = torch.randint(1, classes, (count,), generator=generator)
    noisy = labels.clone()
    noisy[chosen] = (noisy[chosen] + shift) % classes
    return noisy
