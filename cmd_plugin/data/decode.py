"""Image files into pixels: their headers, their values, and reading them on demand."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from cmd_plugin.data.files import ImageFile, explain, unreadable
from cmd_plugin.data.limits import ReadLimits
from cmd_plugin.errors import InputError

__all__ = ["FileImages", "Header", "Pixels", "decode", "put", "read_header", "size_mismatch"]

Pixels = NDArray[np.uint8]

# Whatever the name says. GIF is among them for files under another name only; the formats that
# Pillow hands to other programs (EPS) are not.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

# Numbers of the TIFF fields used here. A photometric value of 0 says that white is zero.
_BITS, _PHOTOMETRIC, _TILE_WIDTH, _TILE_LENGTH, _SAMPLE_FORMAT = 258, 262, 322, 323, 339

# Cameras write these with a note on how they were held. In PNG the note may come after the pixels,
# and TIFF is turned by Pillow itself where it is.
_NOTED = ("JPEG", "MPO", "WEBP")
# What turns the pixels of each note upright; of 5 and more height and width change places.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Header:
    """What is known of an image before it is decoded.

    Attributes:
        channels: 1 for a grey image, else 3.
        size: Height and width, upright.
    """

    channels: int
    size: tuple[int, int]


def read_header(file: ImageFile, limits: ReadLimits) -> Header:
    """Read what a file says of its image, without decoding it.

    Raises:
        Unreadable: If the file is no image, too large, or of a kind that cannot be decoded rightly.
    """
    with _opened(file, limits) as image:
        grey = image.mode in ("1", "L", "F") or image.mode.startswith("I")
        size = (image.height, image.width)
        return Header(1 if grey else 3, size if _orientation(image) < 5 else size[::-1])


def decode(file: ImageFile, limits: ReadLimits, size: tuple[int, int] | None = None) -> Pixels:
    """Decode an image to 8 bits a channel, keeping grey ones grey.

    16-bit grey is scaled from its whole range and floats from [0, 1]. Transparency is dropped, of
    several pages the first one is read. JPEG and WebP are turned upright as the camera noted.

    Args:
        file: Where the image lies.
        limits: Bounds on its bytes and pixels.
        size: Height and width; the image is scaled and centre-cropped to it. `None` keeps its size.

    Returns:
        Shape [1, H, W] for a grey image, else [3, H, W].

    Raises:
        Unreadable: If the image is damaged or too large, has floats outside [0, 1], or integers
            whose range is not known.
    """
    with _opened(file, limits) as opened:
        image = _grey_or_rgb(opened, file)
        turn = _TURNS.get(_orientation(opened))
        if turn is not None:
            image = image.transpose(turn)
        if size is not None and image.size != (size[1], size[0]):
            image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BILINEAR)
        pixels: Pixels = np.array(image)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


@contextmanager
def _opened(file: ImageFile, limits: ReadLimits) -> Iterator[Image.Image]:
    """An image whose header has been checked; what fails in the block is :class:`Unreadable`."""
    try:
        with file.open(limits) as stream, Image.open(stream, formats=_FORMATS) as image:
            _check_header(image, file, limits)
            yield image
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise unreadable(
            file,
            f"is too large ({str(error).partition(', could')[0]})",
            "remove it or raise PIL.Image.MAX_IMAGE_PIXELS and ReadLimits.image_pixels",
        ) from error
    except Exception as error:  # decoders meet damaged bytes with almost any exception
        raise unreadable(file, f"is not a readable image ({explain(error)})") from error


def _check_header(image: Image.Image, file: ImageFile, limits: ReadLimits) -> None:
    tags = getattr(image, "tag_v2", {})
    tile = tags.get(_TILE_WIDTH, 0) * tags.get(_TILE_LENGTH, 0)  # decoded whole, also at the edges
    pixels = max(image.width * image.height, tile)
    if pixels > limits.image_pixels:
        raise unreadable(
            file,
            f"has {pixels} pixels, more than the {limits.image_pixels} allowed",
            "remove it or raise ReadLimits.image_pixels",
        )
    signed = 2 in np.atleast_1d(tags.get(_SAMPLE_FORMAT, 1))
    if signed or (image.mode == "I" and image.format == "TIFF"):
        raise unreadable(
            file,
            "holds signed or 32-bit integers, whose range is not known",
            "save it with 8 or 16 unsigned bits, or as floats in [0, 1]",
        )


def _orientation(image: Image.Image) -> int:
    """The camera's note, 1 to 8; 1, upright, if there is none or it is damaged."""
    if image.format not in _NOTED:
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about other notes, which nothing here reads
            noted = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # the pixels are whole all the same
        return 1
    return noted if noted in _TURNS else 1


def _grey_or_rgb(image: Image.Image, file: ImageFile) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        # Pillow's own conversion would clip: 16 bits to white, floats to black.
        return Image.fromarray(_scale(image, file).round().astype(np.uint8))
    if image.mode in ("1", "L"):
        return image.convert("L")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _scale(image: Image.Image, file: ImageFile) -> NDArray[np.float32]:
    """Grey values of more than 8 bits, brought to 0..255."""
    tags = getattr(image, "tag_v2", {})
    values = np.asarray(image).astype(np.float32)
    if image.mode == "F":
        if not (values.min() >= 0.0 and values.max() <= 1.0):  # also with NaN
            raise unreadable(
                file,
                f"holds floats from {values.min():g} to {values.max():g}",
                "scale them to [0, 1]",
            )
        values *= 255.0
    else:
        bits = int(np.atleast_1d(tags.get(_BITS, 16))[0])
        values /= (2**bits - 1) / 255.0
    return 255.0 - values if tags.get(_PHOTOMETRIC) == 0 else values


class FileImages:
    """Images that are decoded when they are read.

    Args:
        files: Where they lie.
        limits: Bounds on the bytes and pixels of one image.
        channels: 1 or 3; grey images are repeated for 3, coloured ones are refused for 1.
        size: Height and width of every image; `None` where they differ, and only images of one size
            can be read together.
        resize: Whether images of another size are scaled and cropped; otherwise they are refused.
    """

    in_memory = False

    def __init__(
        self,
        files: list[ImageFile],
        limits: ReadLimits,
        channels: int,
        size: tuple[int, int] | None,
        resize: bool,
    ) -> None:
        self.files = files
        self.limits = limits
        self.channels = channels
        self.size = size
        self.resize = resize

    def __len__(self) -> int:
        """Number of images."""
        return len(self.files)

    def read(self, indices: Tensor) -> Tensor:
        """Images as float32 in [0, 1], shape [B, C, H, W].

        Raises:
            InputError: If an image cannot be read, or the images are of different sizes.
        """
        size = self.size
        batch = np.empty((len(indices), self.channels, *(size or (0, 0))), dtype=np.uint8)
        for row, index in enumerate(indices.tolist()):
            file = self.files[index]
            pixels = decode(file, self.limits, self.size if self.resize else None)
            if size is None:
                size = (pixels.shape[1], pixels.shape[2])
                batch = np.empty((len(indices), self.channels, *size), dtype=np.uint8)
            put(pixels, batch[row], file)
        return torch.from_numpy(batch).float().mul_(1.0 / 255.0)

    def select(self, indices: Tensor) -> FileImages:
        """The chosen images; nothing is read."""
        files = [self.files[index] for index in indices.tolist()]
        return FileImages(files, self.limits, self.channels, self.size, self.resize)


def put(pixels: Pixels, place: Pixels, file: ImageFile) -> None:
    """Write an image to its place in a batch, a grey one into each of its channels.

    Raises:
        InputError: If it is of another size, or in colour where the place is grey.
    """
    _, height, width = place.shape
    if pixels.shape[1:] != (height, width):
        raise size_mismatch(file, (pixels.shape[1], pixels.shape[2]), (height, width))
    if len(pixels) > len(place):
        raise InputError(
            f"{file.name} is in colour, the images before it are grey: convert one of them."
        )
    place[:] = pixels


def size_mismatch(file: ImageFile, size: tuple[int, int], expected: tuple[int, int]) -> InputError:
    """The error for an image whose size differs from the others."""
    message = (
        f"{file.name} is {size[1]}x{size[0]} pixels but the images before it are "
        f"{expected[1]}x{expected[0]}: pass an image size (--image-size) to bring all to one."
    )
    return InputError(message)
