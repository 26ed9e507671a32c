"""The warning that modelled weights are far worse than raw ones."""
# ruff: noqa: ARG002 - Lightning fixes the signatures of its hooks

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from callback_toys import Counting, Toy, make_module, make_trainer, toy_loader
from torchmetrics import Metric

from cmd_plugin.callbacks._far_worse import higher_is_better, is_far_worse


@pytest.mark.parametrize(
    ("name", "higher"),
    [
        ("val_acc", True),
        ("val/top5_acc", True),
        ("val_acc@1/dataloader_idx_0", True),
        ("valAcc", True),
        ("val_accuracy_epoch", True),
        ("val_MulticlassAccuracy", True),
        ("BinaryF1Score", True),
        ("test/AUROC", True),
        ("mIoU", True),
        ("val_mAP", True),
        ("val_loss", False),
        ("valLoss", False),
        ("Validation Loss", False),
        ("top5_error", False),
        ("f1_loss", False),
        ("val_rmse", False),
        ("val_score", None),
        ("macc", None),
        ("learning_rate", None),
        ("glossary", None),
        ("", None),
    ],
)
def test_the_direction_is_told_from_the_name(name: str, higher: bool | None) -> None:
    assert higher_is_better(name) is higher


@pytest.mark.parametrize(
    ("raw", "modelled", "higher", "expected"),
    [
        (0.98, 0.116, True, True),
        (0.98, 0.79, True, False),  # 19 %
        (0.98, 0.78, True, True),
        (0.30, 0.21, True, False),  # 30 %, but 0.09
        (0.30, 0.19, True, True),
        (98.0, 90.0, True, False),  # in percent
        (98.0, 12.0, True, True),
        (0.5, 0.9, True, False),
        (0.5, float("nan"), True, True),
        (float("nan"), 0.5, True, False),
        (0.0, 0.0, True, False),
        (0.4, 0.79, False, False),
        (0.4, 0.81, False, True),
        (0.4, 0.1, False, False),
        (0.4, float("inf"), False, True),
        (0.4, float("nan"), False, True),
        (float("inf"), float("inf"), False, False),
        (-3.0, 5.0, False, False),  # a likelihood: no factor says anything
        (0.0, 1.0, False, False),
    ],
)
def test_what_counts_as_far_worse(
    raw: float, modelled: float, higher: bool, expected: bool
) -> None:
    assert is_far_worse(raw, modelled, higher) is expected


class Scripted(Toy):
    """Logs what it is told to, for raw and modelled weights."""

    logs: tuple[str, Any, Any] = ("val_acc", 0.98, 0.116)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        callback = next(c for c in self.trainer.callbacks if isinstance(c, Counting))
        name, raw, modelled = self.logs
        self.log(name, raw if callback.showing == "raw" else modelled)


def warnings_of(caplog: pytest.LogCaptureFixture, callback: Counting, *logs: Any) -> list[str]:
    module = make_module(kind=Scripted)
    if logs:
        module.logs = logs
    caplog.clear()
    with caplog.at_level(logging.WARNING, "cmd_plugin"):
        trainer = make_trainer(callback, max_epochs=6)
        trainer.fit(module, toy_loader(), toy_loader(seed=2))
    return [record.getMessage() for record in caplog.records if record.name.startswith("cmd_")]


def test_it_is_said_once_a_run_and_after_the_fit(caplog: pytest.LogCaptureFixture) -> None:
    callback = Counting(buffers="model")
    [message] = warnings_of(caplog, callback)
    assert message == (
        "After epoch 2, val_acc is 0.116 with the modelled weights and 0.98 with the raw ones: try "
        "buffers='recalibrate', more modes or a longer warmup, and until then use the raw weights "
        "with test='raw' and checkpoint_weights='raw'."
    )
    [again] = warnings_of(caplog, callback)  # another run, with the same callback
    assert again == message
    [advice] = warnings_of(caplog, Counting())
    assert "try more recalibration_batches, more modes" in advice


@pytest.mark.parametrize(
    ("logs", "said"),
    [
        (("val_loss", 0.2, 0.5), True),
        (("val_loss", 0.2, 0.3), False),
        (("val_acc", 0.98, 0.97), False),
        (("val_thing", 0.98, 0.1), False),
    ],
)
def test_other_metrics(caplog: pytest.LogCaptureFixture, logs: Any, said: bool) -> None:
    assert len(warnings_of(caplog, Counting(), *logs)) == said


@pytest.mark.parametrize("options", [{"evaluate": "raw"}, {"evaluate": "modelled"}])
def test_nothing_is_said_where_nothing_is_compared(
    caplog: pytest.LogCaptureFixture, options: dict[str, Any]
) -> None:
    assert warnings_of(caplog, Counting(**options)) == []


class Share(Metric):
    """Torchmetrics say themselves which way is better; the name they are logged under does not."""

    higher_is_better = True

    def __init__(self) -> None:
        super().__init__()
        self.add_state("value", torch.zeros(()))

    def update(self, value: float) -> None:
        self.value += value - self.value

    def compute(self) -> torch.Tensor:
        return self.value


@pytest.mark.parametrize(("higher", "said"), [(True, 1), (None, 0), (False, 0)])
def test_a_torchmetric_knows_its_direction(
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    higher: bool | None,
    said: int,
) -> None:
    monkeypatch.setattr(Share, "higher_is_better", higher)

    class Metered(Scripted):
        def __init__(self) -> None:
            super().__init__()
            self.metric = Share()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            callback = next(c for c in self.trainer.callbacks if isinstance(c, Counting))
            self.metric.update(0.9 if callback.showing == "raw" else 0.2)
            self.log("thing", self.metric)

    caplog.clear()
    with caplog.at_level(logging.WARNING, "cmd_plugin"):
        trainer = make_trainer(Counting(), max_epochs=4)
        trainer.fit(make_module(kind=Metered), toy_loader(), toy_loader(seed=2))
    found = [record for record in caplog.records if record.name.startswith("cmd_plugin")]
    assert len(found) == said
