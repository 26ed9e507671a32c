"""Raw weights, EMA, SWA and CMD, measured in the same training runs on the same held-out set."""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from cmd_plugin import __version__
from cmd_plugin.callbacks import CMDCallback
from cmd_plugin.data import ImageData, load_dataset, make_loader
from cmd_plugin.errors import InputError, NonFiniteError
from cmd_plugin.networks import Score, build_model
from cmd_plugin.training._environment import (
    check_accelerator,
    own_random_state,
    own_threads,
    quiet_lightning,
)
from cmd_plugin.training._fitting import fit, prepare_resume
from cmd_plugin.training.averages import WeightAverages
from cmd_plugin.training.classifier import Classifier
from cmd_plugin.training.config import TrainConfig
from cmd_plugin.training.folder import RunFolder, write_json
from cmd_plugin.training.recorder import VARIANTS, Progress, Recorder, TrainingClock, diverged
from cmd_plugin.training.report import write_report

__all__ = ["ComparisonResult", "run_comparison"]

_EVALUATION_BATCH = 512


@dataclass(frozen=True)
class ComparisonResult:
    """What a comparison found.

    Attributes:
        summary: The content of result.json.
        folder: Where everything was written.
    """

    summary: dict[str, Any]
    folder: RunFolder


def run_comparison(
    config: TrainConfig,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> ComparisonResult:
    """Train once per seed and measure raw, EMA, SWA and CMD weights after every epoch.

    The training itself is that of the raw weights; the other variants watch it. With
    ``mode="embedded"`` each seed is trained once more, from the same start and on the same batches,
    with weights that are embedded on the way; its files are in `out/embedded`. CMD and SWA have no
    row in metrics.csv before they start (after epoch number `warmup + 1`, and in the last quarter).
    On a CPU with an unchanged number of threads, a run that was killed and resumed ends with the
    same bits as an uninterrupted one.

    Args:
        config: The options.
        out: Folder for results and checkpoints, see :mod:`cmd_plugin.training.folder`.
        resume: Continue the unfinished run in `out`; its finished epochs are not trained again.
        overwrite: Replace an unfinished run in `out`.
        progress: Called now and then with the state of the run.

    Raises:
        InputError: If data, model or folder cannot be used, or the training diverges. What was
            finished stays in `out`.
        KeyboardInterrupt: If the user stops the run; it can be resumed.
    """
    started = time.perf_counter()
    check_accelerator(config.accelerator)
    data = load_dataset(
        config.data,
        data_root=config.data_root,
        label_noise=config.label_noise,
        seed=config.seed,
        train_limit=config.train_limit,
        image_size=config.image_size,
    )
    with own_random_state(), own_threads(config.threads):
        build_model(config.model, data.channels, len(data.classes), data.size)  # fails early
        folder = RunFolder(Path(out))
        folder.open(config.deciding(), resume=resume, overwrite=overwrite)
        places = {"online": folder, "embedded": folder.embedded}
        if "embedded" in config.trainings:
            place = folder.embedded
            place.open(config.deciding(), resume=resume and place.started, overwrite=True)
        results: dict[str, list[dict[str, Any]]] = {kind: [] for kind in config.trainings}
        for position, (seed, kind) in enumerate(product(config.all_seeds, config.trainings)):
            found = places[kind].finished_seed(seed)
            if found is None:
                report = _relay(progress, config, position)
                found = _run_seed(config, data, places[kind], seed, kind, report)
                places[kind].finish_seed(seed, found)
            results[kind].append(found)
    summary = _summary(config, data, results, time.perf_counter() - started)
    write_report(folder, summary)
    write_json(folder.result, summary)
    return ComparisonResult(summary, folder)


def _relay(
    progress: Callable[[Progress], None] | None, config: TrainConfig, position: int
) -> Callable[[int, float, dict[str, Score]], None]:
    def report(epoch: int, share: float, scores: dict[str, Score]) -> None:
        if progress is not None:
            done = position * config.epochs + epoch + share
            total = config.seeds * len(config.trainings) * config.epochs
            seed, kind = divmod(position, len(config.trainings))
            training = config.trainings[kind]
            shown = Progress(done, total, config.seed + seed, epoch, dict(scores), training)
            progress(shown)

    return report


def _run_seed(
    config: TrainConfig,
    data: ImageData,
    folder: RunFolder,
    seed: int,
    kind: str,
    report: Callable[[int, float, dict[str, Score]], None],
) -> dict[str, Any]:
    """Train one seed, from its last checkpoint if there is one; its result as JSON types."""
    torch.manual_seed(seed)
    network = build_model(config.model, data.channels, len(data.classes), data.size)
    classifier = Classifier(
        network,
        len(data.classes),
        optimizer=config.optimizer,
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        schedule=config.schedule,
        seed=seed,
    )
    loader = make_loader(data.train, config.batch_size, shuffle_seed=seed)
    clock = TrainingClock()
    averages = WeightAverages(config.ema_decay, config.swa_start)
    # Batches of one epoch only: those of the epoch before are unknown after a resume.
    cmd = _callback(config, seed, kind, min(8, len(loader)))
    held_out = make_loader(data.test, _EVALUATION_BATCH)
    first = seed == config.seed
    recorder = Recorder(folder, held_out, clock, averages, cmd, keep_weights=first, report=report)
    checkpoint = prepare_resume(folder, seed, loader)
    with quiet_lightning():
        trainer = pl.Trainer(
            accelerator=config.accelerator,
            devices=1,
            max_epochs=config.epochs,
            callbacks=[clock, averages, cmd, recorder],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder.out,
        )
        try:
            fit(trainer, classifier, loader, checkpoint)
        except NonFiniteError as error:
            epoch = trainer.current_epoch
            raise diverged("a weight is not finite", epoch, seed, config.learning_rate) from error
    return _seed_result(config, folder, seed, cmd, recorder, classifier)


def _callback(config: TrainConfig, seed: int, kind: str, batches: int) -> CMDCallback:
    embedding: dict[str, Any] = {}
    if kind == "embedded":
        embedding = {
            "mode": "embedded",
            "embed_every": config.embed_every,
            "embed_percent": config.embed_percent,
            "relative": config.embed_relative,
            "project": config.embed_project,
            "slots": config.embed_slots,
        }
    return CMDCallback(
        modes=config.modes,
        warmup=config.warmup,
        samples=config.samples,
        seed=seed,
        evaluate="raw",
        buffers=config.buffers,  # type: ignore[arg-type]
        profile=config.profile,  # type: ignore[arg-type]
        shrink=config.shrink,
        forgetting=config.forgetting,
        recalibration_batches=batches,
        **embedding,
    )


def _seed_result(
    config: TrainConfig,
    folder: RunFolder,
    seed: int,
    cmd: CMDCallback,
    recorder: Recorder,
    classifier: Classifier,
) -> dict[str, Any]:
    modes = cmd.modes
    if modes is None or not modes.ready:
        message = f"seed {seed}: CMD found no moving weights to model; raise --samples or --lr."
        raise InputError(message)
    last = {
        row.variant: row.score
        for row in folder.rows()
        if row.seed == seed and row.epoch == config.epochs - 1
    }
    result = {
        "seed": seed,
        "accuracy": {name: last[name].accuracy for name in VARIANTS},
        "loss": {name: _finite(last[name].loss) for name in VARIANTS},
        "explained_variance": _finite(modes.explained_variance()),
        "modes": modes.number_of_modes,
        "parameters": modes.numel,
        "trainable_parameters": sum(p.numel() for p in classifier.parameters() if p.requires_grad),
        "state_bytes": modes.state_bytes,
        "peak_state_bytes": recorder.peak_state_bytes,
        "training_seconds": recorder.clock.seconds,
        "cmd_seconds": recorder.cmd_seconds,
        "evaluation_seconds": recorder.evaluation_seconds,
    }
    if cmd.embedding is not None:
        result |= {
            "embedded_fraction": modes.embedded_fraction,
            "saved_percent": modes.saved_percent,
            "volume_percent": modes.volume_percent,
            "volume_bytes": modes.volume_bytes,
            "full_bytes": modes.updates * modes.numel * modes.layout.state_dtype.itemsize,
        }
    return result


def _finite(value: float) -> float | None:
    """A number that JSON can hold."""
    return value if math.isfinite(value) else None


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def _deviation(values: list[float | None]) -> float | None:
    """Sample standard deviation; there is none of a single run."""
    known = [value for value in values if value is not None]
    return statistics.stdev(known) if len(known) == len(values) > 1 else None


def _scores(seeds: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Means and deviations of all variants over the seeds."""
    scores: dict[str, dict[str, float | None]] = {}
    for measure in ("accuracy", "loss"):
        columns = {name: [seed[measure][name] for seed in seeds] for name in VARIANTS}
        scores[measure] = {name: _mean(values) for name, values in columns.items()}
        scores[f"{measure}_std"] = {name: _deviation(values) for name, values in columns.items()}
    return scores


def _seconds(seeds: list[dict[str, Any]]) -> dict[str, float]:
    kinds = ("training", "cmd", "evaluation")
    return {kind: sum(seed[f"{kind}_seconds"] for seed in seeds) for kind in kinds}


def _embedded_summary(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """What the embedded trainings add to result.json."""
    first = seeds[0]
    means = ("embedded_fraction", "saved_percent", "volume_percent", "explained_variance")
    return {
        **_scores(seeds),
        **{name: _mean([seed[name] for seed in seeds]) for name in means},
        "volume_bytes": first["volume_bytes"],
        "full_bytes": first["full_bytes"],
        "state_bytes_per_parameter": first["state_bytes"] / first["parameters"],
        "seconds": _seconds(seeds),
        "per_seed": seeds,
    }


def _summary(
    config: TrainConfig, data: ImageData, results: dict[str, list[dict[str, Any]]], seconds: float
) -> dict[str, Any]:
    """The content of result.json."""
    seeds = results["online"]
    summary: dict[str, Any] = _scores(seeds)
    if "embedded" in results:
        embedded = summary["embedded"] = _embedded_summary(results["embedded"])
        for measure in ("accuracy", "loss", "accuracy_std", "loss_std"):
            summary[measure]["embedded"] = embedded[measure]["raw"]
    spent = _seconds(seeds)
    first = seeds[0]
    return {
        **summary,
        "overhead_percent": 100.0 * spent["cmd"] / spent["training"],
        "state_bytes_per_parameter": first["state_bytes"] / first["parameters"],
        "peak_state_bytes_per_parameter": first["peak_state_bytes"] / first["parameters"],
        "parameters": first["parameters"],
        "trainable_parameters": first["trainable_parameters"],
        "modes": first["modes"],
        "explained_variance": _mean([seed["explained_variance"] for seed in seeds]),
        "per_seed": seeds,
        "seconds": {"total": seconds, **spent},
        "data": {
            "name": data.name,
            "train_images": len(data.train),  # type: ignore[arg-type]
            "held_out_images": len(data.test),  # type: ignore[arg-type]
            "classes": list(data.classes),
        },
        "config": config.as_dict(),
        "versions": {
            "cmd-plugin": __version__,
            "torch": str(torch.__version__),
            "pytorch-lightning": metadata.version("pytorch-lightning"),
            "python": platform.python_version(),
        },
    }
