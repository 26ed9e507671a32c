"""Which weights validation, test and predict show, and what is logged about them."""
# ruff: noqa: ARG002 - Lightning fixes the signatures of its hooks

from __future__ import annotations

import csv
import importlib
import inspect
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from callback_toys import (
    Counting,
    Toy,
    evaluate,
    make_module,
    make_trainer,
    modelled_weights,
    same,
    toy_data,
    toy_loader,
    weights_of,
)
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchmetrics import Accuracy, MeanMetric, MetricCollection, Recall

from cmd_plugin.errors import InputError


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


def close(left: float, right: float) -> bool:
    return abs(left - right) <= 2e-6 * max(1.0, abs(right))


def test_both_sets_of_metrics_are_right(namespace: str) -> None:
    callback = Watching()
    module = make_module(namespace)
    make_trainer(callback, namespace=namespace, max_epochs=6).fit(
        module, toy_loader(), toy_loader(seed=2)
    )
    assert len(callback.seen) == 6
    for epoch, (logged, raw, modelled) in enumerate(callback.seen):
        assert close(logged["val_loss"], raw["loss"])
        assert close(logged["val_acc"], raw["acc"])
        assert close(logged["cmd/val_loss"], modelled["loss"])
        assert close(logged["cmd/val_acc"], modelled["acc"])
        assert (logged["cmd/val_loss"] == logged["val_loss"]) == (epoch < 2)
    assert "log" not in vars(module)
    assert module.training


def test_modelled_takes_the_place_of_raw(namespace: str) -> None:
    callback = Watching(evaluate="modelled")
    module = make_module(namespace)
    make_trainer(callback, namespace=namespace, max_epochs=5).fit(
        module, toy_loader(), toy_loader(seed=2)
    )
    for logged, _, modelled in callback.seen:
        assert close(logged["val_loss"], modelled["loss"])
        assert close(logged["val_acc"], modelled["acc"])
        assert "cmd/val_loss" not in logged
    assert not close(callback.seen[-1][0]["val_loss"], callback.seen[-1][1]["loss"])
    assert callback.count("show") == callback.count("hide") == 3


def test_raw_only() -> None:
    callback = Watching(evaluate="raw")
    make_trainer(callback).fit(make_module(), toy_loader(), toy_loader(seed=2))
    for logged, raw, _ in callback.seen:
        assert close(logged["val_loss"], raw["loss"])
        assert "cmd/val_loss" not in logged
    assert callback.count("show") == 0


class Unchanged(Counting):
    """Says that it shows modelled weights but leaves the raw ones: both passes must then agree."""

    def show_modelled(self, trainer: Any, pl_module: Any) -> bool:
        return True


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


class Fragile(Toy):
    """Raises in the given call of validation_step."""

    fails_at = -1
    calls = 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("validation broke")


@pytest.mark.parametrize(
    ("mode", "fails_at"),
    [
        ("both", 1),  # the listener of the warm-up is in place
        ("both", 7 * 3 + 2),  # the trainer's own pass, after the fit
        ("both", 7 * 3 + 7 + 2),  # the second pass
        ("modelled", 7 * 3 + 2),
    ],
)
def test_raw_weights_return_when_validation_raises(
    namespace: str, mode: str, fails_at: int
) -> None:
    class Remembering(Counting):
        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            if self.showing == "raw":
                self.raw = weights_of(pl_module)
            super().on_validation_start(trainer, pl_module)

    callback = Remembering(evaluate=mode, warmup=3)
    module = make_module(namespace, Fragile)
    module.fails_at = fails_at
    trainer = make_trainer(callback, namespace=namespace, max_epochs=6, num_sanity_val_steps=0)
    with pytest.raises(RuntimeError, match="validation broke"):
        trainer.fit(module, toy_loader(), toy_loader(seed=2))
    assert same(weights_of(module), callback.raw)
    assert callback.showing == "raw"
    assert callback.count("show") == callback.count("hide")
    assert callback.count("show") == int(mode == "modelled" or fails_at == 30)
    assert "log" not in vars(module)
    # The callback is fit for another run.
    module.fails_at = -1
    module.train()  # Lightning leaves it in evaluation mode
    again = make_trainer(callback, namespace=namespace, max_epochs=4)
    again.fit(module, toy_loader(), toy_loader(seed=2))
    assert "cmd/val_loss" in again.callback_metrics or mode == "modelled"


def test_monitors_see_the_metrics_of_the_modelled_weights(namespace: str, tmp_path: Path) -> None:
    """ModelCheckpoint in every phase, and a monitor that the user listed before the callback."""
    callbacks = importlib.import_module(f"{namespace}.callbacks")
    kept = callbacks.ModelCheckpoint(
        tmp_path, monitor="cmd/val_loss", filename="{epoch}", save_top_k=-1
    )
    early = callbacks.EarlyStopping("cmd/val_loss", patience=50)
    callback = Watching()
    trainer = make_trainer(
        early, callback, kept, namespace=namespace, max_epochs=6, enable_checkpointing=True
    )
    trainer.fit(make_module(namespace), toy_loader(), toy_loader(seed=2))
    losses = [logged["cmd/val_loss"] for logged, _, _ in callback.seen]
    assert float(kept.best_model_score) == min(losses)
    assert float(early.best_score) == min(losses)
    assert len(kept.best_k_models) == 6
    assert trainer.callbacks.index(callback) < trainer.callbacks.index(early)


def test_plateau_schedule_follows_the_modelled_weights() -> None:
    class Plateau(Toy):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            plan = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, mode="max")
            plan = {"scheduler": plan, "monitor": "cmd/val_loss"}
            return {"optimizer": optimizer, "lr_scheduler": plan}

    module = make_module(kind=Plateau)
    trainer = make_trainer(Counting(), max_epochs=4)
    trainer.fit(module, toy_loader(), toy_loader(seed=2))
    assert trainer.optimizers[0].param_groups[0]["lr"] < 0.1


def read_csv(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_loggers_get_both_at_the_same_step(namespace: str, tmp_path: Path) -> None:
    logger = importlib.import_module(f"{namespace}.loggers").CSVLogger(tmp_path, "", "")
    callback = Watching()
    make_trainer(callback, namespace=namespace, max_epochs=5, logger=logger).fit(
        make_module(namespace), toy_loader(), toy_loader(seed=2)
    )
    rows = read_csv(tmp_path)
    raw = {int(row["step"]): float(row["val_loss"]) for row in rows if row["val_loss"]}
    modelled = {int(r["step"]): float(r["cmd/val_loss"]) for r in rows if r["cmd/val_loss"]}
    epochs = {int(r["step"]): int(float(r["epoch"])) for r in rows if r["cmd/val_loss"]}
    assert raw.keys() == modelled.keys() == epochs.keys()
    assert list(epochs.values()) == [0, 1, 2, 3, 4]
    assert list(modelled.values()) == pytest.approx([s[0]["cmd/val_loss"] for s in callback.seen])
    assert list(raw.values()) == pytest.approx([s[0]["val_loss"] for s in callback.seen])
    variance = [
        float(row["cmd/explained_variance"]) for row in rows if row["cmd/explained_variance"]
    ]
    sizes = [float(row["cmd/state_bytes"]) for row in rows if row["cmd/state_bytes"]]
    assert callback.modes is not None
    assert len(variance) == 3
    assert variance[-1] == pytest.approx(callback.modes.explained_variance())
    assert len(sizes) == 5
    assert sizes[-1] == callback.modes.state_bytes == 9 * callback.modes.numel


def test_prefix_and_progress_bar() -> None:
    quiet, shown = Counting(prefix="quiet/"), Counting(prefix="bar_", prog_bar=True)
    trainer = make_trainer(quiet, shown, max_epochs=4)
    trainer.fit(make_module(), toy_loader(), toy_loader(seed=2))
    names = set(trainer.progress_bar_metrics)
    assert names == {"bar_val_loss", "bar_val_acc", "bar_state_bytes", "bar_explained_variance"}
    assert {"quiet/val_loss", "quiet/state_bytes"} <= set(trainer.callback_metrics)


def test_a_metric_kept_from_the_loggers_stays_out(tmp_path: Path, namespace: str) -> None:
    class Private(Toy):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("seen", 1.0, batch_size=1)
            self.log("hidden", 1.0, batch_size=1, logger=False)

    logger = importlib.import_module(f"{namespace}.loggers").CSVLogger(tmp_path, "", "")
    trainer = make_trainer(Counting(), namespace=namespace, max_epochs=4, logger=logger)
    trainer.fit(make_module(namespace, Private), toy_loader(), toy_loader(seed=2))
    assert "cmd/seen" in read_csv(tmp_path)[0]
    assert "cmd/hidden" not in read_csv(tmp_path)[0]
    assert trainer.callback_metrics["cmd/hidden"] == 1.0


def test_test_and_predict_show_modelled_weights(namespace: str) -> None:
    callback = Counting()
    module = make_module(namespace)
    trainer = make_trainer(callback, namespace=namespace)
    trainer.fit(module, toy_loader(), toy_loader(seed=2))
    raw, modelled = weights_of(module), modelled_weights(callback, module)
    loader = toy_loader(seed=4)
    result = trainer.test(module, loader, verbose=False)[0]["test_loss"]
    assert close(result, evaluate(module, modelled, loader)["loss"])
    assert not close(result, evaluate(module, raw, loader)["loss"])
    assert same(weights_of(module), raw)
    scores = torch.cat(trainer.predict(module, loader))
    assert same(weights_of(module), raw)
    module.load_state_dict(modelled)
    module.eval()
    assert torch.allclose(scores, module(toy_data(seed=4).tensors[0]), atol=1e-6)
    module.load_state_dict(raw)

    callback.test = "raw"
    result = trainer.test(module, loader, verbose=False)[0]["test_loss"]
    assert close(result, evaluate(module, raw, loader)["loss"])


def test_raw_weights_return_when_test_raises(namespace: str) -> None:
    class FragileTest(Toy):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            raise RuntimeError("test broke")

    callback = Counting()
    module = make_module(namespace, FragileTest)
    trainer = make_trainer(callback, namespace=namespace)
    trainer.fit(module, toy_loader())
    raw = weights_of(module)
    with pytest.raises(RuntimeError, match="test broke"):
        trainer.test(module, toy_loader(), verbose=False)
    assert same(weights_of(module), raw)
    assert callback.showing == "raw"


def test_another_module_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    callback = Counting()
    trainer = make_trainer(callback)
    trainer.fit(make_module(seed=1), toy_loader())
    other = make_module(seed=2)
    raw = weights_of(other)
    with caplog.at_level(logging.WARNING, "cmd_plugin"):
        result = trainer.test(other, toy_loader(seed=4), verbose=False)[0]["test_loss"]
    assert close(result, evaluate(other, raw, toy_loader(seed=4))["loss"])
    assert "the raw weights are used" in caplog.text


def test_testing_before_any_training_uses_raw_weights(caplog: pytest.LogCaptureFixture) -> None:
    module = make_module()
    with caplog.at_level(logging.WARNING, "cmd_plugin"):
        result = make_trainer(Counting()).test(module, toy_loader(seed=4), verbose=False)
    expected = evaluate(module, weights_of(module), toy_loader(seed=4))["loss"]
    assert close(result[0]["test_loss"], expected)
    assert "the raw weights are used" in caplog.text


@pytest.mark.parametrize("kind", ["best", "path"])
@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_test_from_a_checkpoint(namespace: str, tmp_path: Path, kind: str, fresh: bool) -> None:
    """The modelled weights are those of the checkpoint's epoch, not those in memory."""
    callbacks = importlib.import_module(f"{namespace}.callbacks")
    keeper = callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)

    class Keeping(Counting):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_epoch_end(trainer, pl_module)
            if trainer.current_epoch == 3:
                self.wanted = modelled_weights(self, pl_module)

    callback = Keeping()
    module = make_module(namespace)
    trainer = make_trainer(
        callback, keeper, namespace=namespace, max_epochs=7, enable_checkpointing=True
    )
    trainer.fit(module, toy_loader(), toy_loader(seed=2))
    path = str(tmp_path / "epoch=3.ckpt")
    keeper.best_model_path = path
    wanted, seen = callback.wanted, callback
    if fresh:
        kind, seen, module = "path", Keeping(), make_module(namespace, seed=9)
        trainer = make_trainer(seen, namespace=namespace)
    result = trainer.test(
        module, toy_loader(seed=4), ckpt_path=path if kind == "path" else "best", verbose=False
    )
    expected = evaluate(module, wanted, toy_loader(seed=4))["loss"]
    assert close(result[0]["test_loss"], expected)
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert same(weights_of(module), dict(saved))
    assert seen.modes is not None
    assert seen.modes.updates == 4


def test_weights_of_a_foreign_checkpoint_are_not_replaced(
    namespace: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Full or weights only: modes in memory belong to other weights than the checkpoint's."""
    other = make_trainer(namespace=namespace, max_epochs=1)
    other.fit(make_module(namespace, seed=8), toy_loader())
    for weights_only in (False, True):
        path = tmp_path / f"foreign{weights_only}.ckpt"
        other.save_checkpoint(path, weights_only=weights_only)
        module = make_module(namespace)
        trainer = make_trainer(Counting(), namespace=namespace)
        trainer.fit(module, toy_loader())
        with caplog.at_level(logging.WARNING, "cmd_plugin"):
            result = trainer.test(module, toy_loader(seed=4), ckpt_path=path, verbose=False)
        raw = torch.load(path, weights_only=True)["state_dict"]
        assert close(result[0]["test_loss"], evaluate(module, raw, toy_loader(seed=4))["loss"])
        assert "the raw weights are used" in caplog.text
        caplog.clear()


class Custom:
    """A hyper-parameter that safe loading refuses."""


def test_weights_only_checkpoint_with_a_custom_hyperparameter(tmp_path: Path) -> None:
    """A file that the user told Lightning to trust is trusted when it is read again."""

    class Configured(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters({"thing": Custom()})

    module = make_module(kind=Configured)
    trainer = make_trainer(Counting())
    trainer.fit(module, toy_loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    trusted: dict[str, Any] = {}
    if "weights_only" in inspect.signature(trainer.test).parameters:
        trusted["weights_only"] = False
    path = tmp_path / "a.ckpt"
    [result] = trainer.test(module, toy_loader(seed=4), ckpt_path=path, verbose=False, **trusted)
    expected = evaluate(module, weights_of(module), toy_loader(seed=4))["loss"]
    assert close(result["test_loss"], expected)


def test_a_module_with_its_own_log() -> None:
    class Renaming(Toy):
        def log(self, name: str, value: Any, **options: Any) -> None:
            super().log(name, value, **options)

    trainer = make_trainer(Unchanged(), max_epochs=4)
    trainer.fit(make_module(kind=Renaming), toy_loader(), toy_loader(seed=2))
    assert trainer.callback_metrics["val_loss"] == trainer.callback_metrics["cmd/val_loss"]


@pytest.mark.parametrize("mode", ["both", "modelled"])
def test_validate_alone_then_train_on(namespace: str, mode: str) -> None:
    """trainer.validate runs in inference mode, which must not leave its mark on the state."""
    runs = []
    for evaluation in (mode, "raw"):
        callback = Counting(evaluate=evaluation)
        module = make_module(namespace)
        trainer = make_trainer(callback, namespace=namespace, max_epochs=4)
        trainer.fit(module, toy_loader(), toy_loader(seed=2))
        modelled = evaluate(module, modelled_weights(callback, module), toy_loader(seed=5))
        raw = evaluate(module, weights_of(module), toy_loader(seed=5))
        trainer.validate(module, toy_loader(seed=5), verbose=False)
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        assert close(logged["val_loss"], (modelled if evaluation == "modelled" else raw)["loss"])
        if evaluation == "both":
            assert close(logged["cmd/val_loss"], modelled["loss"])
        trainer.fit_loop.max_epochs = 7
        trainer.fit(module, toy_loader(), toy_loader(seed=2))
        assert callback.modes is not None
        runs.append((weights_of(module), callback.modes.state_dict()))
    assert same(runs[0], runs[1])


def test_validate_from_a_checkpoint_then_train_on(namespace: str, tmp_path: Path) -> None:
    """State that is built inside inference mode can still be updated."""
    trainer = make_trainer(Counting(), namespace=namespace, max_epochs=4)
    trainer.fit(make_module(namespace), toy_loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    callback, module = Counting(), make_module(namespace)
    again = make_trainer(callback, namespace=namespace, max_epochs=2)
    again.validate(module, toy_loader(seed=2), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert "cmd/val_loss" in again.callback_metrics
    again.fit(module, toy_loader(), toy_loader(seed=2))
    assert callback.modes is not None
    assert callback.modes.updates == 6


def test_recalibrated_statistics_are_those_of_the_latest_batches() -> None:
    class Seen(Counting):
        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_validation_start(trainer, pl_module)
            if self.showing == "modelled":
                self.statistics = weights_of(pl_module.net[1])
                self.first = weights_of(pl_module.net[0])

    callback = Seen(evaluate="modelled", buffers="recalibrate", recalibration_batches=3)
    module = make_module()
    make_trainer(callback, max_epochs=5).fit(module, toy_loader(), toy_loader(seed=2))
    assert callback.modes is not None
    assert callback.modes.layout.names == (
        "net.0.weight", "net.0.bias", "net.1.weight", "net.1.bias", "net.4.weight", "net.4.bias",
    )  # fmt: skip
    points = toy_data().tensors[0]
    batches = [points[32:40], points[40:48], points[48:]]
    outputs = [batch @ callback.first["weight"].T + callback.first["bias"] for batch in batches]
    mean = torch.stack([output.mean(0) for output in outputs]).mean(0)
    variance = torch.stack([output.var(0) for output in outputs]).mean(0)
    assert torch.allclose(callback.statistics["running_mean"], mean, atol=1e-5)
    assert torch.allclose(callback.statistics["running_var"], variance, rtol=1e-4)
    assert not torch.allclose(weights_of(module)["net.1.running_mean"], mean, atol=1e-3)


def test_recalibration_without_training_batches_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(Counting(buffers="recalibrate"))
    trainer.fit(make_module(), toy_loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    alone = make_trainer(Counting(buffers="recalibrate"))
    with pytest.raises(InputError, match="needs training batches"):
        alone.test(make_module(), toy_loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    # Without BatchNorm there is nothing to recalibrate.
    trainer = make_trainer(Counting(buffers="recalibrate"))
    trainer.fit(make_module(norm=False), toy_loader())
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    alone = make_trainer(Counting(buffers="recalibrate"))
    module = make_module(norm=False)
    alone.test(module, toy_loader(), ckpt_path=tmp_path / "b.ckpt", verbose=False)


def test_code_can_ask_which_weights_it_sees() -> None:
    class Asking(Toy):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            callback = next(c for c in self.trainer.callbacks if isinstance(c, Counting))
            self.asked.append(callback.showing)

    # A tuple attribute is rebound, a list would get its contents back after the second pass.
    class Answers:
        def __init__(self) -> None:
            self.given: list[str] = []

        def append(self, answer: str) -> None:
            self.given.append(answer)

    module = make_module(kind=Asking)
    module.asked = Answers()
    trainer = make_trainer(Counting(), max_epochs=3, num_sanity_val_steps=0, limit_val_batches=1)
    trainer.fit(module, toy_loader(), toy_loader(seed=2))
    assert module.asked.given == ["raw", "raw", "raw", "modelled"]


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
