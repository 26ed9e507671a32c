"""EMA and SWA against a plain loop over the same weights."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from typing_extensions import override

from cmd_plugin.callbacks._lightning import Callback
from cmd_plugin.data import load_dataset, make_loader
from cmd_plugin.errors import InputError, StateMismatch
from cmd_plugin.jobs.classifier import Classifier
from cmd_plugin.jobs.compare.averages import WeightAverages
from cmd_plugin.networks import build_model
from cmd_plugin.runs.process import quiet_lightning

EPOCHS = 4


class Weights(Callback):
    """Keeps copies of the network's state after each step and each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[dict[str, Tensor]] = []
        self.epochs: list[dict[str, Tensor]] = []
        self._seen = 0

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step > self._seen:
            self._seen = trainer.global_step
            self.steps.append(copied(pl_module.model))

    @override
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.epochs.append(copied(pl_module.model))


def copied(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def trained(
    *callbacks: Any, epochs: int = EPOCHS, checkpoint: Path | None = None, **options: Any
) -> Any:
    data = load_dataset("digits", train_limit=100)
    torch.manual_seed(1)
    module = Classifier(build_model("cnn", 1, 10, (8, 8)), 10)
    with quiet_lightning():
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )
        trainer.fit(module, make_loader(data.train, 32, shuffle_seed=0), ckpt_path=checkpoint)
    return module, trainer


@pytest.mark.parametrize("accumulate", [1, 2])
def test_both_averages_equal_a_loop(accumulate: int) -> None:
    averages, weights = WeightAverages(0.9, swa_start=2), Weights()
    trained(averages, weights, accumulate_grad_batches=accumulate)
    assert len(weights.steps) == EPOCHS * 4 // accumulate
    assert averages.ema is not None
    assert averages.swa is not None
    ema, swa = averages.ema.state_dict(), averages.swa.state_dict()
    for name, value in weights.steps[0].items():
        if not value.is_floating_point():
            # Counters are copied, never averaged.
            assert torch.equal(ema[name], weights.steps[-1][name])
            assert torch.equal(swa[name], weights.epochs[-1][name])
            continue
        expected = value.double()
        for state in weights.steps[1:]:
            expected = 0.9 * expected + 0.1 * state[name].double()
        torch.testing.assert_close(ema[name].double(), expected, rtol=1e-5, atol=1e-6)
        last = torch.stack([state[name].double() for state in weights.epochs[2:]]).mean(0)
        torch.testing.assert_close(swa[name].double(), last, rtol=1e-5, atol=1e-6)


def test_averages_are_absent_before_they_start() -> None:
    seen = []

    class Look(Callback):
        @override
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append((averages.ema is not None, averages.swa is not None))

    averages = WeightAverages(0.9, swa_start=2)
    trained(averages, Look(), epochs=3)
    assert seen == [(True, False), (True, False), (True, True)]


def test_training_is_the_same_with_and_without() -> None:
    plain, _ = trained()
    watched, _ = trained(WeightAverages())
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)


def test_resumed_averages_equal_uninterrupted_ones(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"

    class Save(Callback):
        @override
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(path)

    whole = WeightAverages(0.9, swa_start=1)
    trained(whole, Save())
    torch.load(path, weights_only=True)
    resumed = WeightAverages(0.9, swa_start=1)
    trained(resumed, checkpoint=path)
    first, second = whole.state_dict(), resumed.state_dict()
    assert first["last_step"] == second["last_step"]
    for name in ("ema", "swa"):
        for key, value in first["averages"][name].items():
            assert torch.equal(value, second["averages"][name][key]), key


def test_state_of_another_network_is_refused() -> None:
    averages = WeightAverages()
    trained(averages, epochs=1)
    state = averages.state_dict()
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    assert torch.load(stream, weights_only=True)["last_step"] == 4
    state["averages"]["ema"].pop("module.head.bias")
    with pytest.raises(StateMismatch, match="do not fit this network"):
        averages.load_state_dict(state)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decay_out_of_range(decay: float) -> None:
    with pytest.raises(InputError, match="EMA decay"):
        WeightAverages(decay)
