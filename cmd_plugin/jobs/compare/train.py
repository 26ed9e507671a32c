"""Raw weights, EMA, SWA and CMD, measured in the same training runs on the same held-out set."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch

from cmd_plugin.callbacks import CMDCallback
from cmd_plugin.data import ImageData, load_dataset, make_loader
from cmd_plugin.errors import NonFiniteError
from cmd_plugin.jobs.classifier import Classifier
from cmd_plugin.jobs.compare.averages import WeightAverages
from cmd_plugin.jobs.compare.files import TrainingFiles
from cmd_plugin.jobs.compare.options import TrainOptions
from cmd_plugin.jobs.compare.recorder import Recorder, Scores
from cmd_plugin.jobs.compare.report import draw_report
from cmd_plugin.jobs.compare.summary import summarise, summarise_seed
from cmd_plugin.jobs.fitting import TrainingClock, diverged, finished_epochs, fit, make_trainer
from cmd_plugin.modes import Decomposition
from cmd_plugin.networks import build_model
from cmd_plugin.runs.figures import save_figure
from cmd_plugin.runs.job import Job, make_job
from cmd_plugin.runs.process import check_accelerator, own_random_state, own_threads
from cmd_plugin.runs.result import Result

__all__ = ["run"]

_EVALUATION_BATCH = 512
_RECALIBRATION_BATCHES = 8

Report = Callable[[int, float, Scores], None]


@make_job("train")
def run(job: Job, options: TrainOptions) -> Result:
    """Train once per seed and measure raw, EMA, SWA and CMD weights after every epoch.

    The training itself is that of the raw weights; the other variants watch it. With
    ``mode="embedded"`` each seed is trained once more, from the same start on the same batches,
    with weights that are embedded on the way; its files are in `out/embedded`. CMD and SWA have no
    row in metrics.csv before they start (after epoch number `warmup + 1`, and in the last quarter).
    On a CPU with an unchanged number of threads, a run that was killed and resumed ends with the
    same bits as an uninterrupted one.

    Raises:
        InputError: If data, model or folder cannot be used, or the training diverges. What was
            finished stays in `out`.
        KeyboardInterrupt: If the user stops the run; it can be resumed.
    """
    check_accelerator(options.accelerator)
    data = load_dataset(
        options.data,
        data_root=options.data_root,
        label_noise=options.label_noise,
        seed=options.seed,
        train_limit=options.train_limit,
        image_size=options.image_size,
    )
    with own_random_state(), own_threads(options.threads):
        build_model(options.model, data.channels, len(data.classes), data.size)  # fails early
        files = {kind: TrainingFiles(job, kind) for kind in options.trainings}
        found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in options.trainings}
        for position, (seed, kind) in enumerate(product(options.all_seeds, options.trainings)):
            report = _report(job, options, position)
            train = partial(_train, options, data, files[kind], seed, report)
            found[kind].append(job.stage(f"{kind}/seed{seed}", train))
        metrics, seconds = summarise(found)
        about = _describe(data)
        decomposition = Decomposition.load(files["online"].path("modes.safetensors"))
        rows = {kind: place.rows() for kind, place in files.items()}
        correlation = files["online"].correlation()
        figure = draw_report(rows, decomposition, correlation, options, about, metrics)
        shown = [{"seed": one["seed"], "accuracy": one["accuracy"]} for one in found["online"]]
        about_picture = {"options": options.as_dict(), "seeds": shown}
        save_figure(figure, job.folder.path("report.png"), about_picture)
        return job.finish(metrics=metrics, data=about, seconds=seconds)


def _describe(data: ImageData) -> dict[str, Any]:
    return {
        "name": data.name,
        "train_images": len(data.train),  # type: ignore[arg-type]
        "held_out_images": len(data.test),  # type: ignore[arg-type]
        "classes": list(data.classes),
    }


def _report(job: Job, options: TrainOptions, position: int) -> Report:
    """Return what tells the job how far training number ``position`` is."""
    number, kind = divmod(position, len(options.trainings))
    name = "" if kind == 0 else f" {options.trainings[kind]}"
    total = options.seeds * len(options.trainings) * options.epochs

    def report(epoch: int, share: float, scores: Scores) -> None:
        stage = f"seed {options.seed + number}{name}, epoch {epoch}"
        note = "  ".join(f"{k} {s.accuracy:.3f}" for k, s in scores.items())
        job.report(stage, position * options.epochs + epoch + share, total, note)

    return report


def _train(
    options: TrainOptions, data: ImageData, files: TrainingFiles, seed: int, report: Report
) -> dict[str, Any]:
    """Train one seed, from its last checkpoint if there is one; what it found as JSON types."""
    torch.manual_seed(seed)
    network = build_model(options.model, data.channels, len(data.classes), data.size)
    classifier = Classifier(
        network,
        len(data.classes),
        optimizer=options.optimizer,
        lr=options.learning_rate,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        schedule=options.schedule,
        seed=seed,
    )
    loader = make_loader(data.train, options.batch_size, shuffle_seed=seed)
    batches = min(_RECALIBRATION_BATCHES, len(loader))
    clock = TrainingClock()
    averages = WeightAverages(options.ema_decay, options.swa_start)
    cmd = _callback(options, seed, files.kind, batches)
    recorder = Recorder(
        files,
        make_loader(data.test, _EVALUATION_BATCH),
        clock,
        averages,
        cmd,
        recalibrate=batches if options.buffers == "recalibrate" else 0,
        keep_weights=seed == options.seed,
        report=report,
    )
    checkpoint = files.checkpoint(seed)
    files.forget_from(seed, finished_epochs(checkpoint, loader))
    callbacks = [clock, averages, cmd, recorder]
    trainer = make_trainer(options.accelerator, options.epochs, callbacks, files.path("."))
    try:
        fit(trainer, classifier, loader, checkpoint)
    except NonFiniteError as error:
        epoch = trainer.current_epoch
        raise diverged("a weight is not finite", epoch, seed, options.learning_rate) from error
    return summarise_seed(files.rows(), seed, cmd, recorder, classifier)


def _callback(options: TrainOptions, seed: int, kind: str, batches: int) -> CMDCallback:
    embedding: dict[str, Any] = {}
    if kind == "embedded":
        embedding = {
            "mode": "embedded",
            "embed_every": options.embed_every,
            "embed_percent": options.embed_percent,
            "relative": options.embed_relative,
            "project": options.embed_project,
            "slots": options.embed_slots,
        }
    return CMDCallback(
        modes=options.modes,
        warmup=options.warmup,
        samples=options.samples,
        seed=seed,
        evaluate="raw",
        buffers=options.buffers,  # type: ignore[arg-type]
        profile=options.profile,  # type: ignore[arg-type]
        shrink=options.shrink,
        forgetting=options.forgetting,
        recalibration_batches=batches,
        **embedding,
    )
