"""A small CLIP-like LightningModule with its data, and one rank of a run over two processes."""

# ruff: noqa: ARG002 - Lightning fixes the signatures of its hooks

from __future__ import annotations

import importlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.utils.data import DataLoader, TensorDataset

from cmd_plugin.callbacks import EmbeddingGeometryMonitor
from cmd_plugin.clip import conformity, modality_gap, uniformity

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def pairs(count: int, seed: int = 0) -> TensorDataset:
    """Points, and three words each that say in which direction they lie."""
    points = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(points, (points[:, :3] > 0).long() + torch.tensor([0, 2, 4]))


class ToyClip:
    """Mixed into each distribution's LightningModule; dropout draws from the random stream."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 5))
        self.words = nn.EmbeddingBag(6, 5)

    def encode_image(self, x: Tensor) -> Tensor:
        return self.image(x)

    def encode_text(self, x: Tensor) -> Tensor:
        return self.words(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        left, right = normalize(self.encode_image(batch[0])), normalize(self.encode_text(batch[1]))
        return cross_entropy(left @ right.T / 0.1, torch.arange(len(left)))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: the monitor looks."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Resumable:
    """Six batches an epoch in an order of its own; goes on in the middle of an epoch."""

    def __init__(self) -> None:
        self.data, self.epoch, self.at = pairs(96), 0, 0
        self.sampler = self  # where Lightning looks for set_epoch

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.at = epoch, 0

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[list[Tensor]]:
        generator = torch.Generator().manual_seed(self.epoch)
        order = torch.randperm(96, generator=generator).split(16)
        for index in range(self.at, 6):
            self.at = index + 1
            yield list(self.data[order[index]])

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.at = state["epoch"], state["at"]


def make_clip(namespace: str = "pytorch_lightning", seed: int = 0) -> Any:
    """A module with weights of its own."""
    torch.manual_seed(seed)
    base = importlib.import_module(namespace).LightningModule
    return type("ToyClipModule", (ToyClip, base), {})()


def geometry_run(rank: int = 0, world: int = 1) -> dict[str, Any]:
    """Train two epochs on one rank of two; what the monitor logged, and its sums."""
    namespace = "pytorch_lightning"
    lightning = importlib.import_module(namespace)
    settings: dict[str, Any] = {**QUIET, "enable_checkpointing": False, "max_epochs": 2}
    if world > 1:
        environments = importlib.import_module(f"{namespace}.plugins.environments")
        strategies = importlib.import_module(f"{namespace}.strategies")
        settings |= {
            "devices": world,
            "use_distributed_sampler": False,
            "strategy": strategies.DDPStrategy(
                process_group_backend="gloo",
                timeout=timedelta(seconds=120),
                cluster_environment=environments.LightningEnvironment(),
            ),
        }
    module = make_clip(namespace)
    module.image[2].p = 0.0
    monitor = EmbeddingGeometryMonitor(pairs=40, reference_batches=3)
    trainer = lightning.Trainer(callbacks=[monitor], num_sanity_val_steps=0, **settings)
    train, held_out = pairs(64), pairs(40, seed=1)

    def part(data: TensorDataset, size: int) -> DataLoader:
        own = [
            i
            for start in range(rank * size, len(data), size * world)
            for i in range(start, min(start + size, len(data)))
        ]
        return DataLoader(torch.utils.data.Subset(data, own), batch_size=size)

    trainer.fit(module, part(train, 16 // world), part(held_out, 8 // world))
    with torch.no_grad():  # what one process finds with these weights
        x, t = (
            encode(part)
            for encode, part in zip(
                (module.eval().encode_image, module.encode_text), held_out[:], strict=True
            )
        )
    return {
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "expected": {
            "gap": modality_gap(x, t).l2m,
            "image_conformity": float(conformity(x).mean()),
            "text_uniformity": uniformity(t),
        },
    }
