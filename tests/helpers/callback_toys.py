"""Small models, data and trainers for the callback tests, in every installed Lightning.

The tests' ``conftest.py`` makes this file importable as ``callback_toys``.
"""

# ruff: noqa: ARG002 - Lightning fixes the signatures of its hooks

from __future__ import annotations

import importlib
import os
import random
import signal
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Sampler, TensorDataset
from torchmetrics import Accuracy

from cmd_plugin.callbacks import CMDCallback

PREFERRED = "pytorch_lightning"  # the distribution that this package depends on
SMALL = {"modes": 3, "warmup": 2, "samples": 60}


def toy_data(count: int = 50, features: int = 6, seed: int = 1) -> TensorDataset:
    """Points labelled by the largest of three projections, the same three for every seed."""
    points = torch.randn(count, features, generator=torch.Generator().manual_seed(seed))
    task = torch.randn(features, 3, generator=torch.Generator().manual_seed(0))
    return TensorDataset(points, (points @ task).argmax(1))


def toy_loader(seed: int = 1, shuffle: bool = False, **options: Any) -> DataLoader:
    """50 points in batches of 8: the last one has 2."""
    return DataLoader(toy_data(seed=seed), batch_size=8, shuffle=shuffle, **options)


class ResumableLoader:
    """Batches in a fixed order that differs per epoch; resumes in the middle of an epoch."""

    def __init__(self, epoch_length: int = 6) -> None:
        self.points, self.labels = toy_data(count=8 * epoch_length).tensors
        self.epoch_length, self.epoch, self.at = epoch_length, 0, 0
        self.sampler = self  # where Lightning looks for set_epoch

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.at = epoch, 0

    def __len__(self) -> int:
        return self.epoch_length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(100 + self.epoch)
        order = torch.randperm(len(self.points), generator=generator).split(8)
        for index in range(self.at, self.epoch_length):
            self.at = index + 1
            yield self.points[order[index]], self.labels[order[index]]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.at = state["epoch"], state["at"]


class Toy:
    """Mixed into each distribution's LightningModule; dropout draws from the random stream."""

    def __init__(self, norm: bool = True, dropout: float = 0.2, width: int = 12) -> None:
        super().__init__()
        middle = [nn.BatchNorm1d(width)] if norm else []
        self.net = nn.Sequential(
            nn.Linear(6, width), *middle, nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 3)
        )
        self.losses: list[float] = []

    def forward(self, points: Tensor) -> Tensor:
        return self.net(points)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = cross_entropy(self(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        scores = self(batch[0])
        self.log("val_loss", cross_entropy(scores, batch[1]))
        self.log("val_acc", (scores.argmax(1) == batch[1]).float().mean())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        scores = self(batch[0])
        self.log("test_loss", cross_entropy(scores, batch[1]))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


_KINDS: dict[tuple[str, type], type] = {}


def in_namespace(namespace: str, kind: type = Toy) -> type:
    """The LightningModule class of one distribution with ``kind`` mixed in; always the same one."""
    base = importlib.import_module(namespace).LightningModule
    if (namespace, kind) not in _KINDS:
        name = f"{kind.__name__}_{namespace.replace('.', '_')}"
        made = type(name, (kind, base), {"__module__": kind.__module__, "__qualname__": name})
        _KINDS[namespace, kind] = globals()[name] = made  # the latter for pickle
    return _KINDS[namespace, kind]


def make_module(namespace: str = PREFERRED, kind: type = Toy, seed: int = 3, **options: Any) -> Any:
    """A module with its own initial weights; the global random stream starts at ``seed``."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the stream that user code draws from
    torch.manual_seed(seed)
    return in_namespace(namespace, kind)(**options)


def make_trainer(*callbacks: Any, namespace: str = PREFERRED, **options: Any) -> Any:
    """A quiet CPU trainer of one distribution."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 5,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 2,
    }
    settings.update(options)
    return importlib.import_module(namespace).Trainer(callbacks=list(callbacks), **settings)


class Counting(CMDCallback):
    """Counts snapshots and swaps, and remembers in which order things happened."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**SMALL, **options})
        self.events: list[tuple[Any, ...]] = []

    def count(self, kind: str) -> int:
        return sum(event[0] == kind for event in self.events)

    def take_snapshot(self, trainer: Any, pl_module: Any, label: int) -> None:
        super().take_snapshot(trainer, pl_module, label)
        self.events.append(("snapshot", trainer.current_epoch, trainer.global_step))

    def show_modelled(self, trainer: Any, pl_module: Any) -> bool:
        shown = super().show_modelled(trainer, pl_module)
        if shown:
            self.events.append(("show", trainer.current_epoch, trainer.global_step))
        return shown

    def hide_modelled(self) -> None:
        if self.showing == "modelled":
            self.events.append(("hide",))
        super().hide_modelled()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        kind = "sanity" if trainer.sanity_checking else "validation"
        super().on_validation_start(trainer, pl_module)
        self.events.append((kind, trainer.current_epoch, trainer.global_step))


class Watching(Counting):
    """After each validation, evaluates both sets of weights in a loop of its own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seen: list[tuple[dict[str, float], dict[str, float], dict[str, float]]] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.sanity_checking:
            return
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        raw = weights_of(pl_module)
        shown = modelled_weights(self, pl_module) if self.modes and self.modes.ready else raw
        loader = toy_loader(seed=2)
        self.seen.append(
            (logged, evaluate(pl_module, raw, loader), evaluate(pl_module, shown, loader))
        )


class Unchanged(Counting):
    """Says that it shows modelled weights but leaves the raw ones: both passes must then agree."""

    def show_modelled(self, trainer: Any, pl_module: Any) -> bool:
        return True


class Killing(Counting):
    """Kills its own process at the start of a training step."""

    at: int | None = None

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if self.at is not None and trainer.global_step >= self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def train_with_checkpoints(
    folder: Path, kill_at: int | None = None, resume: bool = False
) -> dict[str, Any]:
    """Seven epochs of six steps with a checkpoint after every fourth; returns the end."""
    callback = Killing(warmup=3)
    callback.at = kill_at
    callbacks = importlib.import_module(f"{PREFERRED}.callbacks")
    keep = callbacks.ModelCheckpoint(folder, save_last=True, every_n_train_steps=4)
    trainer = make_trainer(callback, keep, max_epochs=7, enable_checkpointing=True)
    module = make_module(dropout=0.0)
    path = folder / "last.ckpt" if resume else None
    trainer.fit(module, ResumableLoader(), toy_loader(seed=2), ckpt_path=path)
    return {"weights": weights_of(module), "state": callback.state_dict()}


class Parts(Sampler[int]):
    """Each process takes its share of every batch of 8, so that two see what one sees."""

    def __init__(self, count: int, rank: int, world: int) -> None:
        size = 8 // world
        starts = range(rank * size, count, 8)
        self.indices = [index for start in starts for index in range(start, start + size)]

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class Measured(Toy):
    """Logs a mean, a sum and a metric, and on rank 0 alone a number of its own."""

    def __init__(self, norm: bool) -> None:
        super().__init__(norm=norm, dropout=0.0)
        self.accuracy = Accuracy("multiclass", num_classes=3)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        scores = self(batch[0])
        loss = cross_entropy(scores, batch[1])
        self.log("val_loss", loss, sync_dist=True)
        self.log("val_sum", loss * len(batch[0]), reduce_fx="sum", sync_dist=True)
        self.accuracy(scores, batch[1])
        self.log("val_acc", self.accuracy)
        if self.trainer.is_global_zero:
            self.log("rank_zero", 1.0, rank_zero_only=True, batch_size=1)


class Statistics(Counting):
    """Keeps the BatchNorm mean that this process had before and after its latest snapshot.

    Also the statistics that its own batches alone give for the modelled weights, at the end.
    """

    mean: Tensor | None = None
    mean_after: Tensor | None = None
    own_statistics: dict[str, Tensor] | None = None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        batches = [batch[0] for _, batch in self._statistics._recent]
        if batches and self.modes is not None:
            with self.modes.swap(pl_module, recalibrate=batches):
                self.own_statistics = weights_of(pl_module)
        super().on_train_end(trainer, pl_module)

    def take_snapshot(self, trainer: Any, pl_module: Any, label: int) -> None:
        self.mean = weights_of(pl_module).get("net.1.running_mean")
        super().take_snapshot(trainer, pl_module, label)
        self.mean_after = weights_of(pl_module).get("net.1.running_mean")


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "namespace": {"namespace": "lightning.pytorch"},
    "norm": {"norm": True, "buffers": "model"},
    "recalibrated": {"norm": True},
    "options": {
        "norm": True,
        "buffers": "model",
        "evaluate": "modelled",
        "shrink": True,
        "profile": "mean",
        "storage": "fp32",
    },
    "embedded": {
        "norm": True,
        "buffers": "model",
        "mode": "embedded",
        "embed_every": 1,
        "embed_percent": 25.0,
    },
    "tied": {"mode": "embedded", "embed_every": 1, "embed_percent": 25.0, "project": "tie"},
    "pooled": {"mode": "embedded", "embed_every": 1, "embed_percent": 25.0, "project": "pool"},
}


def distributed_run(
    rank: int = 0,
    world: int = 1,
    namespace: str = "pytorch_lightning",
    norm: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Train and test on one rank; returns what it ended with."""
    settings: dict[str, Any] = {"use_distributed_sampler": False, "num_sanity_val_steps": 0}
    if world > 1:
        environments = importlib.import_module(f"{namespace}.plugins.environments")
        strategies = importlib.import_module(f"{namespace}.strategies")
        settings["devices"] = world
        settings["strategy"] = strategies.DDPStrategy(
            process_group_backend="gloo",
            timeout=timedelta(seconds=120),
            cluster_environment=environments.LightningEnvironment(),
        )

    def loader(data: TensorDataset) -> DataLoader:
        sampler = Parts(len(data), rank, world)
        return DataLoader(data, batch_size=8 // world, sampler=sampler)

    callback = Statistics(**options)
    module = make_module(namespace, Measured, norm=norm)
    trainer = make_trainer(callback, namespace=namespace, max_epochs=6, **settings)
    trainer.fit(module, loader(toy_data(48)), loader(toy_data(24, seed=2)))
    assert callback.modes is not None
    result = {
        "weights": weights_of(module),
        "state": callback.state_dict(),
        "modelled": callback.modes.reconstruct(),
        "mean": callback.mean,
        "mean_after": callback.mean_after,
        "own_statistics": callback.own_statistics,
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
    }
    trainer.test(module, loader(toy_data(24, seed=2)), verbose=False)
    result["test_loss"] = float(trainer.callback_metrics["test_loss"])
    return result


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(left: Any, right: Any) -> bool:
    """Whether two nested states are equal, tensors to the last bit."""
    if isinstance(left, Tensor):
        alike = isinstance(right, Tensor) and left.dtype == right.dtype
        return bool(alike and left.shape == right.shape and torch.equal(left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def modelled_weights(callback: CMDCallback, module: Any) -> dict[str, Tensor]:
    """The complete state_dict of the module with its modelled weights."""
    # Past the class that counts: nobody may notice this look.
    assert CMDCallback.show_modelled(callback, module.trainer, module)
    shown = weights_of(module)
    CMDCallback.hide_modelled(callback)
    return shown


def close(left: float, right: float) -> bool:
    """Whether two means over a data set agree up to the order of summation."""
    return abs(left - right) <= 2e-6 * max(1.0, abs(right))


def evaluate(module: Any, weights: dict[str, Tensor], loader: Any) -> dict[str, float]:
    """Loss and accuracy over all samples, in a loop that knows nothing of Lightning."""
    before = weights_of(module)
    was_training = module.training
    module.load_state_dict(weights)
    module.eval()
    loss, right, count = 0.0, 0, 0
    with torch.no_grad():
        for points, labels in loader:
            scores = module.net(points)
            loss += float(cross_entropy(scores.double(), labels, reduction="sum"))
            right += int((scores.argmax(1) == labels).sum())
            count += len(labels)
    module.load_state_dict(before)
    module.train(was_training)
    return {"loss": loss / count, "acc": right / count}
