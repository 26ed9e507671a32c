"""A LightningModule as a federated client: the client is the ten lines of ``train``.

    python examples/federated_lightning/run.py

Four clients with a part of scikit-learn's digits each, in this process; the same ``app`` deploys to
SuperNodes. Optimizers (Adam's moments here) and callbacks go on from round to round.
"""

from __future__ import annotations

import logging

import pytorch_lightning as pl
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset, TensorDataset

from cmd_plugin.data import load_dataset
from cmd_plugin.federated import CMDStrategy, InProcessGrid, cmd_mod, fit_round, partition_indices
from cmd_plugin.modes import Embedding

CLIENTS, ROUNDS = 4, 14
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


class Digits(pl.LightningModule):
    """Anybody's module."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU()
        )
        self.head = nn.Linear(64, 10)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """Cross entropy of a batch."""
        loss = cross_entropy(self.head(self.network(batch[0])), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, whose moments are kept between rounds."""
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def tensors(part: str) -> TensorDataset:
    """Return the training or held-out digits."""
    images = getattr(load_dataset("digits"), part)
    return TensorDataset(*images.__getitems__(range(len(images))))


app = ClientApp(mods=[cmd_mod])


@app.train()
def train(message: Message, context: Context) -> Message:
    """The client."""
    data = tensors("train")
    parts = partition_indices(data.tensors[1].numpy(), CLIENTS, "iid", seed=0)
    mine = Subset(data, parts[int(context.node_config["partition-id"])].tolist())
    trainer = pl.Trainer(accelerator="cpu", devices=1, enable_model_summary=False, **QUIET)
    loader = DataLoader(mine, batch_size=32, shuffle=True)
    return fit_round(message, context, Digits(), trainer, loader, epochs=1)


def main() -> None:
    """Train, and say how good the model is and how little was sent."""
    for name in ("flwr", "pytorch_lightning"):  # they announce themselves in every round
        logging.getLogger(name).setLevel(logging.ERROR)
    pl.seed_everything(0, verbose=False)
    model, held_out = Digits(), tensors("test")

    def score(round_number: int, arrays: ArrayRecord) -> MetricRecord:
        model.load_state_dict(arrays.to_torch_state_dict())
        with torch.no_grad():
            guesses = model.head(model.network(held_out.tensors[0])).argmax(1)
        accuracy = (guesses == held_out.tensors[1]).float().mean().item()
        print(
            f"round {round_number}: accuracy {accuracy:.3f}, "
            f"{strategy.embedded_fraction:.0%} not sent"
        )
        return MetricRecord({"accuracy": accuracy})

    inner = FedAvg(fraction_evaluate=0.0, min_available_nodes=CLIENTS)
    embedding = Embedding(every=2, percent=25.0, project="step")
    strategy = CMDStrategy(inner, embedding, modes=20, warmup=4, pool=True)
    grid = InProcessGrid(app, [{"partition-id": number} for number in range(CLIENTS)])
    start = ArrayRecord(model.state_dict())
    strategy.start(grid=grid, initial_arrays=start, num_rounds=ROUNDS, evaluate_fn=score)
    sent = strategy.traffic
    share = (sent.bytes_up + sent.bytes_down) / (sent.plain_up + sent.plain_down)
    print(f"{share:.1%} of FedAvg's bytes")


if __name__ == "__main__":
    main()
