"""Which weights validation, test and predict show."""
# ruff: noqa: ARG002 - Lightning fixes the signatures of its hooks

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from callback_toys import (
    Counting,
    Toy,
    Watching,
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
