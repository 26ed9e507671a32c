"""How every training of this room starts, goes on after a stop, and ends."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cmd_plugin.data import EpochShuffle
from cmd_plugin.errors import InputError
from cmd_plugin.training._environment import kept_interrupt_handler
from cmd_plugin.training.folder import RunFolder

__all__ = ["fit", "prepare_resume"]


def prepare_resume(
    folder: RunFolder, seed: int, loader: DataLoader[tuple[Tensor, Tensor]]
) -> Path | None:
    """Return the checkpoint to go on from, if any; drop rows of epochs to be trained again.

    Raises:
        InputError: If the checkpoint is damaged.
    """
    checkpoint = folder.last_checkpoint(seed)
    if not checkpoint.exists():
        folder.forget_from(seed, 0)
        return None
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        finished = int(content["epoch"]) + 1
    except Exception as error:  # whatever is wrong with the file, the advice is the same
        message = f"{checkpoint} is damaged ({error}): delete it to train this seed from the start."
        raise InputError(message) from error
    folder.forget_from(seed, finished)
    # Worker processes fetch their first batches before Lightning announces the epoch.
    if isinstance(loader.sampler, EpochShuffle):
        loader.sampler.set_epoch(finished)
    return checkpoint


def fit(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    loader: DataLoader[tuple[Tensor, Tensor]],
    checkpoint: Path | None,
) -> None:
    """Train, from a checkpoint of ours if there is one.

    Raises:
        KeyboardInterrupt: If the user stops it, whatever Lightning makes of that.
    """
    options: dict[str, Any] = {}
    if "weights_only" in inspect.signature(trainer.fit).parameters:  # Lightning 2.6 and later
        options["weights_only"] = True
    try:
        with kept_interrupt_handler():
            trainer.fit(module, loader, ckpt_path=checkpoint, **options)
    except SystemExit as error:  # what Lightning makes of an interrupt
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise
    if trainer.interrupted:  # older Lightning swallows the interrupt
        raise KeyboardInterrupt
