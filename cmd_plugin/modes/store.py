"""The warm-up store: the trajectories of all weights until the modes are chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cmd_plugin.errors import InputError
from cmd_plugin.kernels import FlatView, snapshot_delta
from cmd_plugin.modes.states import SavedState

__all__ = ["STORAGES", "TrajectoryStore", "check_storage"]

STORAGES = ("delta-bf16", "fp32")


def check_storage(storage: str) -> None:
    """Raise InputError unless ``storage`` is one of :data:`STORAGES`."""
    if storage not in STORAGES:
        raise InputError(f"storage must be one of {', '.join(STORAGES)}, got {storage!r}.")


class TrajectoryStore:
    """Snapshots of N weights, appended one by one into memory that is reserved once.

    ``"delta-bf16"`` keeps the first snapshot as it is and every later one as a bfloat16 difference
    to it: correlation does not see the shift, and differences need far fewer bits than weights
    (2 T + 2 bytes a weight instead of 4 T). ``"fp32"`` keeps the snapshots themselves (float64 ones
    as float64). The rows of the sampled weights, which decide the modes, are always kept exactly.

    Args:
        numel: Number of weights N.
        capacity: Number of snapshots T to reserve room for.
        storage: ``"delta-bf16"`` or ``"fp32"``.
        samples: [K] int64 flat indices of the sampled weights.
        dtype: float32 or float64, the dtype the weights are read in.
        device: Where the store lies.

    Raises:
        InputError: If ``storage`` is unknown.
    """

    def __init__(
        self,
        numel: int,
        capacity: int,
        storage: str,
        samples: Tensor,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        check_storage(storage)
        self.storage = storage
        self.samples = samples
        self.count = 0
        self._rows = torch.empty(capacity, samples.numel(), dtype=torch.float64)
        self._base: Tensor | None = None
        if storage == "delta-bf16":
            self._base = torch.empty(numel, dtype=dtype, device=device)
            self._snapshots = _rows(capacity - 1, numel, torch.bfloat16, torch.device(device))
        else:
            self._snapshots = _rows(capacity, numel, dtype, torch.device(device))

    @property
    def rows(self) -> Tensor:
        """Exact trajectories of the sampled weights so far, [K, T] float64."""
        return self._rows[: self.count].T

    @property
    def base(self) -> Tensor | None:
        """[N] first snapshot when :attr:`trajectory` holds differences to it."""
        return self._base

    @property
    def trajectory(self) -> Tensor:
        """[T, N] snapshots, or [T-1, N] differences to :attr:`base`."""
        return self._snapshots[: self.count - (self._base is not None)]

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        arrays = [self._rows, self._snapshots, *([] if self._base is None else [self._base])]
        return sum(array.numel() * array.element_size() for array in arrays)

    def append(self, weights: FlatView, rows: Tensor) -> None:
        """Store one snapshot.

        Args:
            weights: The N weights.
            rows: [K] float64 values of the sampled weights.
        """
        deltas = self._base is not None and self.count > 0
        if self._base is not None and not deltas:
            target = self._base
        else:
            target = self._snapshots[self.count - deltas]
        snapshot_delta(weights, self._base if deltas else None, out=target)
        self._rows[self.count] = rows
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        """Return copies of what has been stored, on the CPU."""
        return {
            "count": self.count,
            "rows": self._rows[: self.count].clone(),
            "snapshots": self.trajectory.cpu().clone() if self.count else None,
            "base": None if self._base is None or not self.count else self._base.cpu().clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any] | SavedState) -> None:
        """Continue from what :meth:`state_dict` returned, bit for bit.

        Raises:
            StateMismatch: If it is damaged; nothing is changed then.
        """
        saved = state if isinstance(state, SavedState) else SavedState(state)
        count, numel = saved.whole("count", 0, len(self._rows)), self._snapshots.shape[1]
        deltas, dtype = self._base is not None, self._snapshots.dtype
        read_as = dtype if self._base is None else self._base.dtype
        rows = saved.weights("rows", (count, self.samples.numel()), torch.float64, read_as)
        base = snapshots = None
        if count:
            base = saved.weights("base", (numel,), read_as, read_as) if deltas else None
            snapshots = saved.weights("snapshots", (count - deltas, numel), dtype, read_as)
        for name, held in (("base", base), ("snapshots", snapshots)):
            saved.require((saved.get(name) is None) == (held is None), name, "should be None")
        self.count = count
        self._rows[:count].copy_(rows)
        if snapshots is not None:
            self.trajectory.copy_(snapshots)
        if self._base is not None and base is not None:
            self._base.copy_(base)


def _rows(count: int, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return uninitialised [count, N]; on a GPU, rows begin where 16 bytes can be read at once."""
    padding = 0 if device.type == "cpu" else -numel % 16
    return torch.empty(count, numel + padding, dtype=dtype, device=device)[:, :numel]
