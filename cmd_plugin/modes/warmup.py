"""The first phase of online CMD: record all weights, then choose the modes and fit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cmd_plugin.errors import PluginError, StateMismatch
from cmd_plugin.kernels import FlatView
from cmd_plugin.modes.choice import ModeChoice, choose_modes
from cmd_plugin.modes.fit import fit_modes
from cmd_plugin.modes.layout import Layout
from cmd_plugin.modes.posthoc import rows_of
from cmd_plugin.modes.settings import Settings
from cmd_plugin.modes.states import SavedState
from cmd_plugin.modes.store import TrajectoryStore
from cmd_plugin.modes.tracker import Tracker

__all__ = ["WarmUp"]


class WarmUp:
    """The F + 1 snapshots that are fitted; memory for them is reserved at the first.

    Args:
        settings: How to store and fit.
        layout: Layout of the N weights.
        samples: [K] int64 flat indices of the sampled weights.
        device: Where the store lies; None for where the weights are.
    """

    def __init__(
        self,
        settings: Settings,
        layout: Layout,
        samples: Tensor,
        device: str | torch.device | None = None,
    ) -> None:
        self._settings = settings
        self._layout = layout
        self._samples = samples
        self._device = device
        self._labels: list[int] = []
        self._store: TrajectoryStore | None = None

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return 0 if self._store is None else self._store.nbytes

    @property
    def complete(self) -> bool:
        """Whether the last snapshot is in."""
        return len(self._labels) > self._settings.warmup

    def append(self, weights: FlatView, rows: Tensor, label: int) -> None:
        """Store a snapshot; see :meth:`cmd_plugin.modes.store.TrajectoryStore.append`."""
        if self._store is None:
            self._store = self._new_store(weights.device)
        self._store.append(weights, rows)
        self._labels.append(label)

    def _new_store(self, device: str | torch.device) -> TrajectoryStore:
        return TrajectoryStore(
            self._layout.numel,
            self._settings.warmup + 1,
            self._settings.storage,
            self._samples,
            self._layout.state_dtype,
            device if self._device is None else self._device,
        )

    def fit(self, device: torch.device) -> tuple[ModeChoice, Tracker | None]:
        """Choose the modes and fit all weights; no tracker if nothing moves.

        Args:
            device: Where the state of the weights shall lie.

        Raises:
            PluginError: If no snapshot has been stored.
        """
        settings, store = self._settings, self._store
        if store is None:
            raise PluginError("there is no snapshot to fit modes to: call append() first.")
        dtype = self._layout.state_dtype
        choice = choose_modes(store.rows, store.samples, settings.modes, settings.profile, dtype)
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

    def state_dict(self) -> dict[str, Any] | None:
        """Return copies of what has been stored, on the CPU; None before the first snapshot."""
        if self._store is None:
            return None
        return {"labels": list(self._labels), "store": self._store.state_dict()}

    def load_state(self, state: SavedState | None, snapshots: int) -> None:
        """Continue from what :meth:`state_dict` returned, bit for bit.

        Args:
            state: The state; None if there was no snapshot yet.
            snapshots: Number of snapshots it is known to hold.

        Raises:
            StateMismatch: If it is damaged.
        """
        labels: list[int] = []
        store = None
        if state is not None:
            labels = state.whole_numbers("labels", snapshots)
            store = self._new_store("cpu")
            held = state.part("store")
            state.require(held is not None and snapshots > 0, "store", "is empty")
            if held is not None:
                held.whole("count", snapshots, snapshots)
                store.load_state_dict(held)
        elif snapshots:
            raise StateMismatch(
                f"the saved modes are damaged: 'warmup' is missing after {snapshots} snapshots: "
                "use another checkpoint."
            )
        self._labels, self._store = labels, store
