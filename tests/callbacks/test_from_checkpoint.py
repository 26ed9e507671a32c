"""Validation and test with the weights of a checkpoint."""

from __future__ import annotations

import importlib
import inspect
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_toys import (
    Counting,
    Toy,
    close,
    evaluate,
    make_module,
    make_trainer,
    modelled_weights,
    same,
    toy_data,
    toy_loader,
    weights_of,
)

from cmd_plugin.errors import InputError, StateMismatch


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


@pytest.mark.parametrize("evaluation", ["both", "raw"])
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_new_process_shows_what_the_old_one_would(
    namespace: str, tmp_path: Path, evaluation: str
) -> None:
    """``validate``, ``test`` and ``predict`` from a checkpoint, by objects that never trained."""
    callbacks = importlib.import_module(f"{namespace}.callbacks")
    keep = callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)

    class Keeping(Counting):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_epoch_end(trainer, pl_module)
            if trainer.current_epoch == 4:
                self.wanted = modelled_weights(self, pl_module)

    trained = Keeping(evaluate=evaluation)
    make_trainer(trained, keep, namespace=namespace, max_epochs=7, enable_checkpointing=True).fit(
        make_module(namespace), toy_loader(shuffle=True), toy_loader(seed=2)
    )
    path, loader = tmp_path / "epoch=4.ckpt", toy_loader(seed=4)
    module = make_module(namespace, seed=9)
    expected = evaluate(module, trained.wanted, loader)

    def new_trainer() -> Any:
        return make_trainer(Keeping(), namespace=namespace)

    [result] = new_trainer().test(module, loader, ckpt_path=path, verbose=False)
    assert close(result["test_loss"], expected["loss"])
    trainer = new_trainer()
    trainer.validate(module, loader, ckpt_path=path, verbose=False)
    assert close(float(trainer.callback_metrics["cmd/val_loss"]), expected["loss"])
    raw = evaluate(module, weights_of(module), loader)
    assert close(float(trainer.callback_metrics["val_loss"]), raw["loss"])
    assert not close(raw["loss"], expected["loss"])
    scores = torch.cat(new_trainer().predict(module, loader, ckpt_path=path))
    module.load_state_dict(trained.wanted)
    module.eval()
    assert torch.allclose(scores, module(toy_data(seed=4).tensors[0]), atol=1e-6)


def without_statistics(path: Path) -> None:
    """Make a checkpoint one of those that were written before statistics were kept."""
    checkpoint = torch.load(path, weights_only=True)
    for state in checkpoint["callbacks"].values():
        del state["statistics"]
    torch.save(checkpoint, path)


def test_recalibration_without_training_batches_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(Counting(buffers="recalibrate"))
    trainer.fit(make_module(), toy_loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    without_statistics(tmp_path / "a.ckpt")
    alone = make_trainer(Counting(buffers="recalibrate"))
    with pytest.raises(InputError, match="needs training batches"):
        alone.test(make_module(), toy_loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    # The ways out that the message names.
    for options in ({"buffers": "keep"}, {"test": "raw"}):
        other = make_trainer(Counting(**options))
        other.test(make_module(), toy_loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    onwards, module = Counting(), make_module()
    make_trainer(onwards, max_epochs=6).fit(
        module, toy_loader(), toy_loader(seed=2), ckpt_path=tmp_path / "a.ckpt"
    )
    assert onwards.count("show") == 1
    # Without BatchNorm there is nothing to recalibrate.
    trainer = make_trainer(Counting(buffers="recalibrate"))
    trainer.fit(make_module(norm=False), toy_loader())
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    without_statistics(tmp_path / "b.ckpt")
    alone = make_trainer(Counting(buffers="recalibrate"))
    module = make_module(norm=False)
    alone.test(module, toy_loader(), ckpt_path=tmp_path / "b.ckpt", verbose=False)


def test_statistics_of_another_network_are_refused(tmp_path: Path) -> None:
    trainer = make_trainer(Counting())
    trainer.fit(make_module(), toy_loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    [state] = checkpoint["callbacks"].values()
    state["statistics"]["net.1.running_mean"] = torch.zeros(3)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    module = make_module()
    with pytest.raises(StateMismatch, match=r"'net\.1\.running_mean' has the shape \(3,\)"):
        make_trainer(Counting()).test(
            module, toy_loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False
        )


def test_a_checkpoint_with_modelled_statistics_says_what_to_do(tmp_path: Path) -> None:
    trainer = make_trainer(Counting(buffers="model"))
    trainer.fit(make_module(), toy_loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    path = tmp_path / "a.ckpt"
    with pytest.raises(StateMismatch, match=r"use CMDCallback\(buffers='model'\)"):
        make_trainer(Counting()).test(make_module(), toy_loader(), ckpt_path=path, verbose=False)
    again = Counting(buffers="model")
    make_trainer(again).test(make_module(), toy_loader(), ckpt_path=path, verbose=False)
    assert again.count("show") == 1
