"""BatchNorm's statistics of the modelled weights: which ones, where from, and for how long."""
# ruff: noqa: ARG002 - Lightning fixes the signatures of its hooks

from __future__ import annotations

import random
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from callback_toys import (
    SMALL,
    Counting,
    ResumableLoader,
    Toy,
    make_module,
    make_trainer,
    modelled_weights,
    same,
    toy_data,
    toy_loader,
    weights_of,
)
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers.logger import Logger
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from cmd_plugin.callbacks import CMDCallback
from cmd_plugin.errors import InputError


class Seen(Counting):
    """Keeps what the module holds while modelled weights are shown in a validation."""

    shown: dict[str, Tensor]

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_validation_start(trainer, pl_module)
        if self.showing == "modelled":
            self.shown = weights_of(pl_module)


def statistics_by_hand(weights: dict[str, Tensor], batches: list[Tensor]) -> dict[str, Tensor]:
    """Plain means over the batches of what the toy's BatchNorm sees of them."""
    outputs = [batch @ weights["net.0.weight"].T + weights["net.0.bias"] for batch in batches]
    return {
        "net.1.running_mean": torch.stack([output.mean(0) for output in outputs]).mean(0),
        "net.1.running_var": torch.stack([output.var(0) for output in outputs]).mean(0),
    }


def assert_statistics(weights: dict[str, Tensor], batches: list[Tensor]) -> None:
    for name, expected in statistics_by_hand(weights, batches).items():
        torch.testing.assert_close(weights[name], expected, rtol=1e-4, atol=1e-5)


def test_recalibrated_statistics_are_those_of_the_latest_batches() -> None:
    callback = Seen(evaluate="modelled", recalibration_batches=3)
    module = make_module()
    make_trainer(callback, max_epochs=5).fit(module, toy_loader(), toy_loader(seed=2))
    assert callback.buffers == "recalibrate"
    assert callback.modes is not None
    assert callback.modes.layout.names == (
        "net.0.weight", "net.0.bias", "net.1.weight", "net.1.bias", "net.4.weight", "net.4.bias",
    )  # fmt: skip
    points = toy_data().tensors[0]
    batches = [points[32:40], points[40:48], points[48:]]
    expected = statistics_by_hand(callback.shown, batches)
    mean, variance = expected["net.1.running_mean"], expected["net.1.running_var"]
    assert torch.allclose(callback.shown["net.1.running_mean"], mean, atol=1e-5)
    assert torch.allclose(callback.shown["net.1.running_var"], variance, rtol=1e-4)
    assert not torch.allclose(weights_of(module)["net.1.running_mean"], mean, atol=1e-3)


def test_an_epoch_of_few_batches_brings_no_batch_of_the_one_before() -> None:
    callback = Seen(evaluate="modelled", recalibration_batches=8)
    loader = ResumableLoader(epoch_length=3)
    make_trainer(callback, max_epochs=5).fit(make_module(), loader, toy_loader(seed=2))
    loader.set_epoch(4)
    loader.at = 0
    assert_statistics(callback.shown, [points for points, _ in loader])


@pytest.mark.parametrize("looks", ["never", "validation", "every step", "checkpoint"])
def test_the_statistics_do_not_depend_on_who_looks(tmp_path: Path, looks: str) -> None:
    """A snapshot after step 10 of 12 an epoch, on steps 7 to 10 and never on later ones."""

    class Looking(Counting):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            super().on_train_batch_end(trainer, pl_module, *args)
            if looks == "every step":
                self.show_modelled(trainer, pl_module)
                self.hide_modelled()
            if looks == "checkpoint" and trainer.global_step % 3 == 0:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    callback = Looking(
        every_n_steps=10,
        recalibration_batches=4,
        evaluate="both" if looks == "validation" else "raw",
    )
    module = make_module(dropout=0.0)
    trainer = make_trainer(callback, max_epochs=3)
    trainer.fit(module, ResumableLoader(epoch_length=12), toy_loader(seed=2))
    assert [event[2] for event in callback.events if event[0] == "snapshot"] == [10, 20, 30]
    loader = ResumableLoader(epoch_length=12)
    loader.set_epoch(2)
    batches = [points for points, _ in loader][2:6]  # 24 steps in two epochs, then 27 to 30
    assert_statistics(modelled_weights(callback, module), batches)


def test_each_snapshot_is_estimated_once() -> None:
    calls: list[int] = []

    def count(layer: Any, _: Any, output: Tensor) -> None:
        if layer.training and not torch.is_grad_enabled():
            calls.append(len(output))

    module = make_module()
    module.net[1].register_forward_hook(count)
    trainer = make_trainer(Counting(recalibration_batches=5), max_epochs=5)
    trainer.fit(module, toy_loader(), toy_loader(seed=2))
    trainer.test(module, toy_loader(seed=2), verbose=False)
    # With the first batch of the run, then with five for each of the snapshots 3, 4 and 5.
    assert calls == [8] + 3 * [8, 8, 8, 8, 2]


def test_a_network_without_batch_norm_never_notices(tmp_path: Path) -> None:
    class Particular(Toy):
        """Takes whole batches, so that calling it with an input alone would raise."""

        def forward(self, points: Tensor, labels: Tensor) -> Tensor:
            return cross_entropy(self.net(points), labels)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(*batch)

    callback = Counting(evaluate="raw")
    trainer = make_trainer(callback)
    module = make_module(kind=Particular, norm=False)
    kept: list[int] = []
    module.on_train_batch_end = lambda *_: kept.append(len(callback._statistics._recent))
    trainer.fit(module, toy_loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert set(kept) == {0}
    assert callback.show_modelled(trainer, module)


class Stubborn(Toy):
    """Keeps its BatchNorm in evaluation mode, with statistics from elsewhere."""

    def __init__(self, flags_alone: bool) -> None:
        super().__init__()
        self.flags_alone = flags_alone
        self.net[1].running_mean += 0.3
        self.net[1].eval()

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if not self.flags_alone:
            self.net[1].eval()
        return self


@pytest.mark.parametrize("flags_alone", [False, True])
@pytest.mark.filterwarnings("ignore:Found 1 module")
def test_layers_that_are_frozen_keep_their_statistics(flags_alone: bool) -> None:
    """By a ``train()`` of the module's own, or by a flag that Lightning leaves as it is."""
    callback = Seen(evaluate="modelled")
    module = make_module(kind=Stubborn, flags_alone=flags_alone)
    make_trainer(callback, max_epochs=5).fit(module, toy_loader(), toy_loader(seed=2))
    assert torch.equal(callback.shown["net.1.running_mean"], torch.full((12,), 0.3))
    assert torch.equal(callback.shown["net.1.running_var"], torch.ones(12))
    assert callback.showing == "raw"
    assert not module.net[1].training


class Mapped(Toy):
    """Batches are dictionaries."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch["points"], batch["labels"]), batch_idx)


def mapped() -> DataLoader:
    def collate(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        points, labels = zip(*rows, strict=True)
        return {"points": torch.stack(points), "labels": torch.stack(labels)}

    return DataLoader(toy_data(), batch_size=8, collate_fn=collate)


class Taking(Counting):
    def recalibration_input(self, batch: Any) -> Any:
        return batch["points"]


def test_a_module_that_cannot_be_called_is_told_with_the_first_batch() -> None:
    module = make_module(kind=Mapped)
    with pytest.raises(InputError, match=r"override CMDCallback\.recalibration_input, or choose"):
        make_trainer(Counting()).fit(module, mapped())
    assert len(module.losses) == 1
    for callback in (Taking(), Counting(buffers="keep"), Counting(buffers="model")):
        make_trainer(callback).fit(make_module(kind=Mapped), mapped(), toy_loader())
        assert callback.count("show") == 3


def test_a_module_without_forward_is_told_as_well() -> None:
    class Formless(Toy):
        forward = property()  # as if there were none

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return cross_entropy(self.net(batch[0]), batch[1])

    with pytest.raises(InputError, match="give the module a forward"):
        make_trainer(Counting()).fit(make_module(kind=Formless), toy_loader())


def test_no_more_batches_are_held_than_asked_for() -> None:
    class Batches:
        """Fresh tensors, and how many of them somebody holds."""

        def __init__(self) -> None:
            self.alive: list[weakref.ref[Tensor]] = []
            self.most = 0

        def __len__(self) -> int:
            return 10

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for points, labels in ResumableLoader(epoch_length=10):
                batch = points.clone()
                self.alive.append(weakref.ref(batch))
                yield batch, labels
                del batch
                self.count()

        def count(self) -> int:
            self.alive = [reference for reference in self.alive if reference() is not None]
            self.most = max(self.most, len(self.alive))
            return len(self.alive)

    mosts = []
    for options in ({"buffers": "keep"}, {"recalibration_batches": 4}):
        loader = Batches()
        callback = Counting(evaluate="raw", **options)
        trainer = make_trainer(callback, max_epochs=5)
        trainer.fit(make_module(), loader)
        mosts.append(loader.most)
        assert not callback._statistics._recent
    assert mosts[1] - mosts[0] <= 4


def test_a_forward_that_draws_random_numbers_leaves_no_trace() -> None:
    class Drawing(Toy):
        drawn = 0

        def forward(self, points: Tensor) -> Tensor:
            if self.training:
                noise = random.random() + np.random.rand() + float(torch.rand(()))  # noqa: NPY002
                points = points + 0.01 * noise
                self.drawn += 1
            return super().forward(points)

    ends = []
    for callbacks in ([Counting()], []):
        module = make_module(kind=Drawing)
        make_trainer(*callbacks).fit(module, toy_loader(), toy_loader(seed=2))
        ends.append((weights_of(module), module.losses, module.drawn, random.getstate()))
    assert same(ends[0], ends[1])


class Stop(Exception):
    """What ends a run in this file."""


class Stopping(CMDCallback):
    """Stops before the given optimizer step."""

    at: int | None = None

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.at:
            raise Stop


class Memory(Logger):
    """Everything that is logged, as it was logged."""

    name = version = "memory"

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[tuple[int, str], float] = {}

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.update({(step or 0, name): value for name, value in metrics.items()})


@pytest.mark.parametrize("stop_at", [7, 10, 13, 17])
@pytest.mark.parametrize("settings", [{}, {"val_check_interval": 2}], ids=["epochs", "within"])
def test_resume_is_exact_where_an_epoch_is_shorter_than_what_is_kept(
    tmp_path: Path, stop_at: int, settings: dict[str, Any]
) -> None:
    """Epochs of three batches, eight kept; stopped in epochs 2 to 5, all metrics bit for bit."""

    def fit(name: str, seed: int, at: int | None = None, path: Path | None = None) -> Any:
        keep = ModelCheckpoint(tmp_path / name, save_last=True, save_on_train_epoch_end=True)
        callback, logger, module = Stopping(**SMALL), Memory(), make_module(seed=seed, dropout=0.0)
        callback.at = at
        options = {"max_epochs": 8, "enable_checkpointing": True, "num_sanity_val_steps": 0}
        trainer = make_trainer(callback, keep, logger=logger, **{**options, **settings})
        loader = ResumableLoader(epoch_length=3)
        with pytest.raises(Stop) if at is not None else nullcontext():
            trainer.fit(module, loader, toy_loader(seed=2), ckpt_path=path)
        return callback, logger.rows, module

    whole, expected, module = fit("whole", 3)
    _, first, _ = fit("parts", 3, stop_at)
    resumed, second, again = fit("parts", 77, path=tmp_path / "parts" / "last.ckpt")
    assert min(step for step, _ in second) >= 3 * (stop_at // 3)
    assert {**first, **second} == expected
    names = {name for _, name in expected}
    assert {"val_loss", "cmd/val_loss", "cmd/val_acc", "cmd/explained_variance"} <= names
    assert same(weights_of(again), weights_of(module))
    assert same(resumed.state_dict(), whole.state_dict())
