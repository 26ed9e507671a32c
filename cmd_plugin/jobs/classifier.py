"""The training task: a LightningModule that trains an image classifier reproducibly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from cmd_plugin.errors import InputError

__all__ = ["OPTIMIZERS", "SCHEDULES", "Classifier"]

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "cosine", "step")


class Classifier(pl.LightningModule):
    """Trains a network with cross entropy; logs `train_loss`, `val_loss` and `val_acc`.

    At the first batch of every epoch the global random state is seeded from the seed and the epoch
    number, so that a resumed run draws the same dropout masks as an uninterrupted one.

    Args:
        model: Maps images, float32 [B, C, H, W], to class scores [B, classes].
        classes: Number of classes.
        optimizer: `sgd`, `adam` or `adamw`.
        lr: Learning rate (at the start, if there is a schedule).
        momentum: Momentum of `sgd`.
        weight_decay: Weight decay; decoupled for `adamw`.
        schedule: `constant`, `cosine` (to 0 over the run, every step) or `step` (a tenth at one
            half and again at three quarters of the run).
        seed: Seed of whatever is random inside the network.

    Raises:
        InputError: If the optimizer or schedule is unknown or a number is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        classes: int,
        optimizer: str = "sgd",
        lr: float = 0.05,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        schedule: str = "constant",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if optimizer not in OPTIMIZERS:
            message = f"unknown optimizer {optimizer!r}: choose one of {', '.join(OPTIMIZERS)}."
            raise InputError(message)
        if schedule not in SCHEDULES:
            message = f"unknown schedule {schedule!r}: choose one of {', '.join(SCHEDULES)}."
            raise InputError(message)
        if not lr > 0.0:
            raise InputError(f"the learning rate must be above 0, got {lr}.")
        if weight_decay < 0.0:
            raise InputError(f"the weight decay must not be negative, got {weight_decay}.")
        self.model = model
        self.optimizer = optimizer
        self.lr = lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.schedule = schedule
        self.seed = seed
        self.accuracy = MulticlassAccuracy(num_classes=classes, average="micro")

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Class scores [B, classes] of images [B, C, H, W]."""
        scores: Tensor = self.model(images)
        return scores

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the epoch.

        Not at its start: how often Lightning draws between there and the first batch depends on
        whether the run was resumed.
        """
        if batch_idx == 0:
            state = np.random.SeedSequence([self.seed, self.current_epoch]).generate_state(1)
            torch.manual_seed(int(state[0]))

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy of a batch of images and labels."""
        images, labels = batch
        loss = cross_entropy(self(images), labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(labels))
        return loss

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy of a held-out batch."""
        images, labels = batch
        scores = self(images)
        self.accuracy(scores, labels)
        self.log("val_loss", cross_entropy(scores, labels), batch_size=len(labels))
        self.log("val_acc", self.accuracy, batch_size=len(labels))

    @override
    def configure_optimizers(self) -> Any:
        """The optimizer, and its schedule counted in optimizer steps."""
        options: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay}
        if self.optimizer == "sgd":
            options["momentum"] = self.momentum
        kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
        optimizer = kinds[self.optimizer](self.model.parameters(), **options)
        if self.schedule == "constant":
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler: torch.optim.lr_scheduler.LRScheduler
        if self.schedule == "cosine":
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(steps, 1))
        else:
            milestones = [steps // 2, steps * 3 // 4]
            scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }
