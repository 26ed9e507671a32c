"""Show modelled weights in a live model for a while, and put the raw ones back bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from cmd_plugin.errors import InputError

__all__ = ["keep_tensors", "recalibrated"]


@contextmanager
def keep_tensors(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Restore the values of tensors on exit, bit for bit and in place, also when the body raises."""
    kept = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, backup in kept:
                tensor.detach().copy_(backup)


@contextmanager
def recalibrated(model: nn.Module, batches: Iterable[object] | None) -> Iterator[None]:
    """Re-estimate BatchNorm's running statistics from ``batches`` for the weights the model has now; restore them on exit.

    The global random generators are left as they were. Without BatchNorm layers nothing happens.

    Raises:
        InputError: If the model has BatchNorm layers but no batches are given.
    """
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.track_running_stats
    ]
    if not layers:
        yield
        return
    if batches is None:
        raise InputError(
            "buffers='recalibrate' needs recalibrate=batches (an iterable of input batches)."
        )
    parameter = next(model.parameters(), None)
    device = None if parameter is None else parameter.device
    cuda = [device] if device is not None and device.type == "cuda" else []
    training = {module: module.training for module in model.modules()}
    with keep_tensors(buffer for layer in layers for buffer in layer.buffers()):
        with torch.random.fork_rng(devices=cuda) if cuda else torch.random.fork_rng(devices=[]):
            update_bn(batches, model, device)
        for module, mode in training.items():
            module.training = mode
        with nullcontext():
            yield
