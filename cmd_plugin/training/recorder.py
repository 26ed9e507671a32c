"""Callbacks that measure a comparison: pure training time, and all variants after each epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import override

from cmd_plugin.callbacks import CMDCallback
from cmd_plugin.callbacks._lightning import Callback
from cmd_plugin.errors import InputError
from cmd_plugin.networks import Score, evaluate
from cmd_plugin.training.averages import WeightAverages
from cmd_plugin.training.folder import Row, RunFolder, write_atomically

__all__ = ["VARIANTS", "Progress", "Recorder", "TrainingClock", "diverged"]

VARIANTS = ("raw", "ema", "swa", "cmd")

_PROGRESS_PERIOD_S = 0.1


@dataclass(frozen=True)
class Progress:
    """Where a comparison is.

    Attributes:
        epochs_done: Finished epochs over all seeds; fractions count the present epoch's batches.
        epochs: Epochs of all seeds together.
        seed: Seed being trained.
        epoch: Epoch being trained, from 0.
        scores: Latest scores of this seed's variants.
        training: Which training of the seed it is, `online` or `embedded`.
    """

    epochs_done: float
    epochs: int
    seed: int
    epoch: int
    scores: dict[str, Score]
    training: str = "online"


def diverged(what: str, epoch: int, seed: int, lr: float) -> InputError:
    """The error for a training run that left the finite numbers."""
    message = (
        f"training diverged: {what} in epoch {epoch} of seed {seed}; lower --lr (it is {lr:g}) "
        "and start again."
    )
    return InputError(message)


class TrainingClock(Callback):
    """Stops the time at the end of each batch, before any other callback works.

    Place it first and the :class:`Recorder` last: the recorder starts the time again. Also watches
    that the loss stays finite.

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


class Recorder(Callback):
    """After each epoch: evaluates all variants, appends their rows, writes the checkpoints.

    Args:
        folder: Where rows and checkpoints go.
        batches: The held-out set, iterated afresh for every variant.
        clock: The clock it starts.
        averages: Gives `ema` and `swa`.
        cmd: Gives `cmd`.
        keep_weights: Whether to keep every epoch's weights and the matrix that the modes were made
            from (done for the first seed of a comparison).
        report: Called with the epoch, the share of it that is done, and the latest scores.

    Attributes:
        evaluation_seconds: Time spent in evaluations.
        cmd_seconds: Time the CMD callback spent, also before a resume.
        peak_state_bytes: Largest state the CMD callback held after an epoch.
    """

    def __init__(
        self,
        folder: RunFolder,
        batches: Iterable[tuple[Tensor, Tensor]],
        clock: TrainingClock,
        averages: WeightAverages,
        cmd: CMDCallback,
        *,
        keep_weights: bool,
        report: Callable[[int, float, dict[str, Score]], None],
    ) -> None:
        super().__init__()
        self.folder = folder
        self.batches = batches
        self.clock = clock
        self.averages = averages
        self.cmd = cmd
        self.keep_weights = keep_weights
        self.report = report
        self.evaluation_seconds = 0.0
        self.peak_state_bytes = 0
        self._cmd_seconds_before = 0.0
        self._scores: dict[str, Score] = {}
        self._reported = 0.0

    @property
    def cmd_seconds(self) -> float:
        """Time the CMD callback spent, also before a resume."""
        return self._cmd_seconds_before + self.cmd.seconds

    @override
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.clock.start()

    @override
    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        if now - self._reported > _PROGRESS_PERIOD_S:
            self._reported = now
            share = (batch_idx + 1) / trainer.num_training_batches
            self.report(trainer.current_epoch, share, self._scores)
        if not trainer.is_last_batch:
            self.clock.start()

    @override
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        epoch, seed = trainer.current_epoch, pl_module.seed
        started = time.perf_counter()
        self._scores = self._evaluate(trainer, pl_module)
        if not math.isfinite(self._scores["raw"].loss):
            what = f"the held-out loss is {self._scores['raw'].loss}"
            raise diverged(what, epoch, seed, pl_module.lr)
        self.evaluation_seconds += time.perf_counter() - started
        modes = self.cmd.modes
        if modes is not None:
            self.peak_state_bytes = max(self.peak_state_bytes, modes.state_bytes)

        self.folder.append([Row(seed, epoch, name, s) for name, s in self._scores.items()])
        self.folder.seed_folder(seed).mkdir(parents=True, exist_ok=True)
        if self.keep_weights:
            self.folder.checkpoints.mkdir(parents=True, exist_ok=True)
            _save(trainer, self.folder.epoch_checkpoint(epoch), weights_only=True)
            self._keep_correlation(seed)
            if epoch == trainer.max_epochs - 1:
                self._keep_model(trainer, pl_module)
        # Last: what this file says is finished has to be finished.
        _save(trainer, self.folder.last_checkpoint(seed), weights_only=False)
        self.report(epoch, 1.0, self._scores)

    def _evaluate(self, trainer: Any, pl_module: Any) -> dict[str, Score]:
        device = pl_module.device
        scores = {"raw": evaluate(pl_module.model, self.batches, device)}
        for name, averaged in (("ema", self.averages.ema), ("swa", self.averages.swa)):
            if averaged is not None:
                scores[name] = evaluate(averaged, self.batches, device)
        try:
            if self.cmd.show_modelled(trainer, pl_module):
                scores["cmd"] = evaluate(pl_module.model, self.batches, device)
        finally:
            self.cmd.hide_modelled()
        return scores

    def _keep_correlation(self, seed: int) -> None:
        path = self.folder.correlation(seed)
        if self.cmd.modes is None or self.cmd.modes.correlation is None or path.exists():
            return
        matrix, labels = self.cmd.modes.correlation
        # It is drawn, not computed with: half precision is plenty.
        tensors = {"correlation": matrix.cpu().half(), "labels": labels.cpu()}
        write_atomically(path, lambda temporary: save_file(tensors, temporary))

    def _keep_model(self, trainer: Any, pl_module: Any) -> None:
        """Write the decomposition and the network with modelled weights, if there are any."""
        modes = self.cmd.modes
        if modes is None or not modes.ready:
            return
        write_atomically(self.folder.modes, modes.decomposition().save)
        self.cmd.show_modelled(trainer, pl_module)
        try:
            # A clone separates entries that share memory, which safetensors refuses.
            weights = {k: v.detach().cpu().clone() for k, v in pl_module.model.state_dict().items()}
        finally:
            self.cmd.hide_modelled()
        weights = {name: tensor.contiguous() for name, tensor in weights.items()}
        write_atomically(self.folder.model, lambda path: save_file(weights, path, {"format": "pt"}))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "training_seconds": self.clock.seconds,
            "evaluation_seconds": self.evaluation_seconds,
            "cmd_seconds": self.cmd_seconds,
            "peak_state_bytes": self.peak_state_bytes,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.clock.seconds = state_dict["training_seconds"]
        self.evaluation_seconds = state_dict["evaluation_seconds"]
        self._cmd_seconds_before = state_dict["cmd_seconds"]
        self.peak_state_bytes = state_dict["peak_state_bytes"]


def _save(trainer: Any, path: Path, *, weights_only: bool) -> None:
    write_atomically(path, lambda temporary: trainer.save_checkpoint(temporary, weights_only))
