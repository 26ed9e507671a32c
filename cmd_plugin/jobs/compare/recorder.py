"""The callback that measures a comparison: all variants on the held-out set after each epoch."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from cmd_plugin.callbacks import CMDCallback
from cmd_plugin.callbacks._lightning import Callback
from cmd_plugin.jobs.compare.averages import WeightAverages
from cmd_plugin.jobs.compare.files import Row, TrainingFiles
from cmd_plugin.jobs.fitting import TrainingClock, diverged
from cmd_plugin.networks import Score, evaluate, recalibrated, running_statistics
from cmd_plugin.runs.files import write_atomically

__all__ = ["AS_TRAINED", "Recorder"]

AS_TRAINED = "as trained"
"""The row of the raw weights with the BatchNorm statistics that training left."""

_PROGRESS_PERIOD_S = 0.1

Scores = dict[str, Score]


class Recorder(Callback):
    """After each epoch: evaluates all variants, appends their rows, writes the checkpoints.

    With ``recalibrate`` every variant is treated alike: its BatchNorm statistics are re-estimated
    on the last training batches of the epoch, for the raw weights as for the averaged and the
    modelled ones, and one more row shows the raw weights as they were trained.

    Args:
        files: Where rows and checkpoints go.
        batches: The held-out set, iterated afresh for every variant.
        clock: The clock it starts.
        averages: Gives `ema` and `swa`.
        cmd: Gives `cmd`; treats its weights by its own `buffers`.
        recalibrate: Training batches to re-estimate statistics on; 0 leaves all as they are.
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
        files: TrainingFiles,
        batches: Iterable[tuple[Tensor, Tensor]],
        clock: TrainingClock,
        averages: WeightAverages,
        cmd: CMDCallback,
        *,
        recalibrate: int,
        keep_weights: bool,
        report: Callable[[int, float, Scores], None],
    ) -> None:
        super().__init__()
        self.files = files
        self.batches = batches
        self.clock = clock
        self.averages = averages
        self.cmd = cmd
        self.keep_weights = keep_weights
        self.report = report
        self.evaluation_seconds = 0.0
        self.peak_state_bytes = 0
        self._recent: deque[Any] = deque(maxlen=recalibrate)
        self._cmd_seconds_before = 0.0
        self._scores: Scores = {}
        self._reported = 0.0

    @property
    def cmd_seconds(self) -> float:
        """Time the CMD callback spent, also before a resume."""
        return self._cmd_seconds_before + self.cmd.seconds

    @override
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        # Those of the epoch before are unknown after a resume.
        self._recent.clear()
        self.clock.start()

    @override
    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._recent.append(batch)
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
        for name, score in self._scores.items():
            if name in (AS_TRAINED, "raw") and not math.isfinite(score.loss):
                raise diverged(f"the held-out loss is {score.loss}", epoch, seed, pl_module.lr)
        self.evaluation_seconds += time.perf_counter() - started
        modes = self.cmd.modes
        if modes is not None:
            self.peak_state_bytes = max(self.peak_state_bytes, modes.state_bytes)

        self.files.append([Row(seed, epoch, name, *s) for name, s in self._scores.items()])
        if self.keep_weights:
            name = f"checkpoints/epoch={epoch:03d}.ckpt"
            write_atomically(
                self.files.path(name), lambda path: trainer.save_checkpoint(path, weights_only=True)
            )
            if modes is not None and modes.correlation is not None:
                self.files.keep_correlation(modes.correlation)
            if epoch == trainer.max_epochs - 1:
                self._keep_model(trainer, pl_module)
        # Last: what this file says is finished has to be finished.
        write_atomically(self.files.checkpoint(seed), trainer.save_checkpoint)
        self.report(epoch, 1.0, self._scores)

    def _evaluate(self, trainer: Any, pl_module: Any) -> Scores:
        device, model = pl_module.device, pl_module.model
        scores: Scores = {}
        if self._recent.maxlen and running_statistics(model):
            scores[AS_TRAINED] = evaluate(model, self.batches, device)
        others = (("ema", self.averages.ema), ("swa", self.averages.swa))
        for name, network in (("raw", model), *others):
            if network is not None:
                with self._treated(network):
                    scores[name] = evaluate(network, self.batches, device)
        try:
            if self.cmd.show_modelled(trainer, pl_module):
                scores["cmd"] = evaluate(model, self.batches, device)
        finally:
            self.cmd.hide_modelled()
        return scores

    @contextmanager
    def _treated(self, network: nn.Module) -> Iterator[None]:
        if not self._recent.maxlen:
            yield
            return
        with recalibrated(network, self._recent):
            yield

    def _keep_model(self, trainer: Any, pl_module: Any) -> None:
        """Write the decomposition and the network with modelled weights, if there are any."""
        modes = self.cmd.modes
        if modes is None or not modes.ready:
            return
        modes.decomposition().save(self.files.path("modes.safetensors"))
        try:
            self.cmd.show_modelled(trainer, pl_module)
            self.files.keep_network(pl_module.model.state_dict())
        finally:
            self.cmd.hide_modelled()

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
