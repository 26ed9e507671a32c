"""The first phase of online CMD: record all weights, then choose the modes and fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cmd_plugin.kernels import FlatView
from cmd_plugin.modes.choice import ModeChoice, choose_modes
from cmd_plugin.modes.fit import fit_modes
from cmd_plugin.modes.posthoc import rows_of
from cmd_plugin.modes.settings import Settings
from cmd_plugin.modes.store import TrajectoryStore
from cmd_plugin.modes.tracker import Tracker

__all__ = ["WarmUp"]


class WarmUp:
    """The F + 1 snapshots that are fitted.

    Args:
        settings: How to store and fit.
        numel: Number of weights N.
        samples: [K] int64 flat indices of the sampled weights.
        dtype: Dtype of the state, float32 or float64.
        device: Where the store lies.
    """

    def __init__(
        self,
        settings: Settings,
        numel: int,
        samples: Tensor,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self._settings = settings
        self._dtype = dtype
        self._labels: list[int] = []
        self._store = TrajectoryStore(
            numel, settings.warmup + 1, settings.storage, samples, dtype, device
        )

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return self._store.nbytes

    @property
    def complete(self) -> bool:
        """Whether the last snapshot is in."""
        return self._store.count > self._settings.warmup

    def append(self, weights: FlatView, rows: Tensor, label: int) -> None:
        """Store a snapshot; see :meth:`cmd_plugin.modes.store.TrajectoryStore.append`."""
        self._store.append(weights, rows)
        self._labels.append(label)

    def fit(self, device: torch.device) -> tuple[ModeChoice, Tracker | None]:
        """Choose the modes and fit all weights; no tracker if nothing moves.

        Args:
            device: Where the state of the weights shall lie.
        """
        settings, store = self._settings, self._store
        choice = choose_modes(
            store.rows, store.samples, settings.modes, settings.profile, self._dtype
        )
        if not choice.modes:
            return choice, None
        profiles = choice.profile(rows_of(choice.members, store.samples, store.rows))
        fit = fit_modes(store.trajectory, store.base, choice, profiles)
        tracker = Tracker(
            choice,
            type(fit)(*(array.to(device) for array in fit)),
            profiles,
            self._labels,
            shrink=settings.shrink,
            forgetting=settings.forgetting,
        )
        return choice, tracker

    def state_dict(self) -> dict[str, Any]:
        """Return copies of what has been stored, on the CPU."""
        return {"labels": list(self._labels), "store": self._store.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned, bit for bit."""
        self._labels = list(state["labels"])
        self._store.load_state_dict(state["store"])
