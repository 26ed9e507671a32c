"""BatchNorm's running statistics for modelled weights: how they are found, how long they hold."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cmd_plugin.callbacks._arguments import whole
from cmd_plugin.callbacks._second_pass import untouched
from cmd_plugin.errors import InputError
from cmd_plugin.modes import OnlineModes
from cmd_plugin.networks import recalibrate, recalibrated, running_statistics

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["ModelledStatistics"]


class ModelledStatistics:
    """The running statistics that belong to the modelled weights of the latest snapshot.

    They are estimated once, on the latest training batches before the snapshot (those of the epoch
    it ends): when its weights are first shown or saved, or else when these batches are to make room
    for later ones. So they do not depend on who looks. Checkpoints hold them, and a run that goes
    on from one, or only tests, shows what the run that wrote it would have shown.

    Args:
        recalibration_batches: Largest number of training batches to keep.
        wanted: Whether anybody asks for them; otherwise nothing is kept or estimated.

    Attributes:
        values: On the CPU by cleaned name; empty without BatchNorm, None while not known.

    Raises:
        InputError: If no batches are to be kept.
    """

    def __init__(self, recalibration_batches: int, wanted: bool) -> None:
        batches = whole("recalibration_batches", recalibration_batches, 1)
        self.wanted = wanted
        self.values: dict[str, Tensor] | None = None
        self._recent: deque[tuple[int, Any]] = deque(maxlen=batches)  # with their epochs
        self._before = 0  # how many of them, at the left, came before the snapshot
        self._frozen: list[nn.Module] = []  # in evaluation mode in training
        self._collects = False

    def __getstate__(self) -> dict[str, Any]:
        """Leave batches and modules behind."""
        fresh = ModelledStatistics(self._recent.maxlen or 1, self.wanted)
        return {**fresh.__dict__, "values": self.values}

    @property
    def would_lose_batches(self) -> bool:
        """Whether the next batch replaces one that the statistics have still to be estimated on."""
        full = len(self._recent) == self._recent.maxlen
        return full and self.values is None and self._before > 0

    def load(self, values: Mapping[str, Tensor] | None) -> None:
        """Take what a checkpoint holds; None if it holds none."""
        self.values = dict(values) if self.wanted and values is not None else None

    def start(self, pl_module: LightningModule) -> None:
        """Begin a training, without batches of one before."""
        self.forget_batches()
        self._collects = self.wanted and bool(running_statistics(pl_module))

    def keep(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        take_input: Callable[[Any], Any],
    ) -> None:
        """Remember a training batch, for which the oldest one may go.

        Raises:
            InputError: If this is the first one and the module cannot be called with its input:
                better now than with the first fit.
        """
        if not self._collects:
            return
        if not self._recent or self._recent[-1][0] != trainer.current_epoch:
            self._frozen = [module for module in pl_module.modules() if not module.training]
        if not self._recent:
            self._rehearse(trainer, pl_module, batch, take_input)
        if len(self._recent) == self._recent.maxlen:
            self._before = max(0, self._before - 1)
        self._recent.append((trainer.current_epoch, batch))

    def drop_before(self, epoch: int) -> None:
        """Forget the batches of earlier epochs: a run that was resumed in between lacks them."""
        while self._recent and self._recent[0][0] < epoch:
            self._recent.popleft()

    def expire(self) -> None:
        """Forget the statistics, because a snapshot was taken."""
        self.values, self._before = None, len(self._recent)

    def forget_batches(self) -> None:
        """Let all batches go."""
        self._recent.clear()
        self._frozen = []
        self._before = 0

    def estimate(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        modes: OnlineModes,
        take_input: Callable[[Any], Any],
    ) -> dict[str, Tensor] | None:
        """Return the statistics, estimated now if they are not known and there are batches.

        Nothing else changes: the module, its random streams and its metrics are as before. Every
        process has to call this; the result is the mean over all of them.

        Args:
            trainer: The trainer that runs.
            pl_module: The module that was followed, with its raw weights.
            modes: Its modes, fitted.
            take_input: Returns what the module's ``forward`` takes of a batch.

        Returns:
            :attr:`values`: None if nobody wants them, or there are no batches.
        """
        if self.values is not None or not self.wanted:
            return self.values
        if not running_statistics(pl_module):
            self.values = {}
        elif self._recent:
            # All of them only with a state from a checkpoint that holds no statistics.
            batches = [batch for _, batch in self._recent]
            batches = batches[: self._before] or batches
            raw = running_statistics(pl_module)
            with (
                untouched(pl_module),
                trainer.precision_plugin.forward_context(),
                modes.swap(pl_module, statistics=raw),
            ):
                recalibrate(pl_module, map(take_input, batches), frozen=self._frozen)
                self.values = _collect(trainer, pl_module)
        return self.values

    def _rehearse(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        take_input: Callable[[Any], Any],
    ) -> None:
        try:
            with (
                untouched(pl_module),
                trainer.precision_plugin.forward_context(),
                recalibrated(pl_module, [take_input(batch)], frozen=self._frozen),
            ):
                pass
        except Exception as error:
            message = (
                "CMDCallback(buffers='recalibrate') estimates BatchNorm's statistics by calling "
                f"the module with the input of training batches, and that failed with {error!r}: "
                "give the module a forward, override CMDCallback.recalibration_input, or choose "
                "buffers='keep' or buffers='model'."
            )
            raise InputError(message) from error


def _collect(trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
    """Copies of the statistics that the module holds, averaged over the processes."""
    found: dict[str, Tensor] = {}
    with torch.inference_mode(False), torch.no_grad():
        for name, buffer in running_statistics(pl_module).items():
            value = buffer.detach().clone()
            if trainer.world_size > 1 and value.is_floating_point():
                value = trainer.strategy.reduce(value, reduce_op="mean")
            found[name] = value.cpu()
    return found
