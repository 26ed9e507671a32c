"""Questions about a running Trainer that more than one hook asks."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cmd_plugin.errors import InputError, PluginError
from cmd_plugin.modes.layout import clean_name

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = [
    "broadcast_from_rank_zero",
    "buffers_of_rank_zero",
    "epoch_is_over",
    "planned_snapshots",
    "refuse_sharded",
    "resolve_warmup",
    "run_before_monitors",
    "runs",
    "warn_when_too_short",
]

_logger = logging.getLogger("cmd_plugin.callbacks.cmd")  # of the callback the user knows

_SHARDED = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy")


def runs(trainer: Trainer, function: str) -> bool:
    """Whether the trainer is inside ``fit``, ``validate``, ``test`` or ``predict``."""
    return getattr(trainer.state.fn, "value", None) == function


def refuse_sharded(trainer: Trainer, who: str) -> None:
    """Raise if the strategy splits the weights over the processes.

    Raises:
        PluginError: Under FSDP, ModelParallel and DeepSpeed, in either Lightning distribution.
    """
    names = {kind.__name__ for kind in type(trainer.strategy).__mro__}
    sharded = next((name for name in _SHARDED if name in names), None)
    if sharded is not None:
        message = (
            f"{who} needs the whole model in every process, which {sharded} does not keep: use "
            "strategy='ddp' or 'auto', or leave the callback out."
        )
        raise PluginError(message)


def run_before_monitors(trainer: Trainer, callback: object, prefix: str) -> None:
    """Move a callback ahead of those that monitor one of its metrics, or they would not find it."""
    callbacks: list[Any] = list(trainer.callbacks)  # type: ignore[attr-defined]
    mine = callbacks.index(callback)
    for place, other in enumerate(callbacks[:mine]):
        monitor = getattr(other, "monitor", None)
        if isinstance(monitor, str) and monitor.startswith(prefix):
            callbacks.insert(place, callbacks.pop(mine))
            trainer.callbacks = callbacks  # type: ignore[attr-defined]
            return


def epoch_is_over(trainer: Trainer, batch_idx: int | None = None) -> bool:
    """Whether the batch that just ended is known to be the last one of its epoch."""
    if trainer.is_last_batch:
        return True
    return batch_idx is not None and batch_idx + 1 >= trainer.num_training_batches


def planned_snapshots(
    trainer: Trainer, every_n_epochs: int, every_n_steps: int | None
) -> float | None:
    """How many snapshots the run will give: a whole number, inf, or None when it cannot be told.

    Ask in ``on_train_start`` or later, when the training data are set up: asking earlier would set
    them up at another place of the random stream.
    """
    batches = trainer.num_training_batches / trainer.accumulate_grad_batches
    steps_per_epoch = math.ceil(batches) if math.isfinite(batches) else math.inf
    # With manual optimization, one batch may take any number of steps.
    countable = trainer.lightning_module.automatic_optimization and steps_per_epoch > 0
    epochs = math.inf if trainer.max_epochs in (None, -1) else float(trainer.max_epochs or 0)
    steps = math.inf if trainer.max_steps == -1 else float(trainer.max_steps)
    if every_n_steps is not None:
        if not countable and steps == math.inf:
            return None
        return min(steps, epochs * steps_per_epoch if epochs else 0.0) // every_n_steps
    if steps != math.inf:
        if not countable:
            return None
        epochs = min(epochs, math.ceil(steps / steps_per_epoch) if steps else 0.0)
    return epochs // every_n_epochs if math.isfinite(epochs) else epochs


def warn_when_too_short(
    trainer: Trainer, every_n_epochs: int, every_n_steps: int | None, needed: int
) -> None:
    """Warn if the run is known to end before ``needed`` snapshots are taken."""
    planned = planned_snapshots(trainer, every_n_epochs, every_n_steps)
    if planned is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    if planned < needed:
        _logger.warning(
            "The run plans %d snapshots and the fit needs %d: nothing will be modelled. Lower "
            "warmup, or take snapshots more often.",
            planned,
            needed,
        )


def resolve_warmup(fraction: float, planned: float | None) -> int:
    """Turn a fraction of the planned snapshots into the warm-up F, at least 2.

    Raises:
        InputError: If the run has no known end.
    """
    if planned is None or not math.isfinite(planned):
        message = (
            f"warmup={fraction} is a fraction of a run whose number of snapshots is not known "
            "beforehand: give warmup as a number of snapshots, or set max_epochs or max_steps."
        )
        raise InputError(message)
    # One snapshot has to be left, because the one after the warm-up triggers the fit.
    return max(2, min(round(fraction * planned), int(planned) - 1))


def broadcast_from_rank_zero(
    trainer: Trainer, pl_module: LightningModule
) -> Callable[[Tensor], Tensor] | None:
    """A function that replaces a tensor by rank 0's, or None in a run of one process."""
    if trainer.world_size <= 1:
        return None
    return _Broadcast(pl_module.device)


class _Broadcast:
    """Rank 0's tensor for everyone, on the device and in the memory it was asked for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @torch.inference_mode(mode=False)
    def __call__(self, tensor: Tensor) -> Tensor:
        # NCCL cannot send host memory, and a collective may only write to plain contiguous memory.
        on_device = torch.distributed.get_backend() == "nccl"
        sent = tensor.detach().to(self._device if on_device else "cpu", copy=True).contiguous()
        torch.distributed.broadcast(sent, src=0)
        return sent.to(tensor.device)


@contextmanager
def buffers_of_rank_zero(
    trainer: Trainer, pl_module: LightningModule, names: Collection[str]
) -> Iterator[None]:
    """Give every process rank 0's values of the named buffers, and its own back afterwards.

    Under DDP the parameters agree, but each process has BatchNorm statistics of its own batches
    until the next forward pass: read as they are, they would give every process another model.
    """
    buffers = [b for name, b in pl_module.named_buffers() if clean_name(name) in set(names)]
    if trainer.world_size <= 1 or not buffers:
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        own = torch.cat([buffer.detach().flatten().double() for buffer in buffers])
        common = _Broadcast(pl_module.device)(own)
        try:
            _write(buffers, common)
            yield
        finally:
            _write(buffers, own)


def _write(tensors: list[Tensor], values: Tensor) -> None:
    parts = torch.split(values, [tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view(tensor.shape))
