"""Questions about a running Trainer that more than one hook asks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cmd_plugin.errors import PluginError
from cmd_plugin.networks.names import clean_name

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = [
    "broadcast_from_rank_zero",
    "buffers_of_rank_zero",
    "check_checkpoints",
    "epoch_is_over",
    "refuse_sharded",
    "run_before_monitors",
    "runs",
    "warn_of_raw_weights",
    "warn_of_unfrozen",
]

_logger = logging.getLogger("cmd_plugin.callbacks.cmd")  # of the callback the user knows

_SHARDED = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy")


def runs(trainer: Trainer, function: str) -> bool:
    """Whether the trainer is inside ``fit``, ``validate``, ``test`` or ``predict``."""
    return getattr(trainer.state.fn, "value", None) == function


def warn_of_raw_weights() -> None:
    """Say that the modelled weights that were asked for do not exist."""
    _logger.warning(
        "No modelled weights for this module (before the fit, or never trained with this "
        "callback): the raw weights are used."
    )


def warn_of_unfrozen(names: Sequence[str]) -> None:
    """Say that weights train which the modes do not follow."""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    _logger.warning(
        "%d tensors were unfrozen after the modes were made and stay as the raw run has them (%s): "
        "beside modelled weights of the others they may do worse. Let requires_grad be set before "
        "the fit, or leave them out by exclude=.",
        len(names),
        shown,
    )


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


def check_checkpoints(trainer: Trainer, weights: str, prefix: str) -> None:
    """See that checkpoints can hold these weights, and are not taken for holding the other ones.

    Args:
        trainer: The trainer.
        weights: ``"raw"`` or ``"modelled"``.
        prefix: What the names of metrics of modelled weights begin with.

    Raises:
        PluginError: If another callback writes the weights of checkpoints as well.
    """
    if weights == "modelled":
        _refuse_rival(trainer)
    elif runs(trainer, "fit"):
        _warn_of_raw_checkpoints(trainer, prefix)


def _refuse_rival(trainer: Trainer) -> None:
    """Raise PluginError if another callback writes the weights of checkpoints as well."""
    others = trainer.callbacks  # type: ignore[attr-defined]
    names = {kind.__name__ for other in others for kind in type(other).__mro__}
    if "WeightAveraging" in names:
        message = (
            "CMDCallback(checkpoint_weights='modelled') and WeightAveraging both want the "
            "state_dict of the checkpoint: use checkpoint_weights='raw'."
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


def _warn_of_raw_checkpoints(trainer: Trainer, prefix: str) -> None:
    """Say what a checkpoint chosen by a modelled metric holds: the raw weights."""
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        monitor = getattr(other, "monitor", None)
        kinds = {kind.__name__ for kind in type(other).__mro__}
        if "ModelCheckpoint" in kinds and isinstance(monitor, str) and monitor.startswith(prefix):
            _logger.warning(
                "ModelCheckpoint monitors %s, a metric of modelled weights, and saves the raw ones "
                "(before the fit the metric repeats the raw value): add checkpoint_weights="
                "'modelled' to save the weights it is chosen by.",
                monitor,
            )


def epoch_is_over(trainer: Trainer, batch_idx: int | None = None) -> bool:
    """Whether the batch that just ended is known to be the last one of its epoch."""
    if trainer.is_last_batch:
        return True
    return batch_idx is not None and batch_idx + 1 >= trainer.num_training_batches


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
