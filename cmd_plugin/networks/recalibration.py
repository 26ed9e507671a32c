"""BatchNorm's statistics for the weights a network has now, whoever set them: EMA, SWA, modes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from cmd_plugin.errors import InputError
from cmd_plugin.networks.measuring import kept_buffers, undisturbed

__all__ = ["recalibrate", "recalibrated"]


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
