"""When snapshots are taken."""
# ruff: noqa: ARG002 - Lightning fixes the signatures of its hooks

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from callback_toys import Counting, Toy, make_module, make_trainer, same, toy_data, toy_loader
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import IterableDataset

from cmd_plugin.callbacks import CMDCallback
from cmd_plugin.errors import InputError
from cmd_plugin.modes import OnlineModes


def snapshots(callback: Counting) -> list[tuple[int, int]]:
    """(epoch, global step) of every snapshot."""
    return [event[1:] for event in callback.events if event[0] == "snapshot"]


def test_state_equals_a_loop_written_by_hand(namespace: str) -> None:
    """Definition of done 1: nothing but OnlineModes.update() after each epoch."""
    callback = CMDCallback(modes=3, warmup=3, samples=60, seed=5)
    module = make_module(namespace)
    trainer = make_trainer(callback, namespace=namespace, max_epochs=6, num_sanity_val_steps=0)
    trainer.fit(module, toy_loader())

    twin = make_module(namespace)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    modes = OnlineModes(twin, 3, 3, 60, seed=5, buffers=callback.buffers)
    twin.train()
    for epoch in range(6):
        for points, labels in toy_loader():
            optimizer.zero_grad()
            cross_entropy(twin(points), labels).backward()
            optimizer.step()
        modes.update(label=epoch)

    assert callback.modes is not None
    assert callback.modes.updates == 6
    assert callback.modes.ready
    assert same(callback.modes.state_dict(), modes.state_dict())
    assert torch.equal(callback.modes.reconstruct(), modes.reconstruct())
    assert callback.modes.decomposition().epochs == [0, 1, 2, 3, 4, 5]
    assert 0 < callback.seconds < 60


@pytest.mark.parametrize(
    ("options", "steps_per_epoch", "epochs"),
    [
        ({}, 7, 4),
        ({"limit_train_batches": 3}, 3, 4),
        ({"limit_train_batches": 0.5}, 3, 4),
        ({"accumulate_grad_batches": 2}, 4, 4),
        ({"accumulate_grad_batches": 3, "limit_train_batches": 5}, 2, 4),
        ({"val_check_interval": 0.5}, 7, 4),
        ({"val_check_interval": 2}, 7, 4),
        ({"val_check_interval": 5, "check_val_every_n_epoch": None}, 7, 4),
        ({"check_val_every_n_epoch": 2}, 7, 4),
        ({"limit_val_batches": 0}, 7, 4),
        ({"limit_val_batches": 2}, 7, 4),
        ({"num_sanity_val_steps": 0}, 7, 4),
        ({"num_sanity_val_steps": -1}, 7, 4),
        ({"overfit_batches": 2}, 2, 4),
        ({"reload_dataloaders_every_n_epochs": 1}, 7, 4),
    ],
)
@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_one_snapshot_an_epoch_before_validation(
    options: dict[str, Any], steps_per_epoch: int, epochs: int
) -> None:
    callback = Counting()
    trainer = make_trainer(callback, max_epochs=epochs, **options)
    trainer.fit(make_module(), toy_loader(), toy_loader(seed=2))
    assert snapshots(callback) == [(e, (e + 1) * steps_per_epoch) for e in range(epochs)]
    ends = [
        e for e in callback.events if e[0] == "validation" and e[2] == steps_per_epoch * (e[1] + 1)
    ]
    for end in ends:
        snapshot = ("snapshot", *end[1:])
        assert callback.events.index(snapshot) < callback.events.index(end)
    assert callback.count("show") == callback.count("hide")


def test_sanity_check_is_not_a_validation() -> None:
    callback = Counting(evaluate="modelled")
    trainer = make_trainer(callback, max_epochs=1, num_sanity_val_steps=2)
    trainer.fit(make_module(), toy_loader(), toy_loader(seed=2))
    assert callback.events == [("sanity", 0, 0), ("snapshot", 0, 7), ("validation", 0, 7)]


def test_sanity_check_of_a_fitted_module_shows_raw_weights() -> None:
    callback = Counting(evaluate="modelled")
    module = make_module()
    make_trainer(callback, max_epochs=3).fit(module, toy_loader(), toy_loader(seed=2))
    callback.events.clear()
    make_trainer(callback, max_epochs=1).fit(module, toy_loader(), toy_loader(seed=2))
    assert callback.events == [
        ("sanity", 0, 0),
        ("snapshot", 0, 7),
        ("show", 0, 7),
        ("validation", 0, 7),
        ("hide",),
    ]


class Stream(IterableDataset):
    """A data set without a length."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(toy_data())


@pytest.mark.parametrize("limit", [1.0, 4])
def test_loader_without_length(limit: float) -> None:
    callback = Counting()
    trainer = make_trainer(callback, max_epochs=4, limit_train_batches=limit)
    loader = torch.utils.data.DataLoader(Stream(), batch_size=8)
    trainer.fit(make_module(), loader, toy_loader(seed=2))
    steps = 7 if limit == 1.0 else 4
    assert snapshots(callback) == [(epoch, steps * (epoch + 1)) for epoch in range(4)]
    for epoch in range(4):
        at = (epoch, steps * (epoch + 1))
        assert callback.events.index(("snapshot", *at)) < callback.events.index(("validation", *at))


def test_epoch_cut_by_max_steps_counts_once() -> None:
    callback = Counting()
    trainer = make_trainer(callback, max_epochs=-1, max_steps=17)
    trainer.fit(make_module(), toy_loader(), toy_loader(seed=2))
    assert snapshots(callback) == [(0, 7), (1, 14), (2, 17)]


def test_epoch_cut_by_the_module() -> None:
    class Skipping(Toy):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 4 else None

    callback = Counting()
    trainer = make_trainer(callback, max_epochs=3)
    trainer.fit(make_module(kind=Skipping), toy_loader())
    assert snapshots(callback) == [(0, 4), (1, 8), (2, 12)]


def test_every_n_epochs() -> None:
    callback = Counting(every_n_epochs=3)
    make_trainer(callback, max_epochs=10).fit(make_module(), toy_loader())
    assert snapshots(callback) == [(2, 21), (5, 42), (8, 63)]
    assert callback.modes is not None
    assert callback.modes.decomposition().epochs == [2, 5, 8]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_every_n_steps_counts_optimizer_steps(accumulate: int) -> None:
    callback = Counting(every_n_steps=4)
    trainer = make_trainer(callback, max_epochs=4, accumulate_grad_batches=accumulate)
    trainer.fit(make_module(), toy_loader())
    total = 28 if accumulate == 1 else 12
    assert [step for _, step in snapshots(callback)] == list(range(4, total + 1, 4))


class TwoOptimizers(Toy):
    """Manual optimization: two steps per batch, so the global step moves by two."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            loss = cross_entropy(self(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        first, last = self.net[0].parameters(), self.net[-1].parameters()
        return [torch.optim.SGD(first, lr=0.1), torch.optim.Adam(last, lr=0.01)]


def test_several_optimizers() -> None:
    by_epoch, by_step = Counting(prefix="a/"), Counting(every_n_steps=5, prefix="b/")
    trainer = make_trainer(by_epoch, by_step, max_epochs=3)
    trainer.fit(make_module(kind=TwoOptimizers), toy_loader())
    assert snapshots(by_epoch) == [(0, 14), (1, 28), (2, 42)]
    # The first even step at or after each multiple of five.
    assert [step for _, step in snapshots(by_step)] == [6, 10, 16, 20, 26, 30, 36, 40]


def test_schedule_of_ones_own() -> None:
    class Late(Counting):
        def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
            self.events.append(("asked", step_idx, epoch_idx))
            return step_idx is not None and step_idx >= 10 and step_idx % 2 == 0

    callback = Late()
    make_trainer(callback, max_epochs=2).fit(make_module(), toy_loader())
    assert [step for _, step in snapshots(callback)] == [11, 13]
    asked = [event[1:] for event in callback.events if event[0] == "asked"]
    assert [step for step, _ in asked if step is not None] == list(range(14))
    assert [epoch for _, epoch in asked if epoch is not None] == [0, 1]


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"fast_dev_run": 3}])
@pytest.mark.parametrize("warmup", [2, 0.5])
def test_fast_dev_run(options: dict[str, Any], warmup: float) -> None:
    callback = Counting(warmup=warmup)
    trainer = make_trainer(callback, **options)
    trainer.fit(make_module(), toy_loader(), toy_loader(seed=2))
    assert len(snapshots(callback)) == 1
    assert callback.modes is not None
    assert not callback.modes.ready


def test_no_training_at_all() -> None:
    for options in ({"limit_train_batches": 0}, {"max_epochs": 0}):
        callback = Counting()
        make_trainer(callback, **options).fit(make_module(), toy_loader(), toy_loader(seed=2))
        assert snapshots(callback) == []


@pytest.mark.parametrize(
    ("options", "trainer_options", "expected"),
    [
        ({"warmup": 0.5}, {"max_epochs": 8}, 4),
        ({"warmup": 0.1}, {"max_epochs": 8}, 2),
        ({"warmup": 0.99}, {"max_epochs": 8}, 7),
        ({"warmup": 0.5, "every_n_epochs": 2}, {"max_epochs": 16}, 4),
        ({"warmup": 0.5, "every_n_steps": 7}, {"max_epochs": 8}, 4),
        ({"warmup": 0.5, "every_n_steps": 2}, {"max_epochs": 4, "accumulate_grad_batches": 2}, 4),
        ({"warmup": 0.5}, {"max_epochs": 100, "max_steps": 50}, 4),
        ({"warmup": 0.5, "every_n_steps": 5}, {"max_epochs": -1, "max_steps": 40}, 4),
    ],
)
def test_warmup_as_a_fraction(
    options: dict[str, Any], trainer_options: dict[str, Any], expected: int
) -> None:
    callback = Counting(**options)
    make_trainer(callback, **trainer_options).fit(make_module(), toy_loader())
    assert callback.modes is not None
    assert callback.modes.state_dict()["config"]["warmup"] == expected
    assert callback.modes.ready


def test_fraction_of_an_endless_run_is_refused() -> None:
    class Stopping(Toy):
        def on_train_epoch_end(self) -> None:
            self.trainer.should_stop = True

    trainer = make_trainer(Counting(warmup=0.5), max_epochs=-1)
    with pytest.raises(InputError, match=r"warmup=0.5 .* set max_epochs or max_steps"):
        trainer.fit(make_module(kind=Stopping), toy_loader())


def test_fraction_in_steps_of_manual_optimization_is_refused() -> None:
    trainer = make_trainer(Counting(warmup=0.5, every_n_steps=3), max_epochs=2)
    with pytest.raises(InputError, match="number of snapshots is not known"):
        trainer.fit(make_module(kind=TwoOptimizers), toy_loader())


def test_run_shorter_than_the_warmup_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "cmd_plugin"):
        make_trainer(Counting(warmup=5), max_epochs=5).fit(make_module(), toy_loader())
    assert "plans 5 snapshots and the fit needs 6" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "cmd_plugin"):
        make_trainer(Counting(warmup=4), max_epochs=5).fit(make_module(), toy_loader())
    assert "plans" not in caplog.text


def test_second_fit_continues_the_same_module() -> None:
    callback = Counting()
    module = make_module()
    make_trainer(callback, max_epochs=2).fit(module, toy_loader())
    make_trainer(callback, max_epochs=2).fit(module, toy_loader())
    assert snapshots(callback) == [(0, 7), (1, 14), (0, 7), (1, 14)]
    assert callback.modes is not None
    assert callback.modes.updates == 4
    assert callback.modes.ready


@pytest.mark.parametrize("warmup", [2, 0.4])
def test_second_fit_of_another_module_starts_anew(warmup: float) -> None:
    callback = Counting(warmup=warmup)
    make_trainer(callback, max_epochs=5).fit(make_module(seed=1), toy_loader())
    other = make_module(seed=2)
    make_trainer(callback, max_epochs=5).fit(other, toy_loader())
    alone = Counting(warmup=warmup)
    make_trainer(alone, max_epochs=5).fit(make_module(seed=2), toy_loader())
    assert callback.modes is not None
    assert alone.modes is not None
    assert same(callback.modes.state_dict(), alone.modes.state_dict())


def test_more_epochs_with_the_same_trainer() -> None:
    callback = Counting()
    module = make_module()
    trainer = make_trainer(callback, max_epochs=2)
    trainer.fit(module, toy_loader())
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, toy_loader())
    assert snapshots(callback) == [(0, 7), (1, 14), (2, 21), (3, 28)]


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
@pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument")
def test_training_step_that_fetches_its_batches() -> None:
    """The last batch is only known once the loader is spent."""

    class Fetching(Toy):
        def training_step(self, dataloader_iter: Any) -> Tensor:
            batch, _, _ = next(dataloader_iter)
            return super().training_step(batch, 0)

    callback = Counting()
    trainer = make_trainer(callback, max_epochs=4)
    trainer.fit(make_module(kind=Fetching), toy_loader(), toy_loader(seed=2))
    assert snapshots(callback) == [(0, 7), (1, 14), (2, 21), (3, 28)]
