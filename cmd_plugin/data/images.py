"""Image sets in memory or on disk behind one dataset class, and the loader that batches them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset, Sampler

__all__ = [
    "EpochShuffle",
    "ImageStore",
    "LabelledImages",
    "MemoryImages",
    "channel_statistics",
    "make_loader",
]

_STATISTICS_SAMPLE = 4096
"""How many images the statistics of a set that is *not* in memory are taken from."""


class ImageStore(Protocol):
    """A set of images that can be read by index; only equally large ones can be read together."""

    in_memory: bool

    def __len__(self) -> int:
        """Number of images N."""
        ...

    def read(self, indices: Tensor) -> Tensor:
        """Images as float32 in [0, 1], shape [B, C, H, W], for `indices` int64 [B]."""
        ...

    def select(self, indices: Tensor) -> ImageStore:
        """The store of the chosen images only, in the order of `indices` int64 [B]."""
        ...


class MemoryImages:
    """Images held as one tensor.

    Args:
        pixels: Shape [N, C, H, W]; uint8 in 0..255, or float in [0, 1].
        size: Height and width to resize to while reading (bilinear, antialiased); `None` keeps the
            size.
    """

    in_memory = True

    def __init__(self, pixels: Tensor, size: tuple[int, int] | None = None) -> None:
        self.pixels = pixels
        self.size = size if size != tuple(pixels.shape[-2:]) else None

    def __len__(self) -> int:
        """Number of images."""
        return len(self.pixels)

    def read(self, indices: Tensor) -> Tensor:
        """Images as float32 in [0, 1], shape [B, C, H, W]."""
        images = self.pixels[indices]
        images = images.float().mul_(1.0 / 255.0) if images.dtype == torch.uint8 else images.float()
        if self.size is not None:
            images = interpolate(images, self.size, mode="bilinear", antialias=True)
        return images.contiguous()

    def select(self, indices: Tensor) -> MemoryImages:
        """The chosen images, copied."""
        return MemoryImages(self.pixels[indices], self.size)


class LabelledImages(Dataset[tuple[Tensor, Tensor]]):
    """Normalised images with their labels, read one at a time or, cheaply, a whole batch at once.

    Args:
        store: The images.
        labels: Class of each image, shape [N], int64.
        mean: Mean of each channel, shape [C], float32, for images in [0, 1].
        std: Standard deviation of each channel, shape [C], float32, above 0.
    """

    def __init__(self, store: ImageStore, labels: Tensor, mean: Tensor, std: Tensor) -> None:
        self.store = store
        self.labels = labels
        self._scale = (1.0 / std).view(1, -1, 1, 1)
        self._shift = (-mean / std).view(1, -1, 1, 1)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.store)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One image, float32 [C, H, W], and its label, int64 scalar."""
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A batch: images float32 [B, C, H, W] and labels int64 [B]."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        images = self.store.read(chosen).mul_(self._scale).add_(self._shift)
        return images, self.labels[chosen]


def channel_statistics(store: ImageStore, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over a set of images.

    A set on disk is measured on 4096 images spread evenly over it. A constant channel gets standard
    deviation 1.

    Args:
        store: The images.
        chunk: Images read at a time.

    Returns:
        Mean and standard deviation, both shape [C], float32.
    """
    indices = torch.arange(len(store))
    if not store.in_memory and len(store) > _STATISTICS_SAMPLE:
        indices = indices[torch.arange(_STATISTICS_SAMPLE) * len(store) // _STATISTICS_SAMPLE]
    count = 0
    total: Tensor | float = 0.0
    squares: Tensor | float = 0.0
    for part in torch.split(indices, chunk):
        images = store.read(part).double()
        count += images.numel() // images.shape[1]
        total = total + images.sum(dim=(0, 2, 3))
        squares = squares + images.square().sum(dim=(0, 2, 3))
    mean = torch.as_tensor(total) / count
    variance = (torch.as_tensor(squares) / count - mean.square()).clamp_min(0.0)
    std = variance.sqrt()
    std = torch.where(std < 1e-6, torch.ones_like(std), std)
    return mean.float(), std.float()


class EpochShuffle(Sampler[int]):
    """A shuffled order that depends on nothing but the seed and the epoch number.

    Lightning calls :meth:`set_epoch` before each epoch, also after a resume, so a resumed run sees
    the same order as an uninterrupted one.

    Args:
        length: Number of items.
        seed: Seed of all orders.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of epoch number `epoch`."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of items."""
        return self.length

    def __iter__(self) -> Iterator[int]:
        """Indices of this epoch in their order."""
        generator = np.random.default_rng([self.seed, self.epoch])
        return iter(generator.permutation(self.length).tolist())


def _as_it_is(batch: Any) -> Any:
    return batch


def make_loader(
    dataset: Dataset[tuple[Tensor, Tensor]], batch_size: int, shuffle_seed: int | None = None
) -> DataLoader[tuple[Tensor, Tensor]]:
    """A loader whose iteration leaves the global random state alone.

    When training, a last batch of one image is dropped, because BatchNorm cannot learn from it.
    Sets on disk are read by up to four worker processes, sets in memory directly.

    Args:
        dataset: The images; a :class:`LabelledImages` is read a batch at a time.
        batch_size: Images in a batch.
        shuffle_seed: Seed of the order of each epoch (training); `None` keeps the order
            (evaluation).
    """
    count = len(dataset)  # type: ignore[arg-type]
    batched = isinstance(dataset, LabelledImages)
    workers = 0
    if isinstance(dataset, LabelledImages) and not dataset.store.in_memory:
        workers = min(4, os.cpu_count() or 1)
    training = shuffle_seed is not None
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=None if shuffle_seed is None else EpochShuffle(count, shuffle_seed),
        drop_last=training and count > batch_size and count % batch_size == 1,
        collate_fn=_as_it_is if batched else None,
        num_workers=workers,
        # An own generator: otherwise every new iterator draws a worker seed from the global stream.
        generator=torch.Generator().manual_seed(shuffle_seed or 0),
    )
