"""Train a point network reproducibly, and keep what is needed to explain and resume it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from cmd_plugin.callbacks import PointImportanceMonitor
from cmd_plugin.data import make_loader
from cmd_plugin.errors import NonFiniteError
from cmd_plugin.jobs.classifier import Classifier
from cmd_plugin.jobs.fitting import (
    ClockedRecorder,
    TrainingClock,
    diverged,
    finished_epochs,
    fit,
    make_trainer,
)
from cmd_plugin.jobs.points.data import load_point_data
from cmd_plugin.jobs.points.model import PointNetwork, save_point_network
from cmd_plugin.jobs.points.options import TrainOptions
from cmd_plugin.networks import evaluate
from cmd_plugin.pointcloud import PointClouds, build_network
from cmd_plugin.runs.files import write_atomically
from cmd_plugin.runs.job import Job, make_job
from cmd_plugin.runs.process import check_accelerator, own_random_state, own_threads
from cmd_plugin.runs.result import Result
from cmd_plugin.runs.table import Table

__all__ = ["run"]

_EVALUATION_BATCH = 64
_COLUMNS: dict[str, Any] = {
    "seed": int,
    "epoch": int,
    "variant": str,
    "loss": float,
    "accuracy": float,
}

Report = Callable[[int, float, float | None], None]


class _Recorder(ClockedRecorder):
    """After each epoch: evaluates, appends a row, writes the checkpoint, reports.

    Args:
        metrics: Where rows go.
        checkpoint: Where everything goes that the next epoch needs.
        batches: The held-out set.
        clock: The clock it starts.
        report: Called with the epoch, the share of it that is done, and the latest accuracy.
    """

    def __init__(
        self,
        metrics: Table,
        checkpoint: Path,
        batches: Iterable[tuple[Tensor, Tensor]],
        clock: TrainingClock,
        report: Report,
    ) -> None:
        super().__init__(clock)
        self.metrics, self.checkpoint, self.batches = metrics, checkpoint, batches
        self.report = report
        self._accuracy: float | None = None

    @override
    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        share = (batch_idx + 1) / trainer.num_training_batches
        self.report(trainer.current_epoch, share, self._accuracy)
        if not trainer.is_last_batch:
            self.clock.start()

    @override
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        epoch, seed = trainer.current_epoch, pl_module.seed
        score = evaluate(pl_module.model, self.batches, pl_module.device)
        if not math.isfinite(score.loss):
            raise diverged(f"the held-out loss is {score.loss}", epoch, seed, pl_module.lr)
        self._accuracy = score.accuracy
        self.metrics.append([(seed, epoch, "raw", *score)])
        # Last: what this file says is finished has to be finished.
        write_atomically(self.checkpoint, trainer.save_checkpoint)
        self.report(epoch, 1.0, self._accuracy)


@make_job("points train")
def run(job: Job, options: TrainOptions) -> Result:
    """Train a point network and evaluate it on held-out clouds after every epoch.

    On a CPU with an unchanged number of threads, a run that was killed and resumed ends with the
    same bits as an uninterrupted one.

    Returns:
        Of the last epoch ``accuracy`` in [0, 1] and ``loss`` in nats, and the ``parameters``.

    Raises:
        InputError: If data, model or folder cannot be used, or the training diverges.
        KeyboardInterrupt: If the user stops the run; it can be resumed.
    """
    check_accelerator(options.accelerator)
    train, test = load_point_data(
        options.data,
        options.data_root,
        options.points,
        options.train_clouds,
        options.test_clouds,
        options.seed,
    )
    with own_random_state(), own_threads(options.threads):
        found = job.stage("training", partial(_train, job, options, train, test))
        seconds = {"training": found.pop("seconds")}
        about = {
            "name": train.name,
            "classes": list(train.classes),
            "train_clouds": len(train),
            "held_out_clouds": len(test),
        }
        return job.finish(metrics=found, data=about, seconds=seconds)


def _train(
    job: Job, options: TrainOptions, train: PointClouds, test: PointClouds
) -> dict[str, Any]:
    """Train, from the last checkpoint if there is one; what it found as JSON types."""
    torch.manual_seed(options.seed)
    network = build_network(options.model, len(train.classes), options.width)
    module = Classifier(
        network,
        len(train.classes),
        optimizer=options.optimizer,
        lr=options.lr,
        weight_decay=options.weight_decay,
        schedule=options.schedule,
        seed=options.seed,
    )

    def report(epoch: int, share: float, accuracy: float | None) -> None:
        note = "" if accuracy is None else f"accuracy {accuracy:.3f}"
        job.report(f"epoch {epoch}", epoch + share, options.epochs, note)

    loader = make_loader(train, options.batch_size, shuffle_seed=options.seed)
    metrics, checkpoint = job.table("metrics.csv", _COLUMNS), job.folder.state("last.ckpt")
    finished = finished_epochs(checkpoint, loader)
    metrics.replace([row for row in metrics.rows() if row[1] < finished])
    clock = TrainingClock()
    recorder = _Recorder(metrics, checkpoint, make_loader(test, _EVALUATION_BATCH), clock, report)
    callbacks: list[Any] = [clock]
    if options.uncritical:
        callbacks.append(
            PointImportanceMonitor(uncritical=True, fewest=options.fewest, seed=options.seed)
        )
    trainer = make_trainer(
        options.accelerator, options.epochs, [*callbacks, recorder], job.folder.work
    )
    try:
        fit(trainer, module, loader, checkpoint)
    except NonFiniteError as error:
        epoch = trainer.current_epoch
        raise diverged("a feature is not finite", epoch, options.seed, options.lr) from error
    save_point_network(
        job.folder.path("model.safetensors"),
        PointNetwork(network, options.model, options.width, options.points, train.classes),
    )
    *_, loss, accuracy = metrics.rows()[-1]
    return {
        "accuracy": accuracy,
        "loss": loss,
        "parameters": sum(p.numel() for p in network.parameters()),
        "seconds": clock.seconds,
    }
