"""The options of ``cmd-plugin train``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cmd_plugin.errors import InputError
from cmd_plugin.jobs.image_options import DATA_PANEL, ImageOptions
from cmd_plugin.runs.options import option
from cmd_plugin.runs.process import ACCELERATORS

__all__ = ["TrainOptions"]

_TRAINING = "Training"
_METHODS = "Averages and modes"
_EMBEDDING = "Embedded training"
_MACHINE = "Machine"

_DEFAULT_LR = {"sgd": 0.05, "adam": 1e-3, "adamw": 1e-3}
_EMBEDDED = {"mode": ("embedded",)}


@dataclass(frozen=True, kw_only=True)
class TrainOptions(ImageOptions):
    r"""Train, and compare raw weights, EMA, SWA and CMD on the same held-out images.

    Each seed is one ordinary training run; EMA (every step), SWA (mean over the last quarter's
    epochs) and CMD (Correlation Mode Decomposition of the weights' trajectories) watch it without
    changing it, and all four are evaluated after every epoch. On networks with BatchNorm all four
    get statistics re-estimated on the same training batches; a further row shows the raw weights
    with the statistics that training left. Overhead is the time CMD takes in percent of the pure
    training time, evaluation excluded.

    With --mode embedded each seed is trained a second time, from the same start on the same
    batches, with embedded weights; its files are in OUT/embedded.

    Writes metrics.csv, result.json, modes.safetensors and model_cmd.safetensors (first seed),
    report.png, and the first seed's weights after each epoch in checkpoints/.

    Examples:
      cmd-plugin train
      cmd-plugin train --label-noise 0.2 --shrink --seeds 5 --out noisy
      cmd-plugin train --mode embedded --embed-every 2 --seeds 1 --out embedded
      cmd-plugin train --data cifar10 --data-root DATA --model resnet18 --epochs 60 --warmup 20
    """

    label_noise: float = option(
        0.0,
        "Share of training labels replaced by a wrong one, 0 to below 1.",
        panel=DATA_PANEL,
        at_least=0,
        below=1,
    )
    optimizer: str = option(
        "sgd",
        "sgd, adam or adamw.",
        panel=_TRAINING,
        choices=tuple(_DEFAULT_LR),
    )
    lr: float | None = option(
        None,
        "Learning rate; default 0.05 for sgd, 0.001 for adam and adamw.",
        panel=_TRAINING,
        above=0,
    )
    momentum: float = option(
        0.9,
        "Momentum of sgd.",
        panel=_TRAINING,
        at_least=0,
        below=1,
        only={"optimizer": ("sgd",)},
    )
    schedule: str = option(
        "constant",
        "constant, cosine (to 0), or step (a tenth at 1/2 and at 3/4 of the run).",
        panel=_TRAINING,
        choices=("constant", "cosine", "step"),
    )
    weight_decay: float = option(
        0.0, "Weight decay; decoupled for adamw.", panel=_TRAINING, at_least=0
    )
    batch_size: int = option(32, "Training images in a step.", panel=_TRAINING, at_least=1)
    epochs: int = option(30, "Epochs of each seed.", panel=_TRAINING, at_least=1)
    seeds: int = option(
        3,
        "Training runs; they differ in initial weights and order of the data.",
        panel=_TRAINING,
        at_least=1,
    )
    seed: int = option(0, "First seed; also of split and label noise.", panel=_TRAINING, at_least=0)
    warmup: int = option(
        10,
        "Epochs CMD only watches; modes are fitted after the next one.",
        panel=_METHODS,
        at_least=2,
    )
    modes: int = option(10, "Number of modes, 1 to 256.", panel=_METHODS, at_least=1, at_most=256)
    samples: int = option(
        1000, "Weights whose trajectories are clustered.", panel=_METHODS, at_least=1
    )
    forgetting: float = option(
        1.0, "Weight of the past at each update, above 0 to 1.", panel=_METHODS, above=0, at_most=1
    )
    shrink: bool = option(
        False,
        "Shrink each weight's movement by its squared correlation with its mode.",
        panel=_METHODS,
    )
    profile: str = option(
        "reference",
        "What a mode follows: its reference weight, or the mean of its samples.",
        panel=_METHODS,
        choices=("reference", "mean"),
    )
    buffers: str = option(
        "recalibrate",
        "BatchNorm statistics: recalibrate (those of all weights, on the epoch's last 8 training "
        "batches), model (CMD models them like weights), or keep (CMD takes the raw run's).",
        panel=_METHODS,
        choices=("model", "recalibrate", "keep"),
    )
    ema_decay: float = option(
        0.99,
        "Decay of the EMA at each step; it remembers about 1/(1-decay) steps, which should be far "
        "fewer than the run has.",
        panel=_METHODS,
        at_least=0,
        below=1,
    )
    mode: str = option(
        "online",
        "online watches the training; embedded also trains each seed a second time, with more and "
        "more weights that follow their mode's reference.",
        panel=_EMBEDDING,
        choices=("online", "embedded"),
    )
    embed_every: int = option(
        5, "Epochs between two embedding events.", panel=_EMBEDDING, at_least=1, only=_EMBEDDED
    )
    embed_percent: float = option(
        10.0,
        "Percentage of the weights that an event chooses, above 0 to 100.",
        panel=_EMBEDDING,
        above=0,
        at_most=100,
        only=_EMBEDDED,
    )
    embed_relative: bool = option(
        False,
        "Percentage of the weights still free, or of all.",
        panel=_EMBEDDING,
        off="embed-absolute",
        only=_EMBEDDED,
    )
    embed_project: str = option(
        "epoch",
        "When embedded weights are written: epoch (its end; the paper), step, tie (each step, and "
        "references get their gradients), or pool (each step is fitted onto the curves).",
        panel=_EMBEDDING,
        choices=("epoch", "step", "tie", "pool"),
        only=_EMBEDDED,
    )
    embed_slots: str = option(
        "leave",
        "leave or zero the optimizer's momenta of embedded weights.",
        panel=_EMBEDDING,
        choices=("leave", "zero"),
        only=_EMBEDDED,
    )
    threads: int | None = option(
        None, "CPU threads; default: torch's choice.", panel=_MACHINE, at_least=1, free=True
    )
    accelerator: str = option(
        "cpu", "cpu, gpu, mps or auto.", panel=_MACHINE, choices=ACCELERATORS, free=True
    )

    def check_together(self) -> None:
        """Refuse a run too short for the fit, and gradients tied through statistics."""
        if self.epochs <= self.warmup:
            raise InputError(
                f"--epochs must be above --warmup ({self.warmup}), got {self.epochs}: modes are "
                "fitted after epoch number warmup + 1."
            )
        if self.embed_project == "tie" and self.buffers == "model":
            raise InputError(
                "--embed-project tie trains through reference weights, and BatchNorm's statistics "
                "have no gradient: use --buffers recalibrate or keep."
            )

    @property
    def learning_rate(self) -> float:
        """The learning rate, the optimizer's usual one if none was given."""
        return _DEFAULT_LR[self.optimizer] if self.lr is None else self.lr

    @property
    def swa_start(self) -> int:
        """First epoch of the equal average: the last quarter of the run."""
        return self.epochs - max(1, round(0.25 * self.epochs))

    @property
    def trainings(self) -> tuple[str, ...]:
        """What each seed trains: `online`, and `embedded` if that is wanted."""
        return ("online",) if self.mode == "online" else ("online", "embedded")

    @property
    def all_seeds(self) -> range:
        """The seeds of all training runs."""
        return range(self.seed, self.seed + self.seeds)

    def as_dict(self) -> dict[str, Any]:
        """All options, the learning rate resolved."""
        return {**super().as_dict(), "lr": self.learning_rate}
