"""What CMDCallback reads and writes in a Lightning checkpoint, besides its own state."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from cmd_plugin.errors import StateMismatch

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["VERSION", "check_version", "copied", "load_raw", "read_checkpoint"]

VERSION = 1


def check_version(state: Mapping[str, Any]) -> None:
    """Raise StateMismatch if another version of CMDCallback wrote the state."""
    if state.get("version") != VERSION:
        message = (
            f"the checkpoint holds version {state.get('version')!r} of CMDCallback's state and "
            f"this one reads version {VERSION}: use the package that wrote it."
        )
        raise StateMismatch(message)


def copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a state_dict that shares no memory with it."""
    return {
        name: value.detach().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)
        for name, value in state.items()
    }


def load_raw(pl_module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Load the raw weights of a checkpoint that shows other ones under ``state_dict``."""
    # Lightning's own callback for averages, which uses the same entry, loads them by itself.
    if "current_model_state" in checkpoint and "averaging_state" not in checkpoint:
        strict = pl_module.strict_loading
        pl_module.load_state_dict(checkpoint["current_model_state"], strict=strict)


def read_checkpoint(trainer: Trainer) -> dict[str, Any]:
    """Read the checkpoint that ``validate``, ``test`` or ``predict`` was given.

    Lightning before 2.5 restores callbacks for fit alone, and nobody restores them from a
    checkpoint of weights only, where modes in memory would not fit the weights.
    """
    load: Any = trainer.strategy.load_checkpoint
    try:
        return dict(load(trainer.ckpt_path))
    except pickle.UnpicklingError:
        # Lightning has just read this very file, so the user told it to trust what is inside.
        return dict(load(trainer.ckpt_path, weights_only=False))
