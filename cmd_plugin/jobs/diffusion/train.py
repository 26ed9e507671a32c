"""Train a small diffusion model with planted duplicates, and watch what it memorises."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from cmd_plugin.callbacks import MemorizationMonitor
from cmd_plugin.data import make_loader
from cmd_plugin.diffusion import NoiseSchedule, TrainedDenoiser, build_denoiser
from cmd_plugin.diffusion.plots import plot_doses
from cmd_plugin.jobs.diffusion.data import PlantedData, load_planted
from cmd_plugin.jobs.diffusion.model import MODEL, PROBES
from cmd_plugin.jobs.diffusion.options import TrainOptions
from cmd_plugin.jobs.diffusion.training import DenoiserTraining
from cmd_plugin.jobs.fitting import (
    ClockedRecorder,
    TrainingClock,
    finished_epochs,
    fit,
    make_trainer,
)
from cmd_plugin.runs.figures import save_figure
from cmd_plugin.runs.files import write_atomically
from cmd_plugin.runs.job import Job, make_job
from cmd_plugin.runs.process import check_accelerator, own_random_state, own_threads
from cmd_plugin.runs.result import Result
from cmd_plugin.runs.table import Table

__all__ = ["run"]

_WIDTHS = {"mlp": 512, "unet": 32}
_CHECKPOINTS = 20  # in a run: an epoch of a small set takes less than writing one
_COLUMNS: dict[str, Any] = {"epoch": int, "step": int, "loss": float}
_SEEN: dict[str, Any] = {
    "epoch": int,
    "step": int,
    "statistic": str,
    "time": float,
    "dose": int,
    "auroc": float,
}


class _Recorder(ClockedRecorder):
    """Appends a row an epoch, writes a checkpoint every so many, reports.

    Args:
        metrics: Where rows go.
        checkpoint: Where everything goes that the next epoch needs.
        every: Epochs between checkpoints.
        clock: The clock it starts.
        report: The job's.
        epochs: Epochs in all.
    """

    def __init__(
        self,
        metrics: Table,
        checkpoint: Path,
        every: int,
        clock: TrainingClock,
        job: Job,
        epochs: int,
    ) -> None:
        super().__init__(clock)
        self.metrics, self.checkpoint, self.every = metrics, checkpoint, every
        self.job, self.epochs = job, epochs
        self._losses: list[Tensor] = []
        self._rows: list[tuple[int, int, float]] = []

    @override
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._losses = []
        super().on_train_epoch_start(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._losses.append(outputs["loss"].detach())
        if not trainer.is_last_batch:
            self.clock.start()

    @override
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        epoch, loss = trainer.current_epoch, float(torch.stack(self._losses).double().mean())
        self._rows.append((epoch, trainer.global_step, loss))
        if (epoch + 1) % self.every == 0 or epoch + 1 == self.epochs:
            self.metrics.append(self._rows)
            self._rows = []
            # Last: what this file says is finished has to be finished.
            write_atomically(self.checkpoint, trainer.save_checkpoint)
        self.job.report("training", epoch + 1, self.epochs, f"loss {loss:.4f}")


@make_job("diffusion train")
def run(job: Job, options: TrainOptions) -> Result:
    """Train a denoiser; watch how well its training images can be told from held-out ones.

    On a CPU with an unchanged number of threads, a run that was killed and resumed ends with the
    same bits as an uninterrupted one.

    Returns:
        ``loss`` of the last epoch, ``steps``, ``parameters``; ``auroc`` of each statistic at the
        first time (statistic -> dose -> AUROC against held-out images) and ``tau_mem`` (group ->
        the first step at which it separated above .6), both of the last look.

    Raises:
        InputError: If data, model or folder cannot be used, or the training diverges.
        KeyboardInterrupt: If the user stops the run; it can be resumed.
    """
    check_accelerator(options.accelerator)
    data = load_planted(options)
    with own_random_state(), own_threads(options.threads):
        found = job.stage("training", partial(_train, job, options, data))
    seconds = {"training": found.pop("seconds")}
    about = {
        "name": data.name,
        "shape": list(data.shape),
        "images": data.images,
        "rows": len(data.train),
        "watched": len(data.probes.members),
        "held_out": len(data.probes.held_out),
    }
    return job.finish(metrics=found, data=about, seconds=seconds)


def _train(job: Job, options: TrainOptions, data: PlantedData) -> dict[str, Any]:
    """Train, from the last checkpoint if there is one; what it found as JSON types."""
    torch.manual_seed(options.seed)
    width = options.width or _WIDTHS[options.model]
    network, schedule = build_denoiser(options.model, data.shape, width), NoiseSchedule.linear()
    module = DenoiserTraining(
        network,
        data.shape,
        schedule,
        options.lr,
        options.lr_end,
        options.ema,
        options.seed,
    )
    loader = make_loader(data.train, options.batch_size, shuffle_seed=options.seed)
    epochs = max(1, round(options.steps / len(loader)))
    every = max(1, epochs // options.looks) if options.looks else epochs
    epochs -= epochs % every  # so that the last look is at the end

    metrics, checkpoint = job.table("metrics.csv", _COLUMNS), job.folder.state("last.ckpt")
    finished = finished_epochs(checkpoint, loader)
    metrics.replace([row for row in metrics.rows() if row[0] < finished])
    clock = TrainingClock()
    monitor = MemorizationMonitor(
        data.probes, every_n_epochs=every, t=options.time or (25.0,), seed=options.seed
    )
    recorder = _Recorder(metrics, checkpoint, max(1, epochs // _CHECKPOINTS), clock, job, epochs)
    callbacks = [clock, *([monitor] if options.looks else []), recorder]
    trainer = make_trainer(options.accelerator, epochs, callbacks, job.folder.work)
    fit(trainer, module, loader, checkpoint)

    trained = TrainedDenoiser(
        module.averaged.cpu(), options.model, data.shape, width, schedule, data.name
    )
    trained.save(job.folder.path(MODEL))
    data.probes.save(job.folder.path(PROBES))
    *_, (_, steps, loss) = metrics.rows()
    found: dict[str, Any] = {
        "loss": loss,
        "steps": steps,
        "parameters": sum(p.numel() for p in network.parameters()),
        "seconds": clock.seconds,
    }
    if options.looks:
        seen = job.table("memorization.csv", _SEEN)
        seen.replace(_rows(monitor, options.time))
        save_figure(
            plot_doses(monitor.history, monitor.headline, monitor.limit),
            job.folder.path("memorization.png"),
        )
        last = monitor.history[-1]["doses"]
        found["time"] = options.time[0]
        found["auroc"] = {
            name: {str(dose): values[0] for dose, values in doses.items()}
            for name, doses in last.items()
        }
        found["tau_mem"] = monitor.tau_mem
    return found


def _rows(monitor: MemorizationMonitor, times: tuple[float, ...]) -> list[tuple[Any, ...]]:
    return [
        (look["epoch"], look["step"], name, float(time), dose, value)
        for look in monitor.history
        for name, doses in look["doses"].items()
        for dose, values in doses.items()
        for time, value in zip(times, values, strict=True)
        if math.isfinite(value)
    ]
