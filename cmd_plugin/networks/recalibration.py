"""BatchNorm's statistics for the weights a network has now, whoever set them: EMA, SWA, modes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from cmd_plugin.errors import InputError, StateMismatch
from cmd_plugin.networks.measuring import kept_buffers, undisturbed
from cmd_plugin.networks.names import clean_name

__all__ = ["load_statistics", "recalibrate", "recalibrated", "running_statistics"]


def recalibrate(model: nn.Module, batches: Iterable[object] | None) -> None:
    """Re-estimate BatchNorm's running statistics, in place, for the weights the model has now.

    They become the plain mean over the batches (each counts the same) of what the layers see in
    training mode, as in :func:`torch.optim.swa_utils.update_bn`. Nothing else changes, also on an
    error: training flags, momenta, all other buffers, gradients and the global random state.
    Without BatchNorm layers that keep statistics nothing happens, and no batch is taken.

    Args:
        model: Any network, for example one that holds averaged weights.
        batches: Input batches, tensors of what the model takes; of a list or tuple the first entry
            is the input.

    Raises:
        InputError: If there is no batch, or one is not a tensor; the statistics are as before then.
    """
    layers = _layers(model)
    if not layers:
        return
    # Also of layers without statistics, whose momentum update_bn changes as well.
    momenta = {m: m.momentum for m in model.modules() if isinstance(m, _BatchNorm)}
    statistics = [buffer for layer in layers for buffer in layer.buffers(recurse=False)]
    with undisturbed(model, evaluation=False):
        try:
            update_bn(_checked(batches), model, _device(model))
        finally:
            for layer, momentum in momenta.items():
                layer.momentum = momentum
        estimates = [buffer.clone() for buffer in statistics]
    with torch.no_grad():
        for buffer, estimate in zip(statistics, estimates, strict=True):
            buffer.copy_(estimate)


@contextmanager
def recalibrated(model: nn.Module, batches: Iterable[object] | None) -> Iterator[None]:
    """Recalibrate a model inside the ``with`` block; the old statistics are back on exit.

    Args:
        model: The model.
        batches: Input batches, see :func:`recalibrate`.

    Raises:
        InputError: As :func:`recalibrate`.
    """
    with kept_buffers(_layers(model)):
        recalibrate(model, batches)
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


def _checked(batches: Iterable[object] | None) -> Iterator[object]:
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
