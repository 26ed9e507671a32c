"""What a callback needs to let weights follow their references while a run trains."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch
from typing_extensions import override

from cmd_plugin.callbacks._following import WeightFollower
from cmd_plugin.errors import InputError
from cmd_plugin.modes import Embedding

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer
    from torch.utils.hooks import RemovableHandle

__all__ = ["EmbeddedTraining"]


class EmbeddedTraining(WeightFollower):
    """Base of callbacks that embed weights, or only watch them.

    Args:
        warmup: As for :class:`WeightFollower`.
        checkpoint_weights: As for :class:`WeightFollower`.
        recalibration_batches: As for :class:`WeightFollower`.
        mode: ``"online"`` to watch, ``"embedded"`` to embed.
        embedding: The schedule; that of ``Embedding()`` unless weights are embedded.

    Attributes:
        mode: As given.
        embedding: The schedule; None when weights are only watched.

    Raises:
        InputError: If there is a schedule that nobody follows.
    """

    def __init__(
        self,
        warmup: int | float,
        checkpoint_weights: Literal["raw", "modelled"],
        recalibration_batches: int,
        mode: Literal["online", "embedded"],
        embedding: Embedding,
    ) -> None:
        super().__init__(warmup, checkpoint_weights, recalibration_batches)
        if mode == "online" and embedding != Embedding():
            message = (
                "embed_every, embed_percent, relative, project and slots say how weights are "
                "embedded, and mode='online' embeds none: add mode='embedded' or leave them out."
            )
            raise InputError(message)
        self.mode = mode
        self.embedding = embedding if mode == "embedded" else None
        self._handles: list[RemovableHandle] = []

    @override
    def take_snapshot(self, trainer: Trainer, pl_module: LightningModule, label: int) -> None:
        """Write the embedded weights, then hand all of them to :attr:`modes`."""
        self._project(trainer.optimizers)
        super().take_snapshot(trainer, pl_module, label)

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """With ``project="tie"``, hand the gradients of embedded weights to the references.

        Lightning calls this when gradients are accumulated, reduced over the processes and
        unscaled, and before it clips them.
        """
        if self.modes is None or self.embedding is None or self.embedding.project != "tie":
            return
        started = time.perf_counter()
        self.modes.tie_gradients(optimizer)
        self.seconds += time.perf_counter() - started

    def watch_steps(self, trainer: Trainer) -> None:
        """Write the embedded weights after every step of every optimizer, if that is wanted.

        Raises:
            InputError: With ``project="tie"`` and an optimizer that moves weights several times in
                a step.
        """
        self.ignore_steps()
        if self.embedding is None or self.embedding.project == "epoch":
            return
        for optimizer in trainer.optimizers:
            if self.embedding.project == "tie" and isinstance(optimizer, torch.optim.LBFGS):
                message = (
                    "project='tie' has to write weights between the evaluations that LBFGS makes "
                    "inside one step: use another optimizer, or project='step'."
                )
                raise InputError(message)
            self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def ignore_steps(self) -> None:
        """Leave nothing behind on the optimizers."""
        while self._handles:
            self._handles.pop().remove()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the optimizers behind too."""
        return {**super().__getstate__(), "_handles": []}

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._project([optimizer])

    def _project(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        if self.modes is None or self.embedding is None:
            return
        started = time.perf_counter()
        self.modes.project(optimizers=optimizers)
        self.seconds += time.perf_counter() - started
