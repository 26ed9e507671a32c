"""The user's classifier, asked and never changed; and the scale between its images and [-1, 1]."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self, override

from cmd_plugin.errors import InputError, ShapeError
from cmd_plugin.networks.names import clean_name

__all__ = ["FrozenClassifier", "PixelRange", "hash_weights"]

Bound = float | Sequence[float]


class PixelRange(nn.Module):
    """The values that black and white have in the images a classifier takes.

    Of images normalised by ``mean`` and ``std`` these are ``(0 - mean) / std`` and
    ``(1 - mean) / std``.

    Args:
        low: Of black; one number or one a channel.
        high: Of white.

    Raises:
        InputError: If a value is not finite, or black is not below white.
    """

    low: Tensor
    high: Tensor

    def __init__(self, low: Bound = -1.0, high: Bound = 1.0) -> None:
        super().__init__()
        ends = [torch.as_tensor(end, dtype=torch.float32).reshape(-1, 1, 1) for end in (low, high)]
        if not (
            all(bool(end.isfinite().all()) for end in ends) and bool((ends[0] < ends[1]).all())
        ):
            raise InputError(f"the values of black must be below those of white: {low} and {high}.")
        self.register_buffer("low", ends[0])
        self.register_buffer("high", ends[1])

    @property
    def middle(self) -> Tensor:
        """The value of mid-grey, [1 or C, 1, 1]."""
        return 0.5 * (self.low + self.high)

    @property
    def half_width(self) -> Tensor:
        """Half of what lies between black and white, [1 or C, 1, 1]."""
        return 0.5 * (self.high - self.low)

    def to_unit(self, images: Tensor) -> Tensor:
        """Images as the generator takes them: black is -1 and white is 1."""
        return (images - self.middle) / self.half_width

    def from_unit(self, images: Tensor) -> Tensor:
        """The inverse of :meth:`to_unit`."""
        return images * self.half_width + self.middle


class FrozenClassifier(nn.Module):
    """A copy of a classifier that stays in evaluation mode and takes no gradients for its weights.

    The network given is left as it is; what is trained around the copy cannot reach it.

    Args:
        network: Maps images [B, C, H, W] to class scores [B, k]; to [B] or [B, 1] if it is the
            logit of the second of two classes.

    Raises:
        InputError: If the network cannot be copied.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        try:
            self.network = copy.deepcopy(network)
        except Exception as error:  # it is a stranger's code
            raise InputError(
                f"the classifier cannot be copied ({type(error).__name__}: {error}): give a plain "
                "module, without compiled parts or hooks that hold files."
            ) from error
        self.network.requires_grad_(False)
        self.eval()

    @override
    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, whatever is asked."""
        return super().train(False)

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Class logits [B, k] of images [B, C, H, W].

        Raises:
            ShapeError: If the network returns something else.
        """
        scores: Any = self.network(images)
        if not isinstance(scores, Tensor) or scores.ndim > 2 or len(scores) != len(images):
            found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ShapeError(
                f"the classifier returned {found} for {len(images)} images: wrap it so that it "
                "returns class scores [B, k]."
            )
        logits: Tensor = scores.reshape(len(images), -1)
        if logits.shape[1] == 1:  # sigmoid(s) is the softmax of (0, s)
            logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
        return logits


def hash_weights(network: nn.Module) -> str:
    """Return the SHA-256 of a network's weights and buffers by cleaned name, as hexadecimal text.

    The same for a network on any device and in any wrapper; another for any other bit.
    """
    digest = hashlib.sha256()
    state = {clean_name(n): t for n, t in network.state_dict().items() if isinstance(t, Tensor)}
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        plain = tensor.detach().cpu().contiguous().flatten()
        digest.update(plain.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
