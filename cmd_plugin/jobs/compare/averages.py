"""The baselines: exponential and equal averages of the weights, as torch computes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn
from typing_extensions import override

from cmd_plugin.callbacks._lightning import Callback
from cmd_plugin.errors import InputError, StateMismatch

__all__ = ["WeightAverages"]

_Average = Callable[[Any, Any, Any], None]


class WeightAverages(Callback):
    """Keeps an EMA (every optimizer step) and an SWA (every epoch end) beside the training.

    It never changes the training. Both averages are :class:`torch.optim.swa_utils.AveragedModel`
    and include floating buffers (BatchNorm statistics); integer buffers are copied.

    Args:
        ema_decay: Share of the old average that stays at each optimizer step, in [0, 1).
        swa_start: First epoch (counted from 0) whose final weights enter the equal average.

    Attributes:
        ema: The exponential average of `pl_module.model`; `None` before the first step.
        swa: The equal average of `pl_module.model`; `None` before epoch `swa_start` has ended.
    """

    def __init__(self, ema_decay: float = 0.99, swa_start: int = 0) -> None:
        super().__init__()
        if not 0.0 <= ema_decay < 1.0:
            raise InputError(f"the EMA decay must be at least 0 and below 1, got {ema_decay}.")
        self.ema_decay = ema_decay
        self.swa_start = swa_start
        self._averages: dict[str, AveragedModel] = {}
        self._last_step = 0

    @property
    @override
    def state_key(self) -> str:
        """Key in a checkpoint; several of these in one trainer differ by their options."""
        return str(self._generate_state_key(decay=self.ema_decay, swa_start=self.swa_start))

    @property
    def ema(self) -> nn.Module | None:
        """The exponential average, a copy of the network with averaged weights."""
        return self._average("ema")

    @property
    def swa(self) -> nn.Module | None:
        """The equal average, a copy of the network with averaged weights."""
        return self._average("swa")

    def _average(self, name: str) -> nn.Module | None:
        averaged = self._averages.get(name)
        return averaged.module if averaged is not None and averaged.n_averaged > 0 else None

    @override
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Make the copies; a checkpoint's state is loaded into them afterwards."""
        if stage != "fit" or self._averages:
            return
        functions: dict[str, _Average] = {
            "ema": get_ema_multi_avg_fn(self.ema_decay),  # type: ignore[no-untyped-call]
            "swa": get_swa_multi_avg_fn(),  # type: ignore[no-untyped-call]
        }
        for name, function in functions.items():
            averaged = AveragedModel(
                pl_module.model, multi_avg_fn=_copy_integers(function), use_buffers=True
            )
            self._averages[name] = averaged.requires_grad_(requires_grad=False)

    @override
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Follow the network to its device."""
        for averaged in self._averages.values():
            averaged.to(pl_module.device)

    @override
    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the EMA, once per optimizer step also when gradients are accumulated."""
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            self._averages["ema"].update_parameters(pl_module.model)

    @override
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Update the SWA."""
        if trainer.current_epoch >= self.swa_start:
            self._averages["swa"].update_parameters(pl_module.model)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Both averages and the step counter; tensors and numbers only."""
        averages = {name: dict(averaged.state_dict()) for name, averaged in self._averages.items()}
        return {"last_step": self._last_step, "averages": averages}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint, after :meth:`setup`.

        Raises:
            StateMismatch: If the state belongs to another network.
        """
        self._last_step = state_dict["last_step"]
        try:
            for name, state in state_dict["averages"].items():
                self._averages[name].load_state_dict(state)
        except (KeyError, RuntimeError) as error:
            message = f"the checkpoint's weight averages do not fit this network: {error}."
            raise StateMismatch(message) from error


def _copy_integers(average: _Average) -> _Average:
    """Copy integer tensors (BatchNorm's step counter) instead of averaging them."""

    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        if averaged[0].is_floating_point() or averaged[0].is_complex():
            average(averaged, current, count)
        else:
            torch._foreach_copy_(averaged, current)

    return update
