"""From images to what a diffusion model sees and back, and from images to embeddings.

Images here are [B, C, H, W] in [-1, 1], the range diffusion models are trained in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from cmd_plugin.errors import InputError, NonFiniteError, ShapeError
from cmd_plugin.networks import undisturbed

__all__ = [
    "Codec",
    "Embed",
    "LatentCodec",
    "PixelCodec",
    "check_range",
    "clip_embedding",
    "codec_of",
    "flat_embedding",
    "to_square",
]

Embed = Callable[[Tensor], Tensor]
"""Maps images [B, C, H, W] in [0, 1] to embeddings [B, F]."""

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Codec(Protocol):
    """Maps images to what a model sees, and back."""

    @property
    def scale(self) -> float:
        """What the autoencoder's own latents are multiplied by before the model sees them."""

    def encode(self, images: Tensor) -> Tensor:
        """Return what the model sees of images [B, C, H, W] in [-1, 1]."""

    def decode(self, seen: Tensor) -> Tensor:
        """Return the images of what a model sees; not clamped."""


class PixelCodec:
    """A model that sees pixels."""

    scale = 1.0

    def encode(self, images: Tensor) -> Tensor:
        """Return the images themselves."""
        check_range(images)
        return images

    def decode(self, seen: Tensor) -> Tensor:
        """Return the images themselves."""
        return seen


class LatentCodec:
    """A model that sees the latents of an autoencoder of diffusers.

    The mean of the encoder's distribution is taken, not a sample of it, so that scores repeat.

    Args:
        autoencoder: ``AutoencoderKL``, ``VQModel``, ``AutoencoderTiny`` or alike; left as it is.
        batch_size: Images at a time: decoding needs much memory.
    """

    def __init__(self, autoencoder: Any, batch_size: int = 16) -> None:
        config = autoencoder.config
        self.autoencoder, self.batch_size = autoencoder, batch_size
        self.scale = float(config.get("scaling_factor") or 1.0)
        self.shift = float(config.get("shift_factor") or 0.0)
        first = next(autoencoder.parameters())
        self._dtype, self._device = first.dtype, first.device

    def encode(self, images: Tensor) -> Tensor:
        """Return the scaled latents of images, float32.

        Raises:
            ShapeError: If the images are not what the autoencoder takes.
            InputError: If they are out of range.
        """
        check_range(images)
        wanted = int(self.autoencoder.config["in_channels"])
        if images.shape[1] != wanted:
            raise ShapeError(
                f"the autoencoder takes images of {wanted} channels, got {images.shape[1]}: "
                "convert them first."
            )

        def latents(part: Tensor) -> Tensor:
            found = self.autoencoder.encode(part)
            if hasattr(found, "latent_dist"):
                return found.latent_dist.mode()  # type: ignore[no-any-return]
            return found.latents  # type: ignore[no-any-return]

        return (self._by_parts(latents, images) - self.shift) * self.scale

    def decode(self, seen: Tensor) -> Tensor:
        """Return the images of scaled latents, float32, not clamped."""
        return self._by_parts(
            lambda part: self.autoencoder.decode(part).sample, seen / self.scale + self.shift
        )

    def _by_parts(self, run: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        with undisturbed(self.autoencoder, buffers=False):
            return torch.cat(
                [
                    run(part.to(self._device, self._dtype)).float()
                    for part in torch.split(images, self.batch_size)
                ]
            )


def codec_of(pipeline: Any) -> Codec:
    """Return the codec of a pipeline: its autoencoder's, or pixels if it has none."""
    for name in ("vae", "vqvae"):
        autoencoder = getattr(pipeline, name, None)
        if autoencoder is not None:
            return LatentCodec(autoencoder)
    return PixelCodec()


def check_range(images: Tensor) -> None:
    """Raise unless images are [B, C, H, W] (or flat) floats in [-1, 1].

    Raises:
        ShapeError: If they are not floating point or have no axis of images.
        NonFiniteError: If they hold NaN or infinite values.
        InputError: If they are out of range.
    """
    if images.ndim < 2 or not images.is_floating_point() or not images.numel():
        raise ShapeError(
            f"images must be [B, C, H, W] in floating point, got {tuple(images.shape)} "
            f"{images.dtype}: divide bytes by 127.5 and take 1 away."
        )
    low, high = float(images.amin()), float(images.amax())
    if not bool(images.isfinite().all()):
        raise NonFiniteError("images hold NaN or infinite values.")
    if low < -1.001 or high > 1.001:
        raise InputError(
            f"images must lie in [-1, 1], and these reach from {low:.3g} to {high:.3g}: rescale "
            "them."
        )


def to_square(images: Tensor, size: int) -> Tensor:
    """Resize the shorter side to three pixels more than ``size`` and cut out the middle.

    This is what the authors of the manifold-bias detector do (515, then 512).

    Args:
        images: [B, C, H, W].
        size: Side of the result.

    Returns:
        [B, C, size, size].
    """
    height, width = images.shape[-2:]
    factor = (size + 3) / min(height, width)
    shape = (max(round(height * factor), size), max(round(width * factor), size))
    if shape != (height, width):
        images = interpolate(images, shape, mode="bilinear", antialias=True, align_corners=False)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return images[..., top : top + size, left : left + size]


def flat_embedding(images: Tensor) -> Tensor:
    """Return the pixels themselves, [B, C H W]."""
    return images.flatten(1)


def clip_embedding(tower: Any) -> Embed:
    """Return what a CLIP image tower of transformers makes of images, un-normalised.

    Args:
        tower: ``CLIPModel`` or ``CLIPVisionModelWithProjection``; left as it is.
    """
    config = getattr(tower.config, "vision_config", tower.config)
    size = int(config.image_size)
    first = next(tower.parameters())
    mean = torch.tensor(_CLIP_MEAN).reshape(1, 3, 1, 1)
    std = torch.tensor(_CLIP_STD).reshape(1, 3, 1, 1)

    def embed(images: Tensor) -> Tensor:
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        if images.shape[1] != 3:
            raise ShapeError(f"CLIP takes images of 1 or 3 channels, got {images.shape[1]}.")
        resized = interpolate(
            images.float(), (size, size), mode="bicubic", antialias=True, align_corners=False
        ).clamp(0, 1)
        pixels = (resized - mean.to(resized)) / std.to(resized)
        with undisturbed(tower, buffers=False):
            run = getattr(tower, "get_image_features", tower)
            found = run(pixel_values=pixels.to(first.device, first.dtype))
        for name in ("image_embeds", "pooler_output"):  # by version and class of transformers
            found = getattr(found, name, found)
        return found.float()  # type: ignore[no-any-return]

    return embed
