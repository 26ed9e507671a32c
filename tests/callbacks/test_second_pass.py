"""The pass with modelled weights: the numbers of Lightning's own pass, and no trace."""
# ruff: noqa: ARG002 - Lightning fixes the signatures of its hooks

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from callback_toys import (
    Counting,
    Toy,
    Unchanged,
    make_module,
    make_trainer,
    same,
    toy_data,
    toy_loader,
    weights_of,
)
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchmetrics import Accuracy, MeanMetric, MetricCollection, Recall


class LogsEverything(Toy):
    """Every way of logging that Lightning offers, and every kind of state a step may keep."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = Accuracy("multiclass", num_classes=3)
        self.by_loader = torch.nn.ModuleList([MeanMetric(), MeanMetric()])
        both = {
            "top": Accuracy("multiclass", num_classes=3, average="macro"),
            "recall": Recall("multiclass", num_classes=3, average="macro"),
        }
        self.collection = MetricCollection(both, prefix="all_", compute_groups=True)
        self.by_hand = MeanMetric()
        self.outputs: list[Tensor] = []
        self.history: list[float] = []
        self.best = float("inf")
        self.batches_seen = 0
        self.register_buffer("counter", torch.zeros((), dtype=torch.long))
        self.plain = torch.zeros(2)
        self.starts: list[int] = []

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        scores = self(batch[0])
        loss = cross_entropy(scores, batch[1])
        self.log("mean", loss)
        self.log("sum", loss, reduce_fx="sum")
        self.log("low", loss, reduce_fx=torch.min)
        self.log("high", loss, reduce_fx="max")
        self.log("forked", loss, on_step=True, on_epoch=True)
        self.log("step_only", loss, on_step=True, on_epoch=False)
        self.log("of_size_one", loss, batch_size=1)
        self.log("number", 0.5 * batch_idx, batch_size=len(batch[0]))
        self.log("half", loss.bfloat16())
        self.log("double", loss.double())
        self.log_dict({"in_dict": loss, "in_dict_too": 2 * loss}, sync_dist=True)
        self.log("unsuffixed", loss, add_dataloader_idx=False) if dataloader_idx == 0 else None
        self.accuracy(scores, batch[1])
        if dataloader_idx == 0:
            self.log("metric", self.accuracy)
            self.collection.update(scores, batch[1])
            self.log_dict(self.collection)
        self.by_loader[dataloader_idx].update(loss)
        self.log("metric_of_loader", self.by_loader[dataloader_idx])
        self.by_hand.update(loss)
        self.outputs.append(loss)
        self.batches_seen += 1
        self.counter += 1
        self.plain += float(loss)
        return loss

    def on_validation_batch_start(
        self, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.starts.append(batch_idx)

    def on_validation_batch_end(
        self, outputs: Tensor, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.log("in_batch_end", outputs)

    def on_validation_epoch_end(self) -> None:
        self.log("at_end", torch.stack(self.outputs).mean())
        self.log("by_hand", self.by_hand.compute())
        self.by_hand.reset()
        self.best = min(self.best, float(torch.stack(self.outputs).mean()))
        self.history.append(self.best)
        self.log("best", self.best)
        self.outputs.clear()


@pytest.mark.parametrize(("loaders", "limit"), [(1, 3), (2, 1.0)])
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_second_pass_over_the_same_weights_gives_the_same_numbers(
    namespace: str, loaders: int, limit: float
) -> None:
    """Bit for bit, however the module logs; and its own state is that of one validation."""
    data = [toy_loader(seed=2 + number) for number in range(loaders)]
    runs = []
    for callback in (Unchanged(), None):
        module = make_module(namespace, LogsEverything)
        trainer = make_trainer(
            *([callback] if callback else []),
            namespace=namespace,
            max_epochs=4,
            limit_val_batches=limit,
            num_sanity_val_steps=0,
        )
        trainer.fit(module, toy_loader(), data if loaders > 1 else data[0])
        metrics = {k: v for k, v in trainer.callback_metrics.items() if v.ndim == 0}
        runs.append((module, metrics))
    (watched, metrics), (alone, expected) = runs
    raw = {k: v for k, v in metrics.items() if not k.startswith("cmd/")}
    modelled = {k.removeprefix("cmd/"): v for k, v in metrics.items() if k.startswith("cmd/")}
    assert modelled.pop("state_bytes") > 0
    assert modelled.pop("explained_variance") > 0
    assert raw == expected
    names = {name.partition("/")[0] for name in expected}
    assert names >= {"mean", "sum", "low", "high", "forked", "forked_epoch", "metric", "all_top"}
    assert names >= {"all_recall", "in_dict_too", "in_batch_end", "at_end", "by_hand", "best"}
    assert modelled.keys() == expected.keys() - {"step_only"}
    # The best so far is the only number that a second pass over equal weights may repeat.
    assert {k: float(v) for k, v in modelled.items()} == {
        k: float(v) for k, v in expected.items() if k != "step_only"
    }
    for name in ("outputs", "history", "best", "batches_seen", "starts"):
        assert getattr(watched, name) == getattr(alone, name), name
    assert torch.equal(watched.counter, alone.counter)
    assert torch.equal(watched.plain, alone.plain)
    assert same(weights_of(watched), weights_of(alone))


def test_loaders_may_have_their_own_limits_and_be_combined(namespace: str) -> None:
    class Pairs(Toy):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            for name, (points, labels) in batch.items():
                loss = cross_entropy(self(points), labels)
                self.log(f"loss_{name}", loss, batch_size=len(points))

    combined = importlib.import_module(f"{namespace}.utilities").CombinedLoader
    module = make_module(namespace, Pairs)
    trainer = make_trainer(Unchanged(), namespace=namespace, max_epochs=4)
    loaders = {"a": toy_loader(seed=2), "b": DataLoader(toy_data(20), batch_size=5)}
    trainer.fit(module, toy_loader(), combined(loaders, "max_size_cycle"))
    for name in ("loss_a", "loss_b"):
        assert trainer.callback_metrics[name] == trainer.callback_metrics[f"cmd/{name}"]


def test_step_without_batch_index() -> None:
    class Short(Toy):
        def validation_step(self, batch: Any) -> None:
            self.log("val_loss", cross_entropy(self(batch[0]), batch[1]))

    trainer = make_trainer(Unchanged(), max_epochs=4)
    trainer.fit(make_module(kind=Short), toy_loader(), toy_loader(seed=2))
    assert trainer.callback_metrics["val_loss"] == trainer.callback_metrics["cmd/val_loss"]


def test_one_shot_loader_gives_no_second_pass() -> None:
    """An iterator that is spent after Lightning's pass leaves nothing to evaluate."""

    class Once:
        def __init__(self) -> None:
            self.batches = iter(list(toy_loader(seed=2)))

        def __iter__(self) -> Iterator[Any]:
            return self.batches

    trainer = make_trainer(Unchanged(), max_epochs=3, check_val_every_n_epoch=3)
    trainer.fit(make_module(), toy_loader(), Once())
    assert "val_loss" in trainer.callback_metrics
    assert "cmd/val_loss" not in trainer.callback_metrics


def test_a_module_with_its_own_log() -> None:
    class Renaming(Toy):
        def log(self, name: str, value: Any, **options: Any) -> None:
            super().log(name, value, **options)

    trainer = make_trainer(Unchanged(), max_epochs=4)
    trainer.fit(make_module(kind=Renaming), toy_loader(), toy_loader(seed=2))
    assert trainer.callback_metrics["val_loss"] == trainer.callback_metrics["cmd/val_loss"]


@pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled")
def test_random_validation_data_do_not_shift() -> None:
    """A validation loader with a stream of its own goes on where Lightning's pass left it."""

    class Noting(Toy):
        def on_validation_epoch_start(self) -> None:
            self.noted = np.random.rand()  # noqa: NPY002 - the stream that user code draws from

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            self.orders = [*getattr(self, "orders", []), batch[0].sum().item()]

    orders = []
    for mode in ("both", "raw"):
        module = make_module(kind=Noting)
        generator = torch.Generator().manual_seed(5)
        loader = toy_loader(seed=2, shuffle=True, generator=generator)
        trainer = make_trainer(Counting(evaluate=mode), max_epochs=5)
        trainer.fit(module, toy_loader(), loader)
        orders.append((module.orders, module.noted, generator.get_state()))
    assert same(orders[0], orders[1])
