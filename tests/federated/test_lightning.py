"""A LightningModule as a client: the same weights as by hand, and a memory from round to round."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from cmd_plugin.errors import InputError
from cmd_plugin.federated import CMDStrategy, cmd_mod, fit_round
from cmd_plugin.modes import Embedding
from tests.helpers.federated import client_data, fed_avg, make_grid, network, run

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Module(pl.LightningModule):
    """The toy network with an optimizer that remembers."""

    def __init__(self) -> None:
        super().__init__()
        for name, child in network().named_children():
            self.add_module(name, child)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for child in self.children():
            inputs = child(inputs)
        return inputs

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
        return [optimizer], [scheduler]


class Counting(pl.Callback):
    """A callback with a state."""

    def __init__(self) -> None:
        self.epochs: list[int] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        self.epochs.append(trainer.current_epoch)

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": list(self.epochs)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs = list(state_dict["epochs"])


def loader(number: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*client_data(number)), batch_size=8)


def lightning_app(seen: list[Counting], epochs: int = 1) -> ClientApp:
    app = ClientApp(mods=[cmd_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        seen.append(Counting())
        trainer = pl.Trainer(callbacks=[seen[-1]], **QUIET)
        number = int(context.node_config["partition-id"])
        return fit_round(message, context, Module(), trainer, loader(number), epochs=epochs)

    return app


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_one_client_is_one_long_training() -> None:
    """Optimizer, scheduler and callbacks go on: five rounds of an epoch are five epochs."""
    seen: list[Counting] = []
    strategy = CMDStrategy(fed_avg(), warmup=20, samples=60)
    result = run(strategy, make_grid(lightning_app(seen), 1), 5)
    assert result.arrays is not None
    assert strategy.refusals == []
    assert [counting.epochs for counting in seen] == [list(range(n)) for n in range(1, 6)]
    module = Module()
    pl.Trainer(max_epochs=5, **QUIET).fit(module, loader(0))
    for name, expected in module.state_dict().items():
        assert np.array_equal(result.arrays[name].numpy(), expected.numpy()), name
    assert "train_loss" in result.train_metrics_clientapp[5]


def test_with_embedded_weights_and_after_a_lost_state() -> None:
    seen: list[Counting] = []
    embedding = Embedding(2, 30.0, project="step")
    strategy = CMDStrategy(fed_avg(), embedding, modes=3, warmup=2, samples=60)
    inner = make_grid(lightning_app(seen), 2)
    victim = list(inner.contexts)[1]

    def on_round(number: int, _: Any) -> None:
        if number == 6:
            inner.contexts[victim].state.clear()

    result = run(strategy, inner, 8, on_round=on_round)
    assert result.arrays is not None
    assert strategy.refusals == []
    assert strategy.resyncs == 1
    assert strategy.embedded_fraction > 0.4
    lengths = sorted(len(counting.epochs) for counting in seen[-2:])
    assert lengths == [2, 8]  # one remembers all eight rounds, the other started anew


def test_the_message_must_hold_one_model() -> None:
    content = RecordDict({"a": ArrayRecord(), "b": ArrayRecord()})
    make_grid(lightning_app([]), 1)
    message = Message(content, dst_node_id=1, message_type="train")
    context = Context(1, 1, {}, RecordDict(), {})
    with pytest.raises(InputError, match="expected one ArrayRecord in the message, got 2"):
        fit_round(message, context, Module(), pl.Trainer(**QUIET), loader(0))


@pytest.mark.slow
def test_the_example_runs(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    path = Path(__file__).parents[2] / "examples" / "federated_lightning" / "run.py"
    spec = importlib.util.spec_from_file_location("federated_lightning_example", path)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "ROUNDS", 8)
    example.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("% of FedAvg's bytes")
    last = next(line for line in reversed(lines) if line.startswith("round 8: accuracy"))
    assert float(last.split()[3].rstrip(",")) > 0.85
