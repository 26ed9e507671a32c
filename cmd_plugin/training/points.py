"""Train a point network reproducibly, and keep what is needed to explain and resume it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from typing_extensions import override

from cmd_plugin import __version__
from cmd_plugin.callbacks import PointImportanceMonitor
from cmd_plugin.callbacks._lightning import Callback
from cmd_plugin.data import make_loader
from cmd_plugin.errors import InputError, NonFiniteError
from cmd_plugin.jobs.classifier import OPTIMIZERS, SCHEDULES, Classifier
from cmd_plugin.networks import Score, evaluate, load_weights
from cmd_plugin.pointcloud import PointClouds, build_network
from cmd_plugin.pointcloud.networks import NETWORKS
from cmd_plugin.training._environment import (
    check_accelerator,
    own_random_state,
    own_threads,
    quiet_lightning,
)
from cmd_plugin.training._fitting import fit, prepare_resume
from cmd_plugin.training._point_options import check_point_options
from cmd_plugin.training.folder import Row, RunFolder, write_atomically, write_json
from cmd_plugin.training.point_data import load_point_data
from cmd_plugin.training.recorder import Progress, TrainingClock, diverged

__all__ = ["PointRun", "PointTrainConfig", "is_trained", "load_trained", "train_points"]

_FREE = ("data_root", "accelerator", "threads")
_EVALUATION_BATCH = 64
_SCHEMA = "cmd_plugin.training.points/1"


@dataclass(frozen=True)
class PointTrainConfig:
    """Options of a training run on clouds.

    Attributes:
        data: ``shapes``, ``chairs-monitors`` or ``hdf5``, see :func:`load_point_data`.
        data_root: Where it lies.
        points: Points in a cloud.
        train_clouds: Training clouds used; ``None`` for the default of the set.
        test_clouds: Held-out clouds used.
        model: A name of :data:`cmd_plugin.pointcloud.networks.NETWORKS`.
        width: Multiplies every hidden width.
        epochs: Number of epochs.
        batch_size: Clouds in a step.
        optimizer: ``sgd``, ``adam`` or ``adamw``.
        lr: Learning rate.
        weight_decay: Weight decay.
        schedule: ``constant``, ``cosine`` or ``step``.
        uncritical: Whether to train on uncritical subsets (Critical Points++).
        fewest: Smallest subset then.
        seed: Of data, initial weights, order and subsets.
        threads: CPU threads; ``None`` leaves torch's choice.
        accelerator: Lightning's name of the device.

    Raises:
        InputError: If an option is out of range.
    """

    data: str = "shapes"
    data_root: str | None = None
    points: int = 512
    train_clouds: int | None = None
    test_clouds: int | None = None
    model: str = "pointnet"
    width: float = 0.5
    epochs: int = 15
    batch_size: int = 32
    optimizer: str = "adamw"
    lr: float = 2e-3
    weight_decay: float = 1e-4
    schedule: str = "cosine"
    uncritical: bool = False
    fewest: int = 256
    seed: int = 0
    threads: int | None = None
    accelerator: str = "cpu"

    def __post_init__(self) -> None:
        check_point_options(
            self,
            {"model": NETWORKS, "optimizer": OPTIMIZERS, "schedule": SCHEDULES},
            ("points", "epochs", "fewest", "train_clouds", "test_clouds", "threads"),
        )
        if not (self.weight_decay >= 0.0 and math.isfinite(self.weight_decay)):
            raise InputError(f"--weight-decay must be at least 0, got {self.weight_decay}.")

    def deciding(self) -> dict[str, Any]:
        """The options that decide the results: a run may be resumed with others changed."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _FREE}


@dataclass(frozen=True)
class PointRun:
    """A finished training run.

    Attributes:
        summary: The content of result.json.
        out: Where ``metrics.csv``, ``result.json`` and ``model.safetensors`` lie.
    """

    summary: dict[str, Any]
    out: Path


class _Recorder(Callback):
    """After each epoch: evaluates, appends a row, writes the checkpoint, reports."""

    def __init__(
        self,
        folder: RunFolder,
        batches: Iterable[tuple[Tensor, Tensor]],
        clock: TrainingClock,
        report: Callable[[int, float, dict[str, Score]], None],
    ) -> None:
        super().__init__()
        self.folder, self.batches, self.clock, self.report = folder, batches, clock, report
        self._scores: dict[str, Score] = {}

    @override
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.clock.start()

    @override
    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        share = (batch_idx + 1) / trainer.num_training_batches
        self.report(trainer.current_epoch, share, self._scores)
        if not trainer.is_last_batch:
            self.clock.start()

    @override
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        epoch, seed = trainer.current_epoch, pl_module.seed
        score = evaluate(pl_module.model, self.batches, pl_module.device)
        if not math.isfinite(score.loss):
            raise diverged(f"the held-out loss is {score.loss}", epoch, seed, pl_module.lr)
        self._scores = {"raw": score}
        self.folder.append([Row(seed, epoch, "raw", score)])
        last = self.folder.last_checkpoint(seed)
        last.parent.mkdir(parents=True, exist_ok=True)
        # Last: what this file says is finished has to be finished.
        write_atomically(last, trainer.save_checkpoint)
        self.report(epoch, 1.0, self._scores)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"training_seconds": self.clock.seconds}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.clock.seconds = state_dict["training_seconds"]


def train_points(
    config: PointTrainConfig,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> PointRun:
    """Train a point network and evaluate it on held-out clouds after every epoch.

    On a CPU with an unchanged number of threads, a run that was killed and resumed ends with the
    same bits as an uninterrupted one.

    Args:
        config: The options.
        out: Folder for results, weights and checkpoints.
        resume: Continue the unfinished run in ``out``.
        overwrite: Replace an unfinished run in ``out``.
        progress: Called after every batch with the state of the run.

    Raises:
        InputError: If data, model or folder cannot be used, or the training diverges.
        KeyboardInterrupt: If the user stops the run; it can be resumed.
    """
    started = time.perf_counter()
    check_accelerator(config.accelerator)
    train, test = load_point_data(
        config.data,
        config.data_root,
        config.points,
        config.train_clouds,
        config.test_clouds,
        config.seed,
    )
    folder = RunFolder(Path(out))
    folder.model = folder.out / "model.safetensors"
    with own_random_state(), own_threads(config.threads):
        folder.open(config.deciding(), resume=resume, overwrite=overwrite)
        finished = folder.finished_seed(config.seed)
        if finished is None:
            finished = _run(config, train, test, folder, progress)
            folder.finish_seed(config.seed, finished)
    summary = {
        **finished,
        "seconds": {
            "training": finished["training_seconds"],
            "total": time.perf_counter() - started,
        },
        "data": {
            "name": train.name,
            "classes": list(train.classes),
            "train_clouds": len(train),
            "held_out_clouds": len(test),
        },
        "config": asdict(config),
        "versions": {"cmd-plugin": __version__, "torch": str(torch.__version__)},
    }
    write_json(folder.result, summary)
    return PointRun(summary, folder.out)


def _run(
    config: PointTrainConfig,
    train: PointClouds,
    test: PointClouds,
    folder: RunFolder,
    progress: Callable[[Progress], None] | None,
) -> dict[str, Any]:
    torch.manual_seed(config.seed)
    network = build_network(config.model, len(train.classes), config.width)
    module = Classifier(
        network,
        len(train.classes),
        optimizer=config.optimizer,
        lr=config.lr,
        weight_decay=config.weight_decay,
        schedule=config.schedule,
        seed=config.seed,
    )

    def report(epoch: int, share: float, scores: dict[str, Score]) -> None:
        if progress is not None:
            progress(Progress(epoch + share, config.epochs, config.seed, epoch, dict(scores)))

    loader = make_loader(train, config.batch_size, shuffle_seed=config.seed)
    clock = TrainingClock()
    recorder = _Recorder(folder, make_loader(test, _EVALUATION_BATCH), clock, report)
    callbacks: list[Any] = [clock]
    if config.uncritical:
        callbacks.append(
            PointImportanceMonitor(uncritical=True, fewest=config.fewest, seed=config.seed)
        )
    checkpoint = prepare_resume(folder, config.seed, loader)
    with quiet_lightning():
        trainer = pl.Trainer(
            accelerator=config.accelerator,
            devices=1,
            max_epochs=config.epochs,
            callbacks=[*callbacks, recorder],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder.out,
        )
        try:
            fit(trainer, module, loader, checkpoint)
        except NonFiniteError as error:
            epoch = trainer.current_epoch
            raise diverged("a feature is not finite", epoch, config.seed, config.lr) from error
    _save_network(folder.model, config, train.classes, network)
    last = folder.rows()[-1].score
    return {
        "accuracy": last.accuracy,
        "loss": last.loss,
        "parameters": sum(p.numel() for p in network.parameters()),
        "training_seconds": clock.seconds,
    }


def _save_network(
    path: Path, config: PointTrainConfig, classes: tuple[str, ...], network: nn.Module
) -> None:
    """Weights, with what is needed to build the network around them."""
    # A clone separates entries that share memory, which safetensors refuses.
    weights = {k: v.detach().cpu().clone().contiguous() for k, v in network.state_dict().items()}
    metadata = {
        "format": "pt",
        "schema": _SCHEMA,
        "model": config.model,
        "width": repr(config.width),
        "points": str(config.points),
        "classes": json.dumps(classes),
    }
    write_atomically(path, lambda temporary: save_file(weights, temporary, metadata))


def is_trained(path: str | Path) -> bool:
    """Whether :func:`train_points` wrote the file, so that it says which network it belongs to.

    Raises:
        InputError: If it is a damaged safetensors file.
    """
    return Path(path).suffix == ".safetensors" and _metadata(path).get("schema") == _SCHEMA


def _metadata(path: str | Path) -> dict[str, str]:
    try:
        with safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({error}): check the path.") from error


def load_trained(path: str | Path) -> tuple[nn.Module, tuple[str, ...], int]:
    """A network that :func:`train_points` wrote, its class names, and the size of its clouds.

    Raises:
        InputError: If the file is missing, damaged or something else.
    """
    metadata = _metadata(path)
    if metadata.get("schema") != _SCHEMA:
        raise InputError(
            f"{path} does not say which network it belongs to: pass --model and the number of "
            "--classes."
        )
    classes = tuple(json.loads(metadata["classes"]))
    network = build_network(metadata["model"], len(classes), float(metadata["width"]))
    load_weights(network, path)
    return network.eval(), classes, int(metadata["points"])
