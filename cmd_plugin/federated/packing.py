"""Named arrays of a model as one flat vector of modelled weights and the rest as it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from cmd_plugin.errors import InputError
from cmd_plugin.federated.frame import FrameError
from cmd_plugin.modes import Layout

__all__ = ["STATISTICS", "Arrays", "Entry", "Flat", "Packing", "check_statistics"]

Arrays = Mapping[str, npt.NDArray[Any]]
Flat = npt.NDArray[np.floating]

STATISTICS = ("average", "local")
_STATISTIC_NAMES = ("running_mean", "running_var", "num_batches_tracked")


def check_statistics(policy: str) -> None:
    """Raise InputError unless ``policy`` is one of :data:`STATISTICS`."""
    if policy not in STATISTICS:
        raise InputError(f"statistics must be one of {', '.join(STATISTICS)}, got {policy!r}.")


@dataclass(frozen=True)
class Entry:
    """One array: its name, shape and dtype, and how it travels."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    modelled: bool
    local: bool

    @property
    def size(self) -> int:
        """Number of values."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.size * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Packing:
    """Which arrays are modelled (they make the flat vector [N]), and which travel as they are.

    Modelled are the floating arrays of the model's main dtype: float32, or float64 where nothing
    is float32. BatchNorm's statistics never are (an affine map can make a variance negative), and
    neither are integers and half-precision arrays: these travel as they are.

    Attributes:
        entries: All arrays in their order.
    """

    entries: tuple[Entry, ...]

    @classmethod
    def of(
        cls,
        arrays: Arrays,
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        statistics: str = "average",
    ) -> Packing:
        """Return the packing of named arrays.

        Args:
            arrays: Name -> array, as of a model's ``state_dict``.
            include: Shell-style patterns on names to model; empty means all.
            exclude: Shell-style patterns on names to leave out, and to send as they are.
            statistics: BatchNorm's: ``"average"`` them like weights (FedAvg), or keep them
                ``"local"`` to each client.

        Raises:
            InputError: If the policy is unknown or no array can be modelled.
        """
        check_statistics(statistics)
        kinds = {a.dtype for a in arrays.values() if a.dtype in (np.float32, np.float64)}
        main = np.dtype(np.float32 if np.dtype(np.float32) in kinds else np.float64)
        entries = []
        for name, array in arrays.items():
            statistic = name.rsplit(".", 1)[-1] in _STATISTIC_NAMES
            chosen = not include or any(fnmatchcase(name, pattern) for pattern in include)
            chosen = chosen and not any(fnmatchcase(name, pattern) for pattern in exclude)
            modelled = chosen and array.dtype == main and array.size > 0 and not statistic
            local = statistic and statistics == "local"
            entries.append(Entry(name, tuple(array.shape), str(array.dtype), modelled, local))
        packing = cls(tuple(entries))
        if not packing.modelled:
            raise InputError(
                "no float32 or float64 array is left to model: widen include and exclude."
            )
        return packing

    @cached_property
    def modelled(self) -> tuple[Entry, ...]:
        """The arrays that make the flat vector."""
        return tuple(entry for entry in self.entries if entry.modelled)

    @cached_property
    def numel(self) -> int:
        """Number of modelled weights N."""
        return sum(entry.size for entry in self.modelled)

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the flat vector, little-endian."""
        return np.dtype(self.modelled[0].dtype).newbyteorder("<")

    @cached_property
    def layout(self) -> Layout:
        """The modelled arrays as a layout of :mod:`cmd_plugin.modes`."""
        return Layout(
            tuple(entry.name for entry in self.modelled),
            tuple(entry.shape for entry in self.modelled),
            tuple(entry.dtype for entry in self.modelled),
        )

    @cached_property
    def identity(self) -> int:
        """64-bit hash of names, shapes, dtypes and policies."""
        return int.from_bytes(hashlib.sha256(self.to_json()).digest()[:8], "little")

    def to_json(self) -> bytes:
        """Return the packing as JSON; :meth:`from_json` reads it."""
        rows = [[e.name, e.shape, e.dtype, int(e.modelled), int(e.local)] for e in self.entries]
        return json.dumps(rows, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Packing:
        """Read what :meth:`to_json` wrote.

        Raises:
            FrameError: If it is something else.
        """
        try:
            rows = json.loads(text)
            entries = tuple(
                Entry(str(name), tuple(map(int, shape)), np.dtype(dtype).name, bool(m), bool(l))
                for name, shape, dtype, m, l in rows
            )
        except (ValueError, TypeError) as error:
            raise FrameError("layout", f"it cannot be read ({error}).") from error
        if not any(entry.modelled for entry in entries):
            raise FrameError("layout", "it models nothing.")
        return cls(entries)

    def raw_entries(self, *, with_local: bool) -> list[Entry]:
        """Return the arrays that travel as they are."""
        return [e for e in self.entries if not e.modelled and (with_local or not e.local)]

    def check(self, arrays: Arrays) -> None:
        """Refuse arrays of other names, order, shapes or dtypes.

        Raises:
            FrameError: Naming the first difference.
        """
        for entry in self.entries:
            if entry.name not in arrays:
                raise FrameError(repr(entry.name), "it is missing.")
            array = arrays[entry.name]
            if tuple(array.shape) != entry.shape:
                raise FrameError(
                    repr(entry.name), f"shape {tuple(array.shape)}, expected {entry.shape}."
                )
            if str(array.dtype) != entry.dtype:
                raise FrameError(repr(entry.name), f"dtype {array.dtype}, expected {entry.dtype}.")
        names = [entry.name for entry in self.entries]
        for position, name in enumerate(arrays):
            if name not in names:
                raise FrameError(repr(name), "it is not part of the model.")
            if name != names[position]:
                raise FrameError(repr(name), "the tensors come in another order.")

    def flatten(self, arrays: Arrays) -> Flat:
        """Return the modelled weights [N] of named arrays; a new vector."""
        parts = [np.asarray(arrays[entry.name]).reshape(-1) for entry in self.modelled]
        return np.concatenate(parts).astype(self.dtype, copy=False)

    def pack_raw(self, arrays: Arrays, *, with_local: bool) -> bytes:
        """Return the bytes of the arrays that are not modelled."""
        chosen = self.raw_entries(with_local=with_local)
        return b"".join(
            np.ascontiguousarray(
                arrays[e.name], dtype=np.dtype(e.dtype).newbyteorder("<")
            ).tobytes()
            for e in chosen
        )

    def unpack_raw(self, data: bytes, *, with_local: bool) -> dict[str, npt.NDArray[Any]]:
        """Read what :meth:`pack_raw` wrote.

        Raises:
            FrameError: If the number of bytes differs.
        """
        chosen = self.raw_entries(with_local=with_local)
        expected = sum(entry.nbytes for entry in chosen)
        if len(data) != expected:
            raise FrameError("raw", f"expected {expected} bytes, got {len(data)}.")
        found, at = {}, 0
        for entry in chosen:
            kind = np.dtype(entry.dtype)
            flat = np.frombuffer(data, kind.newbyteorder("<"), count=entry.size, offset=at)
            found[entry.name] = flat.astype(kind).reshape(entry.shape)
            at += entry.nbytes
        return found

    def unflatten(self, flat: Flat, raw: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Return named arrays, in their order, of a flat vector [N] and the others."""
        arrays: dict[str, npt.NDArray[Any]] = {}
        at = 0
        for entry in self.entries:
            if entry.modelled:
                part = flat[at : at + entry.size].astype(entry.dtype)
                arrays[entry.name] = part.reshape(entry.shape)
                at += entry.size
            else:
                arrays[entry.name] = raw[entry.name]
        return arrays

    def refuse_non_finite(self, flat: Flat, raw: Arrays) -> None:
        """Raise FrameError, naming the tensor and the count, if a value is NaN or infinite."""
        if not np.isfinite(flat.sum(dtype=np.float64)):
            at = 0
            for entry in self.modelled:
                bad = int((~np.isfinite(flat[at : at + entry.size])).sum())
                if bad:
                    raise FrameError(
                        repr(entry.name), f"{bad} of {entry.size} values are NaN or infinite."
                    )
                at += entry.size
        for name, array in raw.items():
            if np.issubdtype(array.dtype, np.floating):
                bad = int((~np.isfinite(array)).sum())
                if bad:
                    raise FrameError(
                        repr(name), f"{bad} of {array.size} values are NaN or infinite."
                    )
