"""Show modelled weights in a live model for a while, and put the raw ones back bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from cmd_plugin.errors import InputError
from cmd_plugin.kernels import FlatView, swap_out
from cmd_plugin.modes.tracker import Tracker

__all__ = ["keep_tensors", "modelled", "recalibrated", "statistics_of"]


def statistics_of(model: nn.Module) -> list[Tensor]:
    """Return the buffers of all normalisation layers that keep running statistics."""
    return [
        buffer
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        for buffer in module.buffers(recurse=False)
    ]


@contextmanager
def keep_tensors(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Restore the values of tensors on exit, bit for bit, in place, also when the body raises."""
    distinct = {id(tensor): tensor for tensor in tensors}.values()
    kept = [(tensor, tensor.detach().clone()) for tensor in distinct]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, backup in kept:
                tensor.detach().copy_(backup)


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


@contextmanager
def recalibrated(model: nn.Module, batches: Iterable[object] | None) -> Iterator[None]:
    """Re-estimate BatchNorm's running statistics for the weights the model has now.

    They are restored on exit. Training flags, momenta, all other buffers and the global random
    generators are left as they were. Without BatchNorm layers nothing happens.

    Args:
        model: The model.
        batches: Input batches; of a list or tuple the first entry is the input.

    Raises:
        InputError: If the model has BatchNorm layers but there are no batches.
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
    with keep_tensors(buffer for layer in layers for buffer in layer.buffers()):
        _estimate(model, layers, batches)
        yield


def _estimate(
    model: nn.Module, layers: list[nn.modules.batchnorm._BatchNorm], batches: Iterable[object]
) -> None:
    """Fill the running statistics; nothing else of the model is changed, also on an error."""
    parameter = next(model.parameters(), None)
    device = None if parameter is None else parameter.device
    cuda = [device] if device is not None and device.type == "cuda" else []
    training = {module: module.training for module in model.modules()}
    momenta = {layer: layer.momentum for layer in layers}
    own = {id(buffer) for layer in layers for buffer in layer.buffers()}
    others = [buffer for buffer in model.buffers() if id(buffer) not in own]
    seen = 0

    def counted() -> Iterator[object]:
        nonlocal seen
        for batch in batches:
            seen += 1
            yield batch

    try:
        with keep_tensors(others), torch.random.fork_rng(devices=cuda):
            update_bn(counted(), model, device)
    finally:
        for layer, momentum in momenta.items():
            layer.momentum = momentum
        for module, mode in training.items():
            module.training = mode
    if not seen:
        raise InputError(
            "recalibrate gave no batch, so BatchNorm's statistics would be lost: give a list, not "
            "an iterator that is used up."
        )
