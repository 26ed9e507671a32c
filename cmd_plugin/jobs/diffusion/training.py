"""The training task: a LightningModule that trains a denoiser reproducibly."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from typing_extensions import override

from cmd_plugin.diffusion import NoiseSchedule, ScoreModel, denoiser_model

__all__ = ["DenoiserTraining"]


class DenoiserTraining(pl.LightningModule):
    """Trains a network to tell the noise from noised images; keeps an average of its weights.

    At the first batch of every epoch the global random state is seeded from the seed and the epoch
    number, so that a resumed run draws the same noise as an uninterrupted one.

    Args:
        network: From :func:`cmd_plugin.diffusion.build_denoiser`.
        shape: Shape of an image.
        schedule: A schedule of steps.
        lr: Highest learning rate: reached after 200 steps (at most a tenth), then cosine.
        lr_end: Share of it that is left at the end.
        ema: Decay of the averaged weights, lower in the first steps.
        seed: Seed of times, noise and dropout.

    Attributes:
        averaged: The network with averaged weights.
    """

    def __init__(
        self,
        network: nn.Module,
        shape: Sequence[int],
        schedule: NoiseSchedule,
        lr: float,
        lr_end: float,
        ema: float,
        seed: int,
    ) -> None:
        super().__init__()
        assert schedule.alphas_cumprod is not None
        self.network = network
        self.averaged = copy.deepcopy(network).requires_grad_(False)
        self.image_shape, self.schedule = tuple(shape), schedule
        self.lr, self.lr_end, self.ema, self.seed = lr, lr_end, ema, seed
        self.register_buffer("kept", schedule.alphas_cumprod.float(), persistent=False)

    def score_model(self) -> ScoreModel:
        """Return the averaged network as a score model."""
        return denoiser_model(self.averaged, self.image_shape, self.schedule)

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the epoch."""
        if batch_idx == 0:
            state = np.random.SeedSequence([self.seed, self.current_epoch]).generate_state(1)
            torch.manual_seed(int(state[0]))

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean squared error of the noise of a batch of images in [-1, 1]."""
        images, kept = batch[0], self.kept
        assert isinstance(kept, Tensor)
        t = torch.randint(len(kept), (len(images),), device=images.device)
        e = torch.randn_like(images)
        share = kept[t].reshape(-1, 1, 1, 1)
        noised = share.sqrt() * images + (1.0 - share).sqrt() * e
        return (self.network(noised, t) - e).square().mean()  # type: ignore[no-any-return]

    @override
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Average the weights."""
        step = self.global_step
        decay = min(self.ema, (1.0 + step) / (10.0 + step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.averaged.parameters()), list(self.network.parameters()), 1.0 - decay
            )

    @override
    def configure_optimizers(self) -> Any:
        """AdamW, its learning rate counted in optimizer steps."""
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=self.lr)
        total = max(int(self.trainer.estimated_stepping_batches), 1)
        warm = max(min(200, total // 10), 1)

        def factor(step: int) -> float:
            if step < warm:
                return (step + 1) / warm
            share = min((step - warm) / max(total - warm, 1), 1.0)
            return self.lr_end + (1.0 - self.lr_end) * 0.5 * (1.0 + math.cos(math.pi * share))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }
