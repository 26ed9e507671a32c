"""Entries of a saved state, checked as they are read: all of them, before anything changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cmd_plugin.errors import StateMismatch
from cmd_plugin.kernels import FlatView
from cmd_plugin.kernels.update_affine import accepts
from cmd_plugin.modes.layout import Layout

__all__ = ["SavedState", "shown"]

_LARGEST = 2**63 - 1


class SavedState:
    """What ``state_dict()`` returned, perhaps damaged, perhaps by a stranger.

    Every method raises StateMismatch, naming the entry, if it is not what is asked for.

    Args:
        entries: The state.
        name: What it is called inside a larger state, for messages; "" for the whole.
    """

    def __init__(self, entries: object, name: str = "") -> None:
        self._name = name
        self._entries: Mapping[Any, Any] = entries if isinstance(entries, Mapping) else {}
        if not isinstance(entries, Mapping):
            raise StateMismatch(
                f"the saved modes are damaged: {name or 'the state'!s} is a "
                f"{type(entries).__name__}, not a table of entries: use another checkpoint."
            )

    def require(self, sound: bool, entry: str, what: str) -> None:
        """Raise StateMismatch about an entry unless ``sound``."""
        if not sound:
            raise StateMismatch(
                f"the saved modes are damaged: {self._path(entry)!r} {what}: use another "
                "checkpoint."
            )

    def _path(self, entry: str) -> str:
        return f"{self._name}.{entry}" if self._name else entry

    def get(self, entry: str) -> Any:
        """Return an entry as it is."""
        self.require(entry in self._entries, entry, "is missing")
        return self._entries[entry]

    def get_or_none(self, entry: str) -> Any:
        """Return an entry, None if it is missing."""
        return self._entries.get(entry)

    def table(self, entry: str) -> Mapping[str, Any]:
        """Return an entry that is a mapping."""
        held = self.get(entry)
        self.require(isinstance(held, Mapping), entry, f"is {shown(held)}, not a table")
        return dict(held)

    def layout(self, entry: str) -> Layout:
        """Return the layout whose JSON text an entry is."""
        try:
            return Layout.from_json(self.get(entry))
        except (TypeError, ValueError, RecursionError) as error:
            self.require(False, entry, f"is not a layout ({' '.join(str(error).split())[:100]})")
            raise

    def part(self, entry: str) -> SavedState | None:
        """Return a state inside this one; None for None."""
        held = self.get(entry)
        return None if held is None else SavedState(held, self._path(entry))

    def flag(self, entry: str) -> bool:
        """Return True or False."""
        value = self.get(entry)
        self.require(type(value) is bool, entry, f"is {shown(value)}, neither True nor False")
        return bool(value)

    def whole(self, entry: str, low: int = -_LARGEST, high: int = _LARGEST) -> int:
        """Return a whole number in low..high."""
        value = self.get(entry)
        sound = type(value) is int and low <= value <= high
        self.require(sound, entry, f"is {shown(value)}, not a whole number in {low}..{high}")
        return int(value)

    def number(self, entry: str, low: float, high: float) -> float:
        """Return a number in low..high."""
        value = self.get(entry)
        sound = type(value) in (int, float) and low <= value <= high
        self.require(sound, entry, f"is {shown(value)}, not a number in {low:g}..{high:g}")
        return float(value)

    def whole_numbers(self, entry: str, count: int) -> list[int]:
        """Return a list of ``count`` whole numbers."""
        values = self.get(entry)
        sound = (
            isinstance(values, list)
            and len(values) == count
            and all(type(value) is int and abs(value) <= _LARGEST for value in values)
        )
        self.require(sound, entry, f"is not a list of {count} whole numbers")
        return list(values)

    def tensor(
        self,
        entry: str,
        shape: tuple[int | None, ...],
        dtype: torch.dtype,
        *,
        finite: bool = True,
    ) -> Tensor:
        """Return a copy of a tensor, on the CPU.

        Args:
            entry: Its name.
            shape: Its shape; None for a length that does not matter.
            dtype: Its dtype.
            finite: Whether NaN and infinities are refused.
        """
        value = self.get(entry)
        plain = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
        self.require(plain, entry, f"is {shown(value)}, not a tensor")
        fits = len(value.shape) == len(shape) and all(
            wanted is None or have == wanted
            for have, wanted in zip(value.shape, shape, strict=True)
        )
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        self.require(
            fits and value.dtype == dtype, entry, f"is {shown(value)}, expected [{wanted}] {dtype}"
        )
        copy: Tensor = value.detach().to("cpu").clone(memory_format=torch.contiguous_format)
        sound = not finite or not dtype.is_floating_point or bool(copy.isfinite().all())
        self.require(sound, entry, "holds NaN or infinite values")
        return copy

    def indices(self, entry: str, count: int | None, below: int) -> Tensor:
        """Return [count] int64 numbers in 0..below - 1."""
        value = self.tensor(entry, (count,), torch.int64)
        sound = not value.numel() or 0 <= int(value.min()) <= int(value.max()) < below
        self.require(sound, entry, f"points outside 0..{below - 1}")
        return value

    def distinct(self, entry: str, count: int | None, below: int) -> Tensor:
        """Return :meth:`indices` of which no two are equal."""
        value = self.indices(entry, count, below)
        ordered = value.sort().values
        self.require(not bool((ordered[1:] == ordered[:-1]).any()), entry, "holds an index twice")
        return value

    def weights(
        self, entry: str, shape: tuple[int, ...], dtype: torch.dtype, read_as: torch.dtype
    ) -> Tensor:
        """Return a tensor each of whose rows a run in ``read_as`` would take in as a snapshot."""
        value = self.tensor(entry, shape, dtype)
        taken = all(accepts(FlatView([row], dtype=read_as)) for row in value.view(-1, shape[-1]))
        self.require(taken, entry, "holds weights too large for their squares")
        return value


def shown(value: object) -> str:
    """Return a value in a few words."""
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {value.dtype}"
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)[:40]
    return f"a {type(value).__name__}"
