"""A module and the modes of its weights: which belong together, and which weights it shows."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cmd_plugin.callbacks._checkpoint import copied
from cmd_plugin.callbacks._statistics import ModelledStatistics
from cmd_plugin.errors import InputError, StateMismatch
from cmd_plugin.modes import Layout, OnlineModes
from cmd_plugin.modes.layout import is_selected
from cmd_plugin.networks.names import clean_name

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["FollowedModule"]


class FollowedModule:
    """Keeps modes in step with the module at hand, and shows its modelled weights for a while.

    A checkpoint is read before there is a module on its device: what it says of the modes waits
    until :meth:`prepare`.

    Args:
        statistics: BatchNorm's statistics for the modelled weights.

    Attributes:
        modes: The modes; None before there are any.
        statistics: As given.
        warmup: Snapshots before the fit, once that is decided.
    """

    def __init__(self, statistics: ModelledStatistics) -> None:
        self.modes: OnlineModes | None = None
        self.statistics = statistics
        self.warmup: int | None = None
        self._module: weakref.ref[LightningModule] | None = None
        self._waiting: dict[str, Any] | None = None
        self._shown: ExitStack | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the module behind: a copy carries the modes' state and waits for a module."""
        nothing = dict.fromkeys(("modes", "_module", "_shown"))
        return {**self.__dict__, **nothing, "_waiting": self._modes_state()}

    @property
    def known(self) -> bool:
        """Whether there are modes, or a checkpoint left what they are made of."""
        return self.modes is not None or self._waiting is not None

    @property
    def shown(self) -> bool:
        """Whether the module holds its modelled weights at this moment."""
        return self._shown is not None

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the module."""
        return {
            "warmup": self.warmup,
            "modes": self._modes_state(),
            "statistics": self.statistics.values,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep what a checkpoint holds until there is a module to check it against."""
        self.warmup, self._waiting = state["warmup"], state["modes"]
        self.statistics.load(state.get("statistics"))

    def _modes_state(self) -> dict[str, Any] | None:
        if self._waiting is not None or self.modes is None:
            return self._waiting
        return self.modes.state_dict()

    def forget(self) -> None:
        """Know nothing again."""
        self.modes = self._waiting = self._module = self.warmup = None
        self.statistics.load(None)

    def prepare(
        self,
        pl_module: LightningModule,
        warmup: int | float,
        new_modes: Callable[[int], OnlineModes],
        *,
        start: bool,
    ) -> None:
        """Bring the modes in line with this module and with the state a checkpoint left.

        Args:
            pl_module: The module, on its device.
            warmup: Snapshots before the fit, unless that is decided; with a fraction, nothing is
                done.
            new_modes: Builds empty modes for the module, given the warm-up.
            start: Whether to begin anew where there is nothing to continue.

        Raises:
            StateMismatch: If the state does not belong to this module and these settings.
        """
        another = self.modes is not None and not self._owns(pl_module)
        if start and another and self._waiting is None:
            self.forget()  # another model: another trajectory
        if self._waiting is None and (self.modes is not None or not start):
            return
        warmup = warmup if self.warmup is None else self.warmup
        if isinstance(warmup, float):
            return
        with torch.inference_mode(False):  # or later updates in place would be forbidden
            modes = new_modes(warmup)
            if self._waiting is not None:
                _check_buffers(self._waiting, modes.buffers)
                modes.load_state_dict(self._waiting)
        self.modes, self._module = modes, weakref.ref(pl_module)
        self.warmup, self._waiting = warmup, None

    def unfrozen(
        self, pl_module: LightningModule, include: Sequence[str], exclude: Sequence[str]
    ) -> list[str]:
        """Return the names of weights that train now and did not when the modes were made."""
        if self.modes is None:
            return []
        layout = self.modes.layout
        known = {*layout.names, *layout.aliases}
        names = [clean_name(name) for name, p in pl_module.named_parameters() if p.requires_grad]
        return [n for n in names if n not in known and is_selected(n, include, exclude)]

    def can_show(self, pl_module: LightningModule) -> bool:
        """Whether there are modelled weights of this module."""
        return self.modes is not None and self.modes.ready and self._owns(pl_module)

    def show(
        self, trainer: Trainer, pl_module: LightningModule, take_input: Callable[[Any], Any]
    ) -> bool:
        """Put the modelled weights and their statistics into the module, unless they are in it.

        Args:
            trainer: The trainer that runs.
            pl_module: The module.
            take_input: Returns what the module's ``forward`` takes of a training batch.

        Returns:
            Whether it holds them now: not before the fit, and not if it is another module.

        Raises:
            InputError: If statistics are wanted and cannot be known.
        """
        if self.modes is None or not self.can_show(pl_module):
            return False
        if self._shown is None:
            values = self.find_statistics(trainer, pl_module, take_input)
            if values is None and self.statistics.wanted:
                message = (
                    "buffers='recalibrate' needs training batches, because no checkpoint holds "
                    "BatchNorm's statistics for these modelled weights: train on, or use "
                    "buffers='keep', or the raw weights."
                )
                raise InputError(message)
            with ExitStack() as stack:
                stack.enter_context(self.modes.swap(pl_module, statistics=values))
                self._shown = stack.pop_all()
        return True

    def find_statistics(
        self, trainer: Trainer, pl_module: LightningModule, take_input: Callable[[Any], Any]
    ) -> dict[str, Tensor] | None:
        """Return the statistics of the modelled weights; None if they cannot be known."""
        if self.modes is None or not self.can_show(pl_module):
            return self.statistics.values
        return self.statistics.estimate(trainer, pl_module, self.modes, take_input)

    def keep_batch(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        take_input: Callable[[Any], Any],
    ) -> None:
        """Remember a training batch; use those it replaces first, if they are still to be used."""
        if self.statistics.would_lose_batches:
            self.find_statistics(trainer, pl_module, take_input)
        self.statistics.keep(trainer, pl_module, batch, take_input)

    def hide(self) -> None:
        """Put the raw weights back, bit for bit; nothing happens if the module holds them."""
        shown, self._shown = self._shown, None
        if shown is not None:
            shown.close()

    def write_checkpoint(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        checkpoint: dict[str, Any],
        take_input: Callable[[Any], Any],
        modelled: bool,
    ) -> None:
        """Have raw weights under ``state_dict``, or modelled ones with the raw ones beside them.

        The statistics of the modelled weights are known afterwards, if they can be.

        Args:
            trainer: The trainer that runs.
            pl_module: The module.
            checkpoint: What Lightning is about to write, changed in place.
            take_input: Returns what the module's ``forward`` takes of a training batch.
            modelled: Whether modelled weights are wanted there.
        """
        was_shown = self.shown
        if was_shown:  # saved from inside a validation that shows modelled weights
            self.hide()
            checkpoint["state_dict"] = copied(pl_module.state_dict())
        self.find_statistics(trainer, pl_module, take_input)
        if modelled and self.can_show(pl_module):
            checkpoint["current_model_state"] = copied(checkpoint["state_dict"])
            self.show(trainer, pl_module, take_input)
            checkpoint["state_dict"] = copied(pl_module.state_dict())
            self.hide()
        if was_shown:
            self.show(trainer, pl_module, take_input)

    def _owns(self, pl_module: LightningModule) -> bool:
        return self._module is not None and self._module() is pl_module


def _check_buffers(state: Mapping[str, Any], buffers: str) -> None:
    # The other way round, the modes themselves say which tensors the state lacks.
    names = Layout.from_json(state["layout"]).names
    modelled = any(name.endswith(("running_mean", "running_var")) for name in names)
    if modelled and buffers != "model":
        message = (
            "the checkpoint models BatchNorm's statistics, which was the default once, and this "
            f"CMDCallback has buffers={buffers!r}: use CMDCallback(buffers='model') with it."
        )
        raise StateMismatch(message)
