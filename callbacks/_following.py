"""What a callback that follows the weights of a run needs besides a schedule.

It keeps one :class:`~cmd_plugin.modes.OnlineModes` in step with the module at hand and with
checkpoints, and puts its modelled weights into the module and takes them out again.
"""

from __future__ import annotations

import copy
import pickle
import time
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

import torch
from typing_extensions import override

from cmd_plugin.callbacks._lightning import Callback
from cmd_plugin.callbacks._trainer import buffers_of_rank_zero
from cmd_plugin.errors import InputError, PluginError, StateMismatch
from cmd_plugin.modes import OnlineModes

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["WeightFollower"]

_VERSION = 1


class WeightFollower(Callback):
    """Base of callbacks that feed :class:`~cmd_plugin.modes.OnlineModes` and show its weights.

    Args:
        warmup: Snapshots before the fit, or a fraction to be resolved by the subclass, which sets
            ``_resolved_warmup``.
        checkpoint_weights: Weights under ``state_dict`` of full checkpoints.
        recalibration_batches: Training batches to remember; 0 for none.

    Attributes:
        modes: The state of the run; None before ``fit`` starts.
        seconds: Wall-clock seconds spent in updates by this process.
    """

    modes: OnlineModes | None
    seconds: float

    def __init__(
        self,
        warmup: int | float,
        checkpoint_weights: Literal["raw", "modelled"],
        recalibration_batches: int,
    ) -> None:
        super().__init__()
        self.warmup = warmup
        self.checkpoint_weights = checkpoint_weights
        self.modes = None
        self.seconds = 0.0
        self._resolved_warmup: int | None = None
        self._pending: dict[str, Any] | None = None  # modes of a checkpoint, until there is a model
        self._restored = False  # whether the counters of this run came out of a checkpoint
        self._offered = False  # whether this run's checkpoint has been looked at
        self._asked_step = 0
        self._asked_epoch = -1
        self._recent: deque[Any] = deque(maxlen=recalibration_batches)
        self._module: weakref.ref[LightningModule] | None = None
        self._shown: ExitStack | None = None

    def new_modes(self, trainer: Trainer, pl_module: LightningModule, warmup: int) -> OnlineModes:
        """Build the empty state for a module; subclasses know with which settings."""
        raise NotImplementedError

    @property
    def showing(self) -> Literal["raw", "modelled"]:
        """Which weights the module holds at this moment."""
        return "raw" if self._shown is None else "modelled"

    # -- checkpoints ---------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings, None, lists and dicts: loads with ``weights_only=True``."""
        return {
            "version": _VERSION,
            "warmup": self._resolved_warmup,
            "asked_step": self._asked_step,
            "asked_epoch": self._asked_epoch,
            "modes": self._modes_state(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until there is a model on its device to check it against.

        Raises:
            StateMismatch: If another version of this class wrote the state.
        """
        if state_dict.get("version") != _VERSION:
            message = (
                f"the checkpoint holds version {state_dict.get('version')!r} of CMDCallback's "
                f"state and this one reads version {_VERSION}: use the package that wrote it."
            )
            raise StateMismatch(message)
        self._resolved_warmup = state_dict["warmup"]
        self._asked_step = state_dict["asked_step"]
        self._asked_epoch = state_dict["asked_epoch"]
        self._pending = state_dict["modes"]
        self._restored = True

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take raw weights where the checkpoint shows modelled ones; forget what is not in it."""
        self._offered = True
        if self.state_key not in checkpoint.get("callbacks", {}):
            self._forget()  # what we know belongs to other weights than the checkpoint's
        elif "current_model_state" in checkpoint and "averaging_state" not in checkpoint:
            strict = pl_module.strict_loading
            pl_module.load_state_dict(checkpoint["current_model_state"], strict=strict)

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the modelled weights under ``state_dict``, if that is wanted and there are any."""
        was_shown = self._shown is not None
        if was_shown:  # saved from inside a validation that shows modelled weights
            self.hide_modelled()
            checkpoint["state_dict"] = _copied(pl_module.state_dict())
        if self.checkpoint_weights == "modelled" and self._can_show(pl_module):
            checkpoint["current_model_state"] = _copied(checkpoint["state_dict"])
            self.show_modelled(trainer, pl_module)
            checkpoint["state_dict"] = _copied(pl_module.state_dict())
            self.hide_modelled()
        if was_shown:
            self.show_modelled(trainer, pl_module)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the model behind: a copy carries the modes' state and waits for a model."""
        state = dict(self.__dict__)
        state["_pending"] = self._modes_state()
        state["modes"] = state["_module"] = state["_shown"] = None
        for name in ("log", "log_dict"):
            state.pop(name, None)  # Lightning leaves the module's methods on its callbacks
        state["_recent"] = deque(maxlen=self._recent.maxlen)
        return state

    def _modes_state(self) -> dict[str, Any] | None:
        if self._pending is not None or self.modes is None:
            return self._pending
        return self.modes.state_dict()

    # -- the work ------------------------------------------------------------------------------

    def take_snapshot(self, trainer: Trainer, pl_module: LightningModule, label: int) -> None:
        """Hand the weights, as they are now, to :attr:`modes`.

        Args:
            trainer: The trainer that runs.
            pl_module: The module whose weights are read.
            label: Number of the snapshot: the epoch, or the optimizer step.
        """
        if self.modes is None:
            return
        started = time.perf_counter()
        with buffers_of_rank_zero(trainer, pl_module, self.modes.layout.names):
            self.modes.update(label=label)
        self.seconds += time.perf_counter() - started

    def show_modelled(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Put the modelled weights into the module until :meth:`hide_modelled`.

        Returns:
            Whether the module now holds modelled weights: not before the fit, and not if it is
            another module than the one that was followed.
        """
        if self.modes is None or not self._can_show(pl_module):
            return False
        if self._shown is not None:
            return True
        batches: Iterator[Any] | None = None
        if self._recent:
            batches = (self.recalibration_input(batch) for batch in self._recent)
        elif self.modes.buffers == "recalibrate" and _has_statistics(pl_module):
            message = (
                "buffers='recalibrate' needs training batches, and this process has not trained "
                "the module: use buffers='model'."
            )
            raise InputError(message)
        with ExitStack() as stack:
            with trainer.precision_plugin.forward_context():
                stack.enter_context(self.modes.swap(pl_module, recalibrate=batches))
            self._shown = stack.pop_all()
        return True

    def hide_modelled(self) -> None:
        """Put the raw weights back, bit for bit; nothing happens if the module holds them."""
        shown, self._shown = self._shown, None
        if shown is not None:
            shown.close()

    def recalibration_input(self, batch: Any) -> Any:
        """What the module's ``forward`` takes of a training batch; a list or tuple gives its first.

        Override it for other batches, together with ``buffers="recalibrate"``.
        """
        return batch[0] if isinstance(batch, (list, tuple)) else batch

    def _refuse_rival(self, trainer: Trainer) -> None:
        """Raise PluginError if another callback writes the weights of checkpoints as well."""
        others = trainer.callbacks  # type: ignore[attr-defined]
        names = {kind.__name__ for other in others for kind in type(other).__mro__}
        if self.checkpoint_weights == "modelled" and "WeightAveraging" in names:
            message = (
                "CMDCallback(checkpoint_weights='modelled') and WeightAveraging both want the "
                "state_dict of the checkpoint: use checkpoint_weights='raw'."
            )
            raise PluginError(message)

    def _can_show(self, pl_module: LightningModule) -> bool:
        return self._owns(pl_module) and self.modes is not None and self.modes.ready

    def _owns(self, pl_module: LightningModule) -> bool:
        return self._module is not None and self._module() is pl_module

    def _prepare(self, trainer: Trainer, pl_module: LightningModule, *, start: bool) -> None:
        """Bring :attr:`modes` in line with this module and with the state a checkpoint left.

        Args:
            trainer: The trainer that runs.
            pl_module: The module it runs on, on its device.
            start: Whether to begin anew where there is nothing to continue.
        """
        if start and self._pending is None and self.modes is not None and not self._owns(pl_module):
            self._forget()  # another model: another trajectory
        if self._pending is None and (self.modes is not None or not start):
            return
        warmup = self.warmup if self._resolved_warmup is None else self._resolved_warmup
        if isinstance(warmup, float):
            return
        with torch.inference_mode(False):  # or later updates in place would be forbidden
            modes = self.new_modes(trainer, pl_module, warmup)
            if self._pending is not None:
                modes.load_state_dict(self._pending)
        self.modes, self._module, self._pending = modes, weakref.ref(pl_module), None
        self._resolved_warmup = warmup

    def _prepare_evaluation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have the state of the checkpoint that ``validate``, ``test`` or ``predict`` was given."""
        if not self._offered and trainer.ckpt_path:
            # Lightning before 2.5 restores callbacks for fit alone, and nobody restores them from
            # a checkpoint of weights only, where modes in memory would not fit the weights.
            checkpoint = _load(trainer, trainer.ckpt_path)
            self.on_load_checkpoint(trainer, pl_module, checkpoint)
            state = checkpoint.get("callbacks", {}).get(self.state_key)
            if state is not None:
                self.load_state_dict(state)
        self._prepare(trainer, pl_module, start=False)

    def _forget(self) -> None:
        self.modes = self._pending = self._module = self._resolved_warmup = None
        self._restored = False
        self._recent.clear()


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)
        for name, value in state.items()
    }


def _load(trainer: Trainer, path: Any) -> dict[str, Any]:
    load: Any = trainer.strategy.load_checkpoint
    try:
        return dict(load(path))
    except pickle.UnpicklingError:
        # Lightning has just read this very file, so the user told it to trust what is inside.
        return dict(load(path, weights_only=False))


def _has_statistics(pl_module: LightningModule) -> bool:
    return any(name.endswith("running_mean") for name, _ in pl_module.named_buffers())
