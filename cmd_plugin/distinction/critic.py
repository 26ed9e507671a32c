"""The discriminator: tells images from mixtures of branches and, where asked to, their classes."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import leaky_relu
from typing_extensions import override

__all__ = ["Critic"]

_SMALLEST = 4  # it stops halving here
_WIDEST = 4
_SLOPE = 0.2


class Critic(nn.Module):
    """Strided convolutions, a mean over places, and linear heads.

    Args:
        channels: Of the images.
        heads: 1 for real or not; k for real as one of k classes, whose logits are class logits too.
        size: Height and width of the images.
        width: Channels of the first convolution.
    """

    def __init__(self, channels: int, heads: int, size: tuple[int, int], width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1)]
        side, wide, widest = min(size), width, _WIDEST * width
        while side > _SMALLEST:
            wider = min(2 * wide, widest)
            layers.append(nn.Conv2d(wide, wider, 4, stride=2, padding=1))
            side, wide = side // 2, wider
        layers.append(nn.Conv2d(wide, wide, 3, padding=1))
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(wide, heads)

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, heads] of images [B, C, H, W]."""
        x = images
        for layer in self.layers:
            x = leaky_relu(layer(x), _SLOPE)
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits
