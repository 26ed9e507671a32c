"""Images and captions into what a tower takes, without the libraries' own transforms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from cmd_plugin.errors import InputError, ShapeError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["OPENAI_MEAN", "OPENAI_STD", "Preprocessing", "tokens"]

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
_MODES = ("bicubic", "bilinear")


@dataclass(frozen=True)
class Preprocessing:
    """How images become pixels of a tower: scaled, cropped at the centre, normalised.

    Attributes:
        size: Height and width the tower takes.
        mean: Of each channel, for pixels in [0, 1].
        std: Of each channel, above 0.
        interpolation: ``bicubic`` (CLIP) or ``bilinear``, both antialiased.
        resize: ``shortest`` scales the shorter side and crops the longer one, ``squash`` scales
            both (SigLIP).
        crop: Share of the scaled side that is kept, in (0, 1].
    """

    size: tuple[int, int] = (224, 224)
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize: Literal["shortest", "squash"] = "shortest"
    crop: float = 1.0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: If one is out of range.
        """
        if min(self.size) < 1 or not 0.0 < self.crop <= 1.0 or min(self.std) <= 0.0:
            raise InputError(f"size and std must be above 0 and crop in (0, 1]: {self}.")
        if self.interpolation not in _MODES or self.resize not in ("shortest", "squash"):
            raise InputError(
                f"interpolation must be bicubic or bilinear and resize shortest or squash, not "
                f"{self.interpolation!r} and {self.resize!r}."
            )

    def __str__(self) -> str:
        """One line that tells two preprocessings apart."""
        mean, std = (",".join(f"{v:.6g}" for v in values) for values in (self.mean, self.std))
        height, width = self.size
        return (
            f"{height}x{width} {self.interpolation} {self.resize} crop={self.crop:g} "
            f"mean={mean} std={std}"
        )

    def __call__(self, images: Tensor | Sequence[Tensor | Image]) -> Tensor:
        """Return pixels for a tower.

        Args:
            images: Images of any sizes: Pillow's, or tensors [C, H, W] (or one batch [B, C, H, W])
                of 1 or 3 channels, uint8 or float in [0, 1].

        Returns:
            Shape [B, 3, height, width], float32.

        Raises:
            ShapeError: If an image has another shape or dtype.
            InputError: If float values lie outside [0, 1].
        """
        if isinstance(images, Tensor) and images.ndim == 4:
            pixels = self._fit(_unit_range(images))
        else:
            pixels = torch.cat([self._fit(_unit_range(_tensor(image)[None])) for image in images])
        mean = pixels.new_tensor(self.mean).view(1, 3, 1, 1)
        std = pixels.new_tensor(self.std).view(1, 3, 1, 1)
        return (pixels - mean) / std

    def _fit(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        target = tuple(round(side / self.crop) for side in self.size)
        if self.resize == "shortest":
            scale = max(target[0] / height, target[1] / width)
            target = (
                max(target[0], round(height * scale)),
                max(target[1], round(width * scale)),
            )
        if target != (height, width):
            images = interpolate(images, target, mode=self.interpolation, antialias=True)
            images = images.clamp_(0.0, 1.0)  # bicubic overshoots at edges
        top = round((target[0] - self.size[0]) / 2.0)
        left = round((target[1] - self.size[1]) / 2.0)
        return images[..., top : top + self.size[0], left : left + self.size[1]]


def _tensor(image: Tensor | Image) -> Tensor:
    if isinstance(image, Tensor):
        if image.ndim != 3:
            raise ShapeError(f"an image must be [C, H, W], got {tuple(image.shape)}.")
        return image
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _unit_range(images: Tensor) -> Tensor:
    if images.shape[1] not in (1, 3) or 0 in images.shape:
        raise ShapeError(f"images must be [B, 1 or 3, H, W], got {tuple(images.shape)}.")
    if images.dtype == torch.uint8:
        pixels = images.float() / 255.0
    elif images.is_floating_point():
        pixels = images.float()
        if not bool(((pixels >= 0.0) & (pixels <= 1.0)).all()):
            raise InputError("float images must lie in [0, 1]: do not normalise them beforehand.")
    else:
        raise ShapeError(f"images must be uint8, or float in [0, 1], not {images.dtype}.")
    return pixels.expand(-1, 3, -1, -1)


def tokens(
    tokenizer: Callable[..., Any], captions: Sequence[str], length: int | None
) -> dict[str, Tensor]:
    """Return captions as a text tower takes them.

    Args:
        tokenizer: Of open_clip (captions to a tensor) or of transformers (to a dictionary).
        captions: The texts; a longer one is cut.
        length: Tokens a text tower of transformers takes; None for open_clip, which knows.

    Returns:
        ``input_ids`` [B, T], int64, and of transformers also ``attention_mask``.

    Raises:
        InputError: If ``captions`` is one string, or empty.
    """
    if isinstance(captions, str) or not len(captions):
        raise InputError("captions must be a list of at least one text.")
    if hasattr(tokenizer, "batch_decode") and hasattr(tokenizer, "pad"):  # transformers
        found = tokenizer(
            list(captions),
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        return {name: found[name] for name in ("input_ids", "attention_mask") if name in found}
    return {"input_ids": tokenizer(list(captions))}
