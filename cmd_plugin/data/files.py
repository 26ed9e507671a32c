"""Image files in folders and tar archives: finding, decoding, and reading them on demand.

Archives are read member by member. Nothing is ever extracted to disk, so member names cannot lead
anywhere.
"""

from __future__ import annotations

import io
import lzma
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from cmd_plugin.errors import InputError

__all__ = ["FileImages", "ImageFile", "decode", "find_archives", "is_archive", "walk"]

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
ARCHIVE_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class ImageFile:
    """Where one image lies.

    Attributes:
        parts: Path inside the data set, for example `("train", "cat", "1.png")`.
        source: The image file itself, or the archive that holds it.
        start: Byte position inside an uncompressed archive; `None` for a file of its own or a
            compressed archive.
        length: Number of bytes inside the archive; 0 for a file of its own.
        data: The bytes, while a walk hands them over; `None` for a file of its own.
    """

    parts: tuple[str, ...]
    source: Path
    start: int | None = None
    length: int = 0
    data: bytes | None = None

    @property
    def name(self) -> str:
        """The name that messages show."""
        if self.length == 0:
            return str(self.source)
        return f"{self.source}:{'/'.join(self.parts)}"

    def read(self) -> bytes:
        """The encoded image."""
        if self.data is not None:
            return self.data
        try:
            with self.source.open("rb") as stream:
                if self.start is not None:
                    stream.seek(self.start)
                    return stream.read(self.length)
                return stream.read()
        except OSError as error:
            raise InputError(f"{self.name} cannot be read: {error.strerror}.") from error


def is_archive(path: Path) -> bool:
    """Whether the name is that of a tar archive."""
    return path.name.lower().endswith(ARCHIVE_ENDINGS)


def find_archives(folder: Path) -> dict[str, Path]:
    """Tar archives directly inside a folder, by their name without the ending."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and is_archive(path):
            ending = max((e for e in ARCHIVE_ENDINGS if path.name.lower().endswith(e)), key=len)
            found[path.name[: -len(ending)].lower()] = path
    return found


def _is_image(parts: tuple[str, ...]) -> bool:
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return bool(parts) and not hidden and parts[-1].lower().endswith(IMAGE_ENDINGS)


def walk(root: Path) -> Iterator[ImageFile]:
    """All image files of a folder (sorted) or of a tar archive (in its order, with their bytes).

    Args:
        root: A folder or a tar archive.

    Raises:
        InputError: If the archive is damaged or of another format.
    """
    if root.is_dir():
        # os.walk instead of rglob: it follows links to folders, which large collections often are.
        for folder, subfolders, names in os.walk(root, followlinks=True):
            subfolders.sort()
            for name in sorted(names):
                path = Path(folder, name)
                parts = path.relative_to(root).parts
                if _is_image(parts):
                    yield ImageFile(parts, path)
        return
    try:
        compressed = _is_compressed(root)
        with tarfile.open(root, mode="r|*") as archive:
            for member in archive:
                steps = PurePosixPath(member.name).parts
                parts = tuple(step for step in steps if step not in ("/", ".", ".."))
                stream = archive.extractfile(member) if member.isfile() else None
                if stream is not None and _is_image(parts):
                    start = None if compressed else member.offset_data
                    yield ImageFile(parts, root, start, member.size, stream.read())
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise InputError(
            f"{root} is not a readable tar archive ({error}): make or copy it again."
        ) from error


def _is_compressed(path: Path) -> bool:
    with path.open("rb") as stream:
        start = stream.read(6)
    return start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ"))


def decode(file: ImageFile, size: tuple[int, int] | None = None) -> Pixels:
    """Decode an image, keeping grey ones grey.

    Args:
        file: Where the image lies.
        size: Height and width; the image is scaled and centre-cropped to it. `None` keeps its size.

    Returns:
        Shape [1, H, W] for a grey image, else [3, H, W].

    Raises:
        InputError: If the image is damaged.
    """
    try:
        with Image.open(io.BytesIO(file.read())) as opened:
            image = _grey_or_rgb(opened)
        if size is not None and image.size != (size[1], size[0]):
            image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BILINEAR)
        pixels: Pixels = np.array(image)
    except InputError:
        raise
    except Exception as error:  # decoders meet damaged bytes with almost any exception
        reason = str(error).split("<_io", maxsplit=1)[0].strip() or type(error).__name__
        raise InputError(
            f"{file.name} is not a readable image ({reason}): replace or remove it."
        ) from error
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _grey_or_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        # 16-bit grey: Pillow's own conversion would clip everything above 255 to white.
        values = np.asarray(image).astype(np.float32) / 257.0
        return Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    if image.mode in ("1", "L"):
        return image.convert("L")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


class FileImages:
    """Images that stay on disk and are decoded when they are read.

    Args:
        files: Where they lie; each must be readable on its own (not inside a compressed archive).
        channels: 1 or 3; grey images are repeated for 3, coloured ones are refused for 1.
        size: Height and width of every image.
        resize: Whether images of another size are scaled and cropped; otherwise they are refused.
    """

    in_memory = False

    def __init__(
        self, files: list[ImageFile], channels: int, size: tuple[int, int], resize: bool
    ) -> None:
        self.files = files
        self.channels = channels
        self.size = size
        self.resize = resize

    def __len__(self) -> int:
        """Number of images."""
        return len(self.files)

    def read(self, indices: Tensor) -> Tensor:
        """Images as float32 in [0, 1], shape [B, C, H, W]."""
        batch = np.empty((len(indices), self.channels, *self.size), dtype=np.uint8)
        for row, index in enumerate(indices.tolist()):
            file = self.files[index]
            pixels = decode(file, self.size if self.resize else None)
            if pixels.shape[1:] != self.size:
                raise size_mismatch(file, pixels, self.size)
            if len(pixels) > self.channels:
                raise InputError(
                    f"{file.name} is in colour, the images before it are grey: convert one of them."
                )
            batch[row] = pixels
        return torch.from_numpy(batch).float().mul_(1.0 / 255.0)

    def select(self, indices: Tensor) -> FileImages:
        """The chosen images; nothing is read."""
        files = [self.files[index] for index in indices.tolist()]
        return FileImages(files, self.channels, self.size, self.resize)


def size_mismatch(file: ImageFile, pixels: Pixels, size: tuple[int, int]) -> InputError:
    """The error for an image whose size differs from the others."""
    height, width = pixels.shape[1:]
    message = (
        f"{file.name} is {width}x{height} pixels but the images before it are {size[1]}x{size[0]}: "
        "pass an image size (--image-size) to bring all to one."
    )
    return InputError(message)
