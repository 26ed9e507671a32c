"""The options of a comparison, checked before anything is loaded or trained."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from cmd_plugin.data import DATASETS
from cmd_plugin.errors import InputError

__all__ = ["TrainConfig"]

_CHOICES = {
    "data": DATASETS,
    "optimizer": ("sgd", "adam", "adamw"),
    "schedule": ("constant", "cosine", "step"),
    "profile": ("reference", "mean"),
    "buffers": ("model", "recalibrate", "keep"),
    "mode": ("online", "embedded"),
    "embed_project": ("epoch", "step", "tie"),
    "embed_slots": ("leave", "zero"),
    "accelerator": ("cpu", "auto", "gpu", "cuda", "mps"),
}

# Options that say where and how fast, not what: a run may be resumed with others.
_FREE = ("data_root", "accelerator", "threads")

_DEFAULT_LR = {"sgd": 0.05, "adam": 1e-3, "adamw": 1e-3}


@dataclass(frozen=True)
class TrainConfig:
    """Options of a comparison.

    Attributes:
        data: Data set, see :func:`cmd_plugin.data.load_dataset`.
        data_root: Where it lies.
        image_size: Side length to resize images to; `None` keeps theirs.
        label_noise: Share of wrong training labels, in [0, 1).
        train_limit: Number of training images used; `None` uses all.
        model: Network, see :func:`cmd_plugin.networks.build_model`.
        optimizer: `sgd`, `adam` or `adamw`.
        lr: Learning rate; `None` takes 0.05 for `sgd` and 0.001 for the others.
        momentum: Momentum of `sgd`, in [0, 1).
        weight_decay: Weight decay, at least 0.
        schedule: `constant`, `cosine` or `step`.
        batch_size: Training images in a step.
        epochs: Epochs of each seed.
        warmup: Epochs before the one that CMD is fitted after, at least 2 and below `epochs`.
        modes: Number of modes, 1 to 256.
        samples: Weights drawn for the clustering.
        seeds: Number of training runs; they differ in initial weights and in the order of the data.
        seed: First seed; it also decides the split, the subset and the label noise of all runs.
        ema_decay: Decay of the EMA at each step, in [0, 1).
        forgetting: Forgetting factor of CMD's update, in (0, 1].
        shrink: Whether CMD shrinks each weight by its squared correlation.
        profile: `reference` or `mean` of the mode.
        buffers: BatchNorm statistics of modelled weights: `recalibrate` on the last few training
            batches, `model` like weights (the authors' code), or `keep` the raw ones. Modelled ones
            cost much accuracy on small networks (`benchmarks/results/cmd_accuracy.jsonl`).
        mode: `online` watches one training; `embedded` also trains each seed a second time, with
            weights that are embedded on the way.
        embed_every: Epochs between two embedding events.
        embed_percent: Percentage of the weights that an event chooses, in (0, 100].
        embed_relative: Whether that is of the weights still free, instead of all.
        embed_project: When embedded weights are written, see
            :class:`cmd_plugin.modes.Embedding`: `epoch`, `step` or `tie`.
        embed_slots: `leave` or `zero` the optimizer's momenta of embedded weights.
        threads: CPU threads; `None` leaves torch's choice.
        accelerator: Lightning's name of the device.

    Raises:
        InputError: If an option is out of range.
    """

    data: str = "digits"
    data_root: str | None = None
    image_size: int | None = None
    label_noise: float = 0.0
    train_limit: int | None = None
    model: str = "cnn"
    optimizer: str = "sgd"
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "constant"
    batch_size: int = 32
    epochs: int = 30
    warmup: int = 10
    modes: int = 10
    samples: int = 1000
    seeds: int = 3
    seed: int = 0
    ema_decay: float = 0.99
    forgetting: float = 1.0
    shrink: bool = False
    profile: str = "reference"
    buffers: str = "recalibrate"
    mode: str = "online"
    embed_every: int = 5
    embed_percent: float = 10.0
    embed_relative: bool = False
    embed_project: str = "epoch"
    embed_slots: str = "leave"
    threads: int | None = None
    accelerator: str = "cpu"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if name != "data" and getattr(self, name) not in choices:  # data names: load_dataset
                raise _wrong(name, f"one of {', '.join(choices)}", getattr(self, name))
        self._require("modes", "from 1 to 256", 1 <= self.modes <= 256)
        self._require("warmup", "at least 2", self.warmup >= 2)
        if self.epochs <= self.warmup:
            message = (
                f"--epochs must be above --warmup ({self.warmup}), got {self.epochs}: modes are "
                "fitted after epoch number warmup + 1."
            )
            raise InputError(message)
        for name in ("samples", "seeds", "batch_size", "embed_every"):
            self._require(name, "at least 1", getattr(self, name) >= 1)
        for name in ("train_limit", "image_size", "threads"):
            value = getattr(self, name)
            self._require(name, "at least 1", value is None or value >= 1)
        self._require("seed", "at least 0", self.seed >= 0)
        for name in ("label_noise", "momentum", "ema_decay"):
            value = getattr(self, name)
            self._require(name, "at least 0 and below 1", 0.0 <= value < 1.0)
        self._require("forgetting", "above 0 and at most 1", 0.0 < self.forgetting <= 1.0)
        self._require("embed_percent", "above 0 and at most 100", 0.0 < self.embed_percent <= 100.0)
        if self.mode == "embedded" and self.embed_project == "tie" and self.buffers == "model":
            message = (
                "--embed-project tie trains through reference weights, and BatchNorm's statistics "
                "have no gradient: use --buffers recalibrate or keep."
            )
            raise InputError(message)
        decay = self.weight_decay
        self._require("weight_decay", "at least 0", decay >= 0.0 and math.isfinite(decay))
        rate = self.learning_rate
        self._require("lr", "above 0", rate > 0.0 and math.isfinite(rate))

    def _require(self, name: str, condition: str, met: bool) -> None:
        if not met:
            raise _wrong(name, condition, getattr(self, name))

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
        return {**asdict(self), "lr": self.learning_rate}

    def deciding(self) -> dict[str, Any]:
        """The options that decide the results."""
        everything = self.as_dict()
        return {f.name: everything[f.name] for f in fields(self) if f.name not in _FREE}


def _wrong(name: str, condition: str, value: object) -> InputError:
    return InputError(f"--{name.replace('_', '-')} must be {condition}, got {value}.")
