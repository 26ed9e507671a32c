"""The training task: optimizers, schedules, seeds, and what it logs."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from typing_extensions import override

from cmd_plugin.callbacks._lightning import Callback
from cmd_plugin.data import load_dataset, make_loader
from cmd_plugin.errors import InputError
from cmd_plugin.jobs.classifier import Classifier
from cmd_plugin.networks import evaluate
from cmd_plugin.runs.process import quiet_lightning


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Dropout(0.5), nn.Linear(16, 10))


def fit(module: Classifier, *callbacks: Any, epochs: int = 4, validate: bool = False) -> pl.Trainer:
    data = load_dataset("digits", train_limit=64)
    with quiet_lightning():
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        held_out = make_loader(data.test, 100) if validate else None
        trainer.fit(module, make_loader(data.train, 16, shuffle_seed=0), held_out)
    return trainer


class Rates(Callback):
    """Notes the learning rate of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[float] = []

    @override
    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_schedules() -> None:
    expected = {
        "constant": [0.1] * 16,
        "cosine": [
            0.05 * (1 + torch.cos(torch.tensor(torch.pi * s / 16)).item()) for s in range(16)
        ],
        "step": [0.1] * 8 + [0.01] * 4 + [0.001] * 4,
    }
    for schedule, rates in expected.items():
        seen = Rates()
        fit(Classifier(network(), 10, lr=0.1, schedule=schedule), seen)
        assert seen.rates == pytest.approx(rates, abs=1e-7), schedule


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)],
)
def test_optimizers(name: str, kind: type) -> None:
    module = Classifier(network(), 10, optimizer=name, lr=0.003, momentum=0.5, weight_decay=0.02)
    optimizer = module.configure_optimizers()
    assert type(optimizer) is kind
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.003, 0.02)
    assert name != "sgd" or group["momentum"] == 0.5


def test_validation_logs_what_the_shared_evaluation_finds() -> None:
    module = Classifier(network(), 10)
    trainer = fit(module, validate=True)
    data = load_dataset("digits", train_limit=64)
    score = evaluate(module.model, make_loader(data.test, 77))
    assert float(trainer.callback_metrics["val_acc"]) == pytest.approx(score.accuracy)
    assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(score.loss, rel=1e-5)
    assert 0 < float(trainer.callback_metrics["train_loss"]) < 3


def test_the_seed_decides_the_dropout_masks() -> None:
    def weights(seed: int, disturbance: int) -> list[torch.Tensor]:
        module = Classifier(network(), 10, seed=seed)
        torch.manual_seed(disturbance)  # whatever happened before must not matter
        fit(module)
        return [p.detach().clone() for p in module.parameters()]

    first, again, other = weights(3, 0), weights(3, 99), weights(4, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "lion"},
        {"schedule": "linear"},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"weight_decay": -1.0},
    ],
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Classifier(network(), 10, **options)
