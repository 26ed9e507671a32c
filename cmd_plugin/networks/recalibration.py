"""BatchNorm's statistics for the weights a network has now, whoever set them: EMA, SWA, modes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cmd_plugin.errors import InputError, StateMismatch
from cmd_plugin.networks.measuring import kept_buffers, undisturbed
from cmd_plugin.networks.names import clean_name

__all__ = ["load_statistics", "recalibrate", "recalibrated", "running_statistics"]


def recalibrate(
    model: nn.Module,
    batches: Iterable[object] | None,
    *,
    frozen: Collection[nn.Module] = (),
) -> None:
    """Re-estimate BatchNorm's running statistics, in place, for the weights the model has now.

    They become the plain mean over the batches (each counts the same) of what the layers see in
    training mode, as in :func:`torch.optim.swa_utils.update_bn`. Nothing else changes, also on an
    error: training flags, momenta, all other buffers, gradients and the global random state.
    Without BatchNorm layers that keep statistics nothing happens, and no batch is taken.

    Layers that are in evaluation mode in training keep their statistics, and use them meanwhile:
    those that the model's own ``train()`` leaves there, and those in ``frozen``.

    Args:
        model: Any network, for example one that holds averaged weights.
        batches: Input batches, tensors of what the model takes; of a list or tuple the first entry
            is the input.
        frozen: Modules of the model to have in evaluation mode, each for itself.

    Raises:
        InputError: If there is no batch, or one is not a tensor; the statistics are as before then.
    """
    if not _layers(model):
        return
    with undisturbed(model, evaluation=False):
        model.train()
        for module in frozen:
            module.training = False
        layers = [layer for layer in _layers(model) if layer.training]
        if not layers:
            return
        momenta = [layer.momentum for layer in layers]
        device = _device(model)
        try:
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None  # the mean over all batches
            for batch in _checked(batches):
                model(batch if device is None else batch.to(device))
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum
        statistics = [buffer for layer in layers for buffer in layer.buffers(recurse=False)]
        estimates = [buffer.clone() for buffer in statistics]
    with torch.no_grad():
        for buffer, estimate in zip(statistics, estimates, strict=True):
            buffer.copy_(estimate)


@contextmanager
def recalibrated(
    model: nn.Module,
    batches: Iterable[object] | None,
    *,
    frozen: Collection[nn.Module] = (),
) -> Iterator[None]:
    """Recalibrate a model inside the ``with`` block; the old statistics are back on exit.

    Args:
        model: The model.
        batches: Input batches, see :func:`recalibrate`.
        frozen: Modules to have in evaluation mode meanwhile, see :func:`recalibrate`.

    Raises:
        InputError: As :func:`recalibrate`.
    """
    with kept_buffers(_layers(model)):
        recalibrate(model, batches, frozen=frozen)
        yield


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return BatchNorm's running statistics, the buffers themselves, by cleaned name."""
    return {
        clean_name(f"{name}.{key}" if name else key): buffer
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm) and layer.track_running_stats
        for key, buffer in layer.named_buffers(recurse=False)
    }


def load_statistics(model: nn.Module, statistics: Mapping[str, Tensor]) -> None:
    """Write running statistics into a model, in place.

    Args:
        model: The model.
        statistics: By the names of :func:`running_statistics`, on any device.

    Raises:
        StateMismatch: If they are not those of this model's BatchNorm layers, all of them; nothing
            is written then.
    """
    own = running_statistics(model)
    for name in own.keys() | statistics.keys():
        given = statistics[name].shape if name in statistics else None
        if name not in own or own[name].shape != given:
            raise StateMismatch(
                f"the statistics are not this model's: {name!r} has the shape "
                f"{None if given is None else tuple(given)} in them and "
                f"{tuple(own[name].shape) if name in own else None} in the model."
            )
    with torch.no_grad():
        for name, buffer in own.items():
            buffer.copy_(statistics[name])


def _layers(model: nn.Module) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


def _device(model: nn.Module) -> torch.device | None:
    parameter = next(model.parameters(), None)
    return None if parameter is None else parameter.device


def _checked(batches: Iterable[object] | None) -> Iterator[Any]:
    """The inputs alone; an error where they are none, or no tensors."""
    if batches is None:
        raise InputError(
            "to recalibrate BatchNorm's statistics, batches are needed: give recalibrate an "
            "iterable of input batches."
        )
    empty = True
    for batch in batches:
        entry = batch[0] if isinstance(batch, (list, tuple)) and batch else batch
        if not hasattr(entry, "to"):  # a tensor, or a container that moves like one
            raise InputError(
                f"recalibrate got a batch whose input is of type {type(entry).__name__}: give "
                "tensors, or tuples whose first entry is one."
            )
        empty = False
        yield entry
    if empty:
        raise InputError(
            "recalibrate gave no batch, so BatchNorm's statistics would be lost: give a list, not "
            "an iterator that is used up."
        )
