"""From files found to a set of images: their headers first, then their pixels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cmd_plugin.data.decode import FileImages, Header, decode, put, read_header, size_mismatch
from cmd_plugin.data.files import Found, ImageFile, Skipped, Unreadable
from cmd_plugin.data.images import ImageStore, MemoryImages
from cmd_plugin.data.limits import ReadLimits
from cmd_plugin.errors import InputError

__all__ = ["ImageSet", "Listing"]


@dataclass(frozen=True)
class ImageSet:
    """Images that were found in one place.

    Attributes:
        images: The images.
        names: Path of each image inside the folder or archive; its number for an array.
        labels: Class of each image, shape [N], int64; `None` for a flat set.
        classes: Class names in label order; empty for a flat set.
        channels: 1 or 3.
        size: Height and width of every image; `None` where they differ, and images can only be read
            one at a time.
        skipped: What was left out and why: unreadable files where skipping them was asked for,
            links to folders that are in the set already, links inside archives, and files of image
            formats that are not read.
    """

    images: ImageStore
    names: tuple[str, ...]
    labels: Tensor | None
    classes: tuple[str, ...]
    channels: int
    size: tuple[int, int] | None
    skipped: tuple[Skipped, ...]


@dataclass
class Listing:
    """Image files whose headers have been read.

    Args:
        limits: Bounds on what is read.
        skip_unreadable: Whether files that cannot be read are listed in `skipped`, or refused.
    """

    limits: ReadLimits
    skip_unreadable: bool = False
    files: list[ImageFile] = field(default_factory=list)
    headers: list[Header] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def extend(self, found: Iterable[Found]) -> None:
        """Read the headers of what a walk finds.

        Raises:
            InputError: If a file cannot be read, or a compressed archive is too large to be held.
        """
        held = 0
        for item in found:
            if isinstance(item, Skipped):
                self.skipped.append(item)
                continue
            if isinstance(item, Unreadable):
                self._leave_out(item)
                continue
            try:
                header = read_header(item, self.limits)
            except Unreadable as error:
                self._leave_out(error)
                continue
            self.files.append(item)
            self.headers.append(header)
            held += len(item.data or b"")
            if held > self.limits.memory_bytes:
                message = (
                    f"{item.source} is a compressed archive too large for the memory "
                    f"(ReadLimits.memory_bytes is {self.limits.memory_bytes}): unpack it to a "
                    "folder, or to a plain .tar, which can be read in any order."
                )
                raise InputError(message)

    def _leave_out(self, error: Unreadable) -> None:
        if not self.skip_unreadable:
            raise error
        self.skipped.append(error.skipped)

    def select(self, indices: Iterable[int]) -> Listing:
        """The chosen files in the order of `indices`."""
        kept = list(indices)
        return Listing(
            self.limits,
            self.skip_unreadable,
            [self.files[index] for index in kept],
            [self.headers[index] for index in kept],
            self.skipped,  # the same list: what is left out later belongs in it as well
        )

    @property
    def channels(self) -> int:
        """1 if all images are grey, else 3."""
        return max(header.channels for header in self.headers)

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of every image; `None` where they differ."""
        sizes = {header.size for header in self.headers}
        return sizes.pop() if len(sizes) == 1 else None

    def refuse_different_sizes(self) -> None:
        """Name the first image that is not as large as the ones before it.

        Raises:
            InputError: If there is one.
        """
        for file, header in zip(self.files, self.headers, strict=True):
            if header.size != self.headers[0].size:
                raise size_mismatch(file, header.size, self.headers[0].size)

    def load(self, size: tuple[int, int] | None) -> tuple[ImageStore, list[int]]:
        """The images behind one store, in memory if they are of one size and within the bound.

        Where unreadable files are skipped, each image is decoded once here to know it.

        Args:
            size: Height and width to scale and crop to; `None` keeps the size of each.

        Returns:
            The store, and which of the files are in it.

        Raises:
            InputError: If an image is damaged and unreadable files are refused.
        """
        common = size or self.size
        channels = self.channels
        shape = (len(self.files), channels, *(common or (0, 0)))
        if common is None or np.prod(shape, dtype=float) > self.limits.memory_bytes:
            kept = [i for i in range(len(self.files)) if not self.skip_unreadable or self._try(i)]
            files = [self.files[index] for index in kept]
            return FileImages(files, self.limits, channels, common, size is not None), kept
        pixels = np.empty(shape, dtype=np.uint8)
        kept = []
        for index, file in enumerate(self.files):
            try:
                image = decode(file, self.limits, size)
            except Unreadable as error:
                self._leave_out(error)
                continue
            put(image, pixels[len(kept)], file)
            kept.append(index)
        return MemoryImages(torch.from_numpy(pixels[: len(kept)])), kept

    def _try(self, index: int) -> bool:
        try:
            decode(self.files[index], self.limits)
        except Unreadable as error:
            self._leave_out(error)
            return False
        return True
