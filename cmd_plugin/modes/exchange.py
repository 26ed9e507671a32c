"""Show modelled weights in a live model for a while, and put the raw ones back bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cmd_plugin.kernels import FlatView, swap_out
from cmd_plugin.modes.tracker import Tracker

__all__ = ["modelled", "normalisations"]


def normalisations(model: nn.Module) -> list[nn.Module]:
    """Return all layers that keep running statistics, of batches or of instances."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]


@contextmanager
def modelled(weights: FlatView, tensors: Sequence[Tensor], tracker: Tracker) -> Iterator[None]:
    """Write the modelled weights into a model; on exit the raw ones are back, bit for bit.

    Args:
        weights: A view of the model's weights.
        tensors: The tensors it was made of. If the body moves or converts them, the raw weights
            go where they are then.
        tracker: The modes.
    """
    with torch.inference_mode(False), torch.no_grad():
        backup = weights.empty_like()
        tracker.swap_in(weights, backup)
    try:
        yield
    finally:
        with torch.inference_mode(False), torch.no_grad():
            if weights.is_current(tensors):
                swap_out(weights, backup)
            else:
                for tensor, kept in zip(tensors, backup.tensors, strict=True):
                    tensor.detach().copy_(kept)
