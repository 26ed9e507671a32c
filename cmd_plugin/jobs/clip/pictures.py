"""Images on disk as an encoder takes them: found, decoded and prepared in worker processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cmd_plugin.clip.preprocessing import Preprocessing
from cmd_plugin.data import ReadLimits
from cmd_plugin.data.archives import is_archive, walk
from cmd_plugin.data.collection import Listing
from cmd_plugin.data.decode import decode
from cmd_plugin.data.files import ImageFile, Skipped, Unreadable, is_image_name
from cmd_plugin.data.order import natural_key
from cmd_plugin.errors import InputError

__all__ = ["batches_of", "find_images", "is_images"]


def is_images(path: Path) -> bool:
    """Whether a path is that of images: a folder, an archive or an image file."""
    return path.is_dir() or (path.is_file() and (is_archive(path) or is_image_name(path.name)))


def find_images(path: Path) -> Listing:
    """List the images of a folder (with the folders in it) or archive, in order of their names.

    Files that cannot be read stand in ``skipped``.

    Raises:
        InputError: If there are none.
    """
    listing = Listing(ReadLimits(), skip_unreadable=True)
    listing.extend(walk(path, listing.limits))
    labels = [file.label for file in listing.files]
    listing = listing.select(sorted(range(len(labels)), key=lambda i: natural_key(labels[i])))
    if not listing.files:
        reason = "".join(f" ({item.name} {item.reason})" for item in listing.skipped[:1])
        raise InputError(f"{path} holds no images{reason}: check the path.")
    return listing


def batches_of(
    files: Sequence[ImageFile], preprocessing: Preprocessing, batch_size: int, workers: int
) -> Iterator[list[Tensor | Skipped]]:
    """Yield images in order, each as [3, H, W] float32 or as the reason why it cannot be read."""
    loader: DataLoader[Tensor | Skipped] = DataLoader(
        _Pictures(list(files), preprocessing),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=list,
        # An own generator: else the loader draws a seed from the global random state.
        generator=torch.Generator().manual_seed(0),
    )
    yield from loader


class _Pictures(Dataset["Tensor | Skipped"]):
    def __init__(self, files: list[ImageFile], preprocessing: Preprocessing) -> None:
        self.files, self.preprocessing = files, preprocessing
        self.limits = ReadLimits()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor | Skipped:
        try:
            pixels = torch.from_numpy(decode(self.files[index], self.limits))
        except Unreadable as error:
            return error.skipped
        return self.preprocessing([pixels])[0]
