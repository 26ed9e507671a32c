"""How every job that trains with Lightning starts, goes on after a stop, and ends."""

from __future__ import annotations

import inspect
import math
import time
import zipfile
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from cmd_plugin.callbacks._lightning import Callback
from cmd_plugin.data import EpochShuffle
from cmd_plugin.errors import InputError
from cmd_plugin.runs.process import kept_interrupt_handler, quiet_lightning

__all__ = ["ClockedRecorder", "TrainingClock", "diverged", "finished_epochs", "fit", "make_trainer"]


def diverged(what: str, epoch: int, seed: int, lr: float) -> InputError:
    """Return the error for a training run that left the finite numbers."""
    return InputError(
        f"training diverged: {what} in epoch {epoch} of seed {seed}; lower --lr (it is {lr:g}) "
        "and start again with --overwrite."
    )


def make_trainer(
    accelerator: str, epochs: int, callbacks: list[Any], root: Path, *, precision: str = "32-true"
) -> pl.Trainer:
    """Return a trainer that trains and does nothing else: no files, no bar, no summary.

    Args:
        accelerator: Lightning's name of the device.
        epochs: Epochs to train.
        callbacks: In the order they shall be called.
        root: Folder Lightning may take for its own.
        precision: Lightning's name of the number format.
    """
    with quiet_lightning():
        return pl.Trainer(
            accelerator=accelerator,
            devices=1,
            max_epochs=epochs,
            precision=precision,  # type: ignore[arg-type]
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=root,
        )


def finished_epochs(checkpoint: Path, loader: DataLoader[tuple[Tensor, Tensor]]) -> int:
    """Return how many epochs a checkpoint has behind it, and put the loader's order in line.

    Args:
        checkpoint: What an earlier process left; 0 epochs if there is none.
        loader: The training batches.

    Raises:
        InputError: If the checkpoint is damaged.
    """
    if not checkpoint.exists():
        return 0
    try:
        # torch does not look at the checksums it writes: a flipped bit would train on.
        with zipfile.ZipFile(checkpoint) as archive:
            bad = archive.testzip()
        if bad is not None:
            raise ValueError(f"{bad} does not match its checksum")
        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        finished = int(content["epoch"]) + 1
    except Exception as error:  # whatever is wrong with the file, the advice is the same
        raise InputError(
            f"{checkpoint} is damaged ({type(error).__name__}: {error}): delete it to train this "
            "part from its start."
        ) from error
    # Worker processes fetch their first batches before Lightning announces the epoch.
    if isinstance(loader.sampler, EpochShuffle):
        loader.sampler.set_epoch(finished)
    return finished


def fit(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    loader: DataLoader[tuple[Tensor, Tensor]],
    checkpoint: Path,
) -> None:
    """Train, from a checkpoint of ours if it is there.

    Raises:
        KeyboardInterrupt: If the user stops it, whatever Lightning makes of that.
    """
    options: dict[str, Any] = {}
    if "weights_only" in inspect.signature(trainer.fit).parameters:  # Lightning 2.6 and later
        options["weights_only"] = True
    start = checkpoint if checkpoint.exists() else None
    try:
        with quiet_lightning(), kept_interrupt_handler():
            trainer.fit(module, loader, ckpt_path=start, **options)
    except SystemExit as error:  # what Lightning makes of an interrupt
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise
    if trainer.interrupted:  # older Lightning swallows the interrupt
        raise KeyboardInterrupt


class TrainingClock(Callback):
    """Stops the time at the end of each batch, before any other callback works.

    Place it first and what records last: the recorder starts the time again. Also watches that the
    loss stays finite.

    Attributes:
        seconds: Time spent in training batches and in fetching them; no callbacks, no evaluation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        self._started: float | None = None
        self._loss: Tensor | None = None

    def start(self) -> None:
        """Let the time run."""
        self._started = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"].detach()
        self._loss = loss if self._loss is None else self._loss + loss
        if trainer.is_last_batch:
            if loss.is_cuda:  # work still queued belongs to training, not to what comes after
                torch.cuda.synchronize(loss.device)
            if not math.isfinite(float(self._loss)):
                what = f"the training loss is {float(loss)}"
                raise diverged(what, trainer.current_epoch, pl_module.seed, pl_module.lr)
            self._loss = None
        if self._started is not None:
            self.seconds += time.perf_counter() - self._started
            self._started = None


class ClockedRecorder(Callback):
    """What records a training: it starts the clock anew, and keeps its seconds in checkpoints.

    Args:
        clock: The clock.
    """

    def __init__(self, clock: TrainingClock) -> None:
        super().__init__()
        self.clock = clock

    @override
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.clock.start()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"training_seconds": self.clock.seconds}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.clock.seconds = state_dict["training_seconds"]
