"""One door to every image data set: :func:`load_dataset`."""

from __future__ import annotations

import difflib
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cmd_plugin.data.folder import FolderImages, read_folder
from cmd_plugin.data.images import ImageStore, LabelledImages, MemoryImages, channel_statistics
from cmd_plugin.data.limits import DEFAULT_LIMITS, ReadLimits
from cmd_plugin.data.names import DATASETS, MARKS, ROOT_VARIABLE
from cmd_plugin.data.splits import corrupt_labels, split_indices, stratified_subset
from cmd_plugin.errors import InputError

__all__ = ["DATASETS", "ImageData", "load_dataset"]


@dataclass(frozen=True)
class ImageData:
    """A classification data set ready for training.

    Attributes:
        name: Its name; `cifar10-jpeg` when CIFAR-10 was read from lossy JPEG files, whose pixels
            are not the canonical ones.
        train: Training images, float32 [C, H, W], normalised per channel by the statistics of this
            set, with int64 labels. Label noise is in here only.
        test: Held-out images, normalised the same way, with their true labels.
        classes: Class names in label order.
        channels: 1 or 3.
        size: Height and width.
    """

    name: str
    train: Dataset[tuple[Tensor, Tensor]]
    test: Dataset[tuple[Tensor, Tensor]]
    classes: tuple[str, ...]
    channels: int
    size: tuple[int, int]


@dataclass(frozen=True)
class _Part:
    images: ImageStore
    labels: Tensor

    def select(self, indices: Tensor) -> _Part:
        return _Part(self.images.select(indices), self.labels[indices])


def load_dataset(
    name: str,
    *,
    data_root: str | os.PathLike[str] | None = None,
    label_noise: float = 0.0,
    seed: int = 0,
    train_limit: int | None = None,
    test_fraction: float = 0.2,
    image_size: int | tuple[int, int] | None = None,
    limits: ReadLimits = DEFAULT_LIMITS,
) -> ImageData:
    """Load a data set; nothing is ever downloaded.

    Args:
        name: One of :data:`DATASETS`. `digits` comes with scikit-learn (1797 grey 8x8 images);
            `mnist`, `fashion-mnist` and `cifar10` are read in torchvision's layout; `folder` is a
            folder or archive of images, see :func:`cmd_plugin.data.folder.read_folder`.
        data_root: Where the data lies; defaults to the environment variable `CMD_PLUGIN_DATA`. Not
            used by `digits`.
        label_noise: Share of training labels replaced by a uniformly drawn other class, in [0, 1).
        seed: Seed of the split, of the subset and of the noise.
        train_limit: Use only this many training images, chosen with equal class shares.
        test_fraction: Held-out share where the data comes without a held-out set (`digits`, a
            single tree), in (0, 1).
        image_size: Height and width (or one number for both) to resize to.
        limits: Bounds on what is read from a folder or archive of images.

    Raises:
        InputError: If the name is unknown, the data is missing, damaged or unusable, or an option
            is out of range.
    """
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"unknown data set {name!r}: {hint}choose one of {', '.join(DATASETS)}.")
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if size is not None and min(size) < 1:
        raise InputError(f"image_size must be at least 1 pixel, got {image_size}.")

    if name == "digits":
        train, test, classes = _digits(size, test_fraction, seed)
    else:
        root = _root(name, data_root)
        if name == "cifar10" and not (root / MARKS[name]).is_dir():
            jpeg = root / MARKS["cifar10-jpeg"]
            if jpeg.is_dir():
                name, root = "cifar10-jpeg", jpeg
        if name in ("folder", "cifar10-jpeg"):
            train, test, classes = _split(read_folder(root, size, limits), test_fraction, seed)
        else:
            train, test, classes = _torchvision(name, root, size)

    if train_limit is not None:
        train = train.select(stratified_subset(train.labels, train_limit, seed))
    noisy = corrupt_labels(train.labels, label_noise, len(classes), seed)
    mean, std = channel_statistics(train.images)
    shape = train.images.read(torch.zeros(1, dtype=torch.int64)).shape
    return ImageData(
        name=name,
        train=LabelledImages(train.images, noisy, mean, std),
        test=LabelledImages(test.images, test.labels, mean, std),
        classes=classes,
        channels=shape[1],
        size=(shape[2], shape[3]),
    )


def _root(name: str, data_root: str | os.PathLike[str] | None) -> Path:
    chosen = data_root or os.environ.get(ROOT_VARIABLE)
    if not chosen:
        raise InputError(
            f"data set {name!r} is read from disk: say where with --data-root or {ROOT_VARIABLE}."
        )
    root = Path(chosen).expanduser()
    if not root.exists():
        raise InputError(
            f"the data folder {root} does not exist: correct --data-root or {ROOT_VARIABLE}."
        )
    return root


def _digits(
    size: tuple[int, int] | None, test_fraction: float, seed: int
) -> tuple[_Part, _Part, tuple[str, ...]]:
    from sklearn.datasets import (
        load_digits,
    )  # imported here: it takes a second, and only digits need it

    bunch = load_digits()
    pixels = torch.from_numpy(np.asarray(bunch.images, dtype=np.float32) / 16.0)[:, None]
    classes = tuple(str(name) for name in bunch.target_names)
    everything = _Part(
        MemoryImages(pixels, size), torch.from_numpy(np.asarray(bunch.target, dtype=np.int64))
    )
    train, test = split_indices(everything.labels, test_fraction, seed, classes)
    return everything.select(train), everything.select(test), classes


def _split(
    found: FolderImages, test_fraction: float, seed: int
) -> tuple[_Part, _Part, tuple[str, ...]]:
    everything = _Part(found.images, found.labels)
    if found.held_out is None:
        train, test = split_indices(found.labels, test_fraction, seed, found.classes)
    else:
        train, test = (mask.nonzero().flatten() for mask in (~found.held_out, found.held_out))
    return everything.select(train), everything.select(test), found.classes


def _torchvision(
    name: str, root: Path, size: tuple[int, int] | None
) -> tuple[_Part, _Part, tuple[str, ...]]:
    from torchvision import datasets  # imported here: slow, and digits do not need it

    kinds: dict[str, Any] = {
        "mnist": datasets.MNIST,
        "fashion-mnist": datasets.FashionMNIST,
        "cifar10": datasets.CIFAR10,
    }
    expected = root / MARKS[name]
    if not expected.exists():
        also = " or cifar10-jpeg/train.tar.gz and test.tar.gz" if name == "cifar10" else ""
        raise InputError(f"no {name} data in {root}: expected {expected}{also}.")
    parts = []
    try:
        with warnings.catch_warnings():
            # CIFAR-10's pickles are older than NumPy's present rules for data types.
            warnings.simplefilter("ignore")
            both = [kinds[name](root, train=train, download=False) for train in (True, False)]
    except Exception as error:  # damaged files end in assertions, struct and pickle errors alike
        reason = str(error).partition("You can use")[0].rstrip(". ") or type(error).__name__
        message = (
            f"the {name} files in {root} are incomplete or damaged ({reason}): copy them again."
        )
        raise InputError(message) from error
    for dataset in both:
        pixels = torch.as_tensor(dataset.data)
        # CIFAR-10 comes as [N, H, W, 3], the MNIST family as [N, H, W].
        pixels = pixels.permute(0, 3, 1, 2).contiguous() if pixels.ndim == 4 else pixels[:, None]
        parts.append(_Part(MemoryImages(pixels, size), torch.as_tensor(dataset.targets)))
    return parts[0], parts[1], tuple(str(label) for label in both[0].classes)
