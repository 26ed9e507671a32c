"""Two small encoders, trained to find each other, and a control trained by cross entropy."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
import torch
from pictures import COLOURS, LENGTH, PLACES
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize


class ImageEncoder(nn.Sequential):
    """Three strided convolutions and a projection: uint8 images [B, 3, 32, 32] to [B, d]."""

    def __init__(self, dim: int) -> None:
        super().__init__(
            nn.Conv2d(3, 32, 5, stride=2, padding=2),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(64, 128, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Flatten(),  # no pooling over places, which captions speak of
            nn.Linear(128 * 16, 256),
            nn.GELU(),
            nn.Linear(256, dim, bias=False),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return raw embeddings."""
        found: Tensor = super().forward(images.float() / 127.5 - 1.0)
        return found


class TextEncoder(nn.Module):
    """One transformer layer over words and a projection: word numbers [B, T] to [B, d]."""

    def __init__(self, words: int, dim: int, width: int = 64) -> None:
        super().__init__()
        self.words = nn.Embedding(words + 1, width, padding_idx=0)
        self.places = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        self.layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.projection = nn.Linear(width, dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return raw embeddings."""
        empty = tokens == 0
        read = self.layer(self.words(tokens) + self.places, src_key_padding_mask=empty)
        read = read.masked_fill(empty[..., None], 0.0).sum(dim=1)
        found: Tensor = self.projection(read / (~empty).sum(dim=1, keepdim=True))
        return found


class TinyClip(pl.LightningModule):
    """CLIP in small: symmetric InfoNCE with a learnt temperature; what the monitor logs is kept."""

    def __init__(self, words: int, dim: int = 64, lr: float = 1e-3) -> None:
        super().__init__()
        self.image, self.text = ImageEncoder(dim), TextEncoder(words, dim)
        self.scale = nn.Parameter(torch.tensor(math.log(1.0 / 0.07)))
        self.lr = lr
        self.history: list[dict[str, float]] = []

    def encode_image(self, images: Tensor) -> Tensor:
        """Return raw image embeddings, which the monitor finds by this name."""
        found: Tensor = self.image(images)
        return found

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Return raw text embeddings."""
        found: Tensor = self.text(tokens)
        return found

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """InfoNCE of a batch, nats."""
        left = normalize(self.encode_image(batch[0]))
        right = normalize(self.encode_text(batch[1]))
        logits = self.scale.exp().clamp(max=100.0) * left @ right.T
        own = torch.arange(len(logits))
        loss = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2.0
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        """Nothing: the monitor looks at the pairs."""

    def on_validation_end(self) -> None:
        """Keep what the monitor logged."""
        found = self.trainer.callback_metrics.items()
        geometry = {name[9:]: float(value) for name, value in found if name.startswith("geometry/")}
        if geometry:
            self.history.append(geometry)

    def configure_optimizers(self) -> Any:
        """Adam with a cosine schedule."""
        return _adam(self, self.lr)


class Classifier(pl.LightningModule):
    """The control: the same image encoder, and a linear layer each for class, colour and place."""

    def __init__(self, classes: int, dim: int = 64, lr: float = 1e-3) -> None:
        super().__init__()
        self.image = ImageEncoder(dim)
        sizes = (classes, len(COLOURS), len(PLACES))
        self.heads = nn.ModuleList(nn.Linear(dim, size) for size in sizes)
        self.lr = lr

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Sum of three cross entropies, nats."""
        features = self.image(batch[0])
        losses = [
            cross_entropy(h(features), y) for h, y in zip(self.heads, batch[2].T, strict=True)
        ]
        return torch.stack(losses).sum()

    def configure_optimizers(self) -> Any:
        """Adam with a cosine schedule."""
        return _adam(self, self.lr)


def _adam(module: pl.LightningModule, lr: float) -> Any:
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0.01)
    steps = int(module.trainer.estimated_stepping_batches)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
