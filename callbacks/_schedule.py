"""When snapshots are taken, and how many a run will give."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from cmd_plugin.callbacks._arguments import whole
from cmd_plugin.errors import InputError

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["Schedule"]

_logger = logging.getLogger("cmd_plugin.callbacks.cmd")  # of the callback the user knows


class Schedule:
    """Asks once after each optimizer step and once after each epoch whether a snapshot is due.

    Args:
        every_n_epochs: Snapshot after every n-th epoch.
        every_n_steps: Snapshot every n optimizer steps instead.

    Attributes:
        restored: Whether what has been asked came out of a checkpoint.

    Raises:
        InputError: If one is out of range, or both are given.
    """

    def __init__(self, every_n_epochs: int, every_n_steps: int | None) -> None:
        self.every_n_epochs = whole("every_n_epochs", every_n_epochs, 1)
        self.every_n_steps = every_n_steps
        if every_n_steps is not None:
            whole("every_n_steps", every_n_steps, 1)
            if every_n_epochs != 1:
                message = "every_n_steps and every_n_epochs exclude each other: give one of them."
                raise InputError(message)
        self.restored = False
        self._asked_step = self._step_before = 0
        self._asked_epoch = -1

    def is_due(self, step_idx: int | None, epoch_idx: int | None) -> bool:
        """Whether to take a snapshot after this 0-based step, or else after this epoch."""
        if step_idx is not None:
            every = self.every_n_steps
            # A batch may take several steps, so it is the crossing of a multiple that counts.
            return every is not None and (step_idx + 1) // every > self._step_before // every
        if epoch_idx is None or self.every_n_steps is not None:
            return False
        return (epoch_idx + 1) % self.every_n_epochs == 0

    def begin(self, trainer: Trainer) -> None:
        """Start a run where the trainer is, unless a checkpoint says where it was."""
        if not self.restored:  # e.g. the second fit() of one module, by a new trainer
            self._asked_step = trainer.global_step
            self._asked_epoch = trainer.current_epoch - 1

    def next_step(self, trainer: Trainer) -> int | None:
        """Return the number of steps taken; None if that has been asked about."""
        step = trainer.global_step
        if step <= self._asked_step:
            return None
        self._step_before, self._asked_step = self._asked_step, step
        return step

    def next_epoch(self, trainer: Trainer) -> int | None:
        """Return the index of the epoch that ended; None if that has been asked about."""
        epoch = trainer.current_epoch
        if epoch <= self._asked_epoch:
            return None
        self._asked_epoch = epoch
        return epoch

    def state_dict(self) -> dict[str, int]:
        """What has been asked about."""
        return {"asked_step": self._asked_step, "asked_epoch": self._asked_epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self._asked_step, self._asked_epoch = state["asked_step"], state["asked_epoch"]
        self.restored = True

    def planned_snapshots(self, trainer: Trainer) -> float | None:
        """How many snapshots the run gives: a whole number, inf, or None when it cannot be told.

        Ask in ``on_train_start`` or later, when the training data are set up: asking earlier would
        set them up at another place of the random stream.
        """
        batches = trainer.num_training_batches / trainer.accumulate_grad_batches
        steps_per_epoch = math.ceil(batches) if math.isfinite(batches) else math.inf
        # With manual optimization, one batch may take any number of steps.
        countable = trainer.lightning_module.automatic_optimization and steps_per_epoch > 0
        epochs = math.inf if trainer.max_epochs in (None, -1) else float(trainer.max_epochs or 0)
        steps = math.inf if trainer.max_steps == -1 else float(trainer.max_steps)
        if self.every_n_steps is not None:
            if not countable and steps == math.inf:
                return None
            return min(steps, epochs * steps_per_epoch if epochs else 0.0) // self.every_n_steps
        if steps != math.inf:
            if not countable:
                return None
            epochs = min(epochs, math.ceil(steps / steps_per_epoch) if steps else 0.0)
        return epochs // self.every_n_epochs if math.isfinite(epochs) else epochs

    def resolve_warmup(self, trainer: Trainer, fraction: float) -> int:
        """Turn a fraction of the planned snapshots into the warm-up F, at least 2.

        Raises:
            InputError: If the run has no known end.
        """
        planned = self.planned_snapshots(trainer)
        if planned is None or not math.isfinite(planned):
            message = (
                f"warmup={fraction} is a fraction of a run whose number of snapshots is not known "
                "beforehand: give warmup as a number of snapshots, or set max_epochs or max_steps."
            )
            raise InputError(message)
        # One snapshot has to be left, because the one after the warm-up triggers the fit.
        return max(2, min(round(fraction * planned), int(planned) - 1))

    def warn_when_too_short(self, trainer: Trainer, needed: int) -> None:
        """Warn if the run is known to end before ``needed`` snapshots are taken."""
        planned = self.planned_snapshots(trainer)
        if planned is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if planned < needed:
            _logger.warning(
                "The run plans %d snapshots and the fit needs %d: nothing will be modelled. Lower "
                "warmup, or take snapshots more often.",
                planned,
                needed,
            )
