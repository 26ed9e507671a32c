"""What tells the generator which class is meant: a code a class, or one of class and noise."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import relu
from typing_extensions import override

__all__ = ["ClassCodes", "NoisyCodes"]

_HIDDEN = 64


class ClassCodes(nn.Embedding):
    """A learnt code for each class.

    Args:
        classes: Number of classes k.
        size: Numbers in a code.
    """

    @override
    def forward(self, classes: Tensor, noise: Tensor | None = None) -> Tensor:
        """Codes [B, size] of classes [B]; there is no noise in them."""
        return super().forward(classes)


class NoisyCodes(nn.Module):
    """Codes of a class and of noise, by the mapping network of DXAI, which is StarGAN v2's.

    Two layers that all classes share and one of each class's own; where theirs are eight of 512
    numbers for 256 pixels, these are for small images. Whoever gives no noise gets that of one
    fixed draw, so that explanations do not change from call to call.

    Args:
        classes: Number of classes k.
        size: Numbers in a code.
        noise: Numbers of noise, from the standard normal distribution.
    """

    usual: Tensor

    def __init__(self, classes: int, size: int, noise: int) -> None:
        super().__init__()
        self.first = nn.Linear(noise, _HIDDEN)
        self.second = nn.Linear(_HIDDEN, _HIDDEN)
        self.own = nn.Linear(_HIDDEN, classes * size)
        self.classes = classes
        self.register_buffer("usual", torch.randn(1, noise))

    @override
    def forward(self, classes: Tensor, noise: Tensor | None = None) -> Tensor:
        """Codes [B, size] of classes [B] and noise [B, noise]; by default the usual noise."""
        if noise is None:
            noise = self.usual.expand(len(classes), -1)
        hidden = relu(self.second(relu(self.first(noise))))
        each = self.own(hidden).unflatten(1, (self.classes, -1))
        found: Tensor = each[torch.arange(len(classes), device=classes.device), classes]
        return found
