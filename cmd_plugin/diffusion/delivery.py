"""The same image, delivered again: compressed, shrunk, cut, encoded otherwise."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cmd_plugin.errors import ShapeError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["DELIVERIES", "redeliver"]

DELIVERIES = ("jpeg90", "jpeg70", "half", "crop", "webp80")


def redeliver(image: Tensor) -> dict[str, Tensor]:
    """Deliver an image again in the ways of :data:`DELIVERIES`.

    ``jpeg90`` and ``jpeg70``: as JPEG of that quality; ``half``: at half its size and back;
    ``crop``: its middle nine tenths, enlarged to its size; ``webp80``: encoded as WebP.

    Args:
        image: [C, H, W] uint8, grey or RGB.

    Returns:
        Delivery -> [C, H, W] uint8.

    Raises:
        ShapeError: If it is no such image.
    """
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ShapeError(
            f"an image to deliver must be uint8 [1 or 3, H, W], got {tuple(image.shape)} "
            f"{image.dtype}."
        )
    from PIL import Image

    array = image.permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    width, height = picture.size
    smooth = Image.Resampling.BICUBIC
    half = picture.resize((max(1, width // 2), max(1, height // 2)), smooth)
    left, top = round(0.05 * width), round(0.05 * height)
    middle = picture.crop((left, top, max(width - left, left + 1), max(height - top, top + 1)))
    made = {
        "jpeg90": _encoded(picture, format="JPEG", quality=90),
        "jpeg70": _encoded(picture, format="JPEG", quality=70),
        "half": half.resize((width, height), smooth),
        "crop": middle.resize((width, height), smooth),
        "webp80": _encoded(picture, format="WEBP", quality=80),
    }
    return {name: _tensor(made[name], image) for name in DELIVERIES}


def _encoded(picture: Image, **options: Any) -> Image:
    from PIL import Image

    stream = io.BytesIO()
    picture.save(stream, **options)
    # WebP has no grey.
    with Image.open(stream) as read:
        return read.convert(picture.mode)


def _tensor(picture: Image, like: Tensor) -> Tensor:
    array = np.array(picture)
    return torch.from_numpy(array.reshape(*like.shape[1:], -1)).permute(2, 0, 1).contiguous()
