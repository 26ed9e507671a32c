"""How named arrays of a model travel: modelled ones as a flat vector, the others as they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cmd_plugin.errors import InputError
from cmd_plugin.federated.frame import FrameError
from cmd_plugin.modes import Layout

__all__ = [
    "STATISTICS",
    "Arrays",
    "Flat",
    "Packing",
    "check_statistics",
    "is_statistic",
    "pack_arrays",
    "unpack_arrays",
]

Arrays = Mapping[str, npt.NDArray[Any]]
Flat = npt.NDArray[np.floating]

STATISTICS = ("average", "local")
_VARIANCE = "running_var"
_STATISTIC_NAMES = ("running_mean", _VARIANCE, "num_batches_tracked")

_LARGEST = 1e10
"""Size beyond which a value is no weight of a network; of variances the square of it."""


def is_statistic(name: str) -> bool:
    """Whether an array is one of BatchNorm's running statistics, by the end of its name."""
    return name.rsplit(".", 1)[-1] in _STATISTIC_NAMES


def check_statistics(policy: str) -> None:
    """Raise InputError unless ``policy`` is one of :data:`STATISTICS`."""
    if policy not in STATISTICS:
        raise InputError(f"statistics must be one of {', '.join(STATISTICS)}, got {policy!r}.")


@dataclass(frozen=True)
class Packing:
    """Which arrays are modelled (they make the flat vector [N]), and which travel as they are.

    Modelled are the floating arrays of the model's main dtype: float32, or float64 where nothing
    is float32. BatchNorm's statistics never are (an affine map can make a variance negative), and
    neither are integers and half-precision arrays: these travel as they are.

    Attributes:
        arrays: Names, shapes and dtypes of all arrays, in their order.
        modelled: Names of those that are modelled.
        kept: Names of the statistics that stay with each client.
    """

    arrays: Layout
    modelled: frozenset[str]
    kept: frozenset[str] = frozenset()

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
            include: Globs (``conv*``) on names to model; empty means all.
            exclude: Globs (``conv*``) on names to leave out, and to send as they are.
            statistics: BatchNorm's: ``"average"`` them like weights (FedAvg), or keep them
                ``"local"`` to each client.

        Raises:
            InputError: If the policy is unknown or no array can be modelled.
        """
        check_statistics(statistics)
        kinds = {a.dtype for a in arrays.values() if a.dtype in (np.float32, np.float64)}
        main = np.dtype(np.float32 if np.dtype(np.float32) in kinds else np.float64)
        running = {name for name in arrays if is_statistic(name)}

        def wanted(name: str) -> bool:
            chosen = not include or any(fnmatchcase(name, pattern) for pattern in include)
            return chosen and not any(fnmatchcase(name, pattern) for pattern in exclude)

        modelled = frozenset(
            name
            for name, array in arrays.items()
            if array.dtype == main and array.size and name not in running and wanted(name)
        )
        if not modelled:
            raise InputError(
                "no float32 or float64 array is left to model: widen include and exclude."
            )
        layout = Layout(
            tuple(arrays),
            tuple(tuple(array.shape) for array in arrays.values()),
            tuple(str(array.dtype) for array in arrays.values()),
        )
        return cls(layout, modelled, frozenset(running if statistics == "local" else ()))

    @cached_property
    def layout(self) -> Layout:
        """The modelled arrays: where each lies in the flat vector."""
        return self.arrays.select(self.modelled)

    @cached_property
    def raw(self) -> Layout:
        """The other arrays."""
        return self.arrays.select({*self.arrays.names} - self.modelled)

    @cached_property
    def statistics(self) -> Layout:
        """Those among them that stay with each client."""
        return self.arrays.select(self.kept)

    @cached_property
    def shared(self) -> Layout:
        """Those among them that every message holds."""
        return self.raw.select({*self.raw.names} - self.kept)

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the flat vector, little-endian."""
        return np.dtype(self.layout.dtypes[0]).newbyteorder("<")

    @cached_property
    def identity(self) -> int:
        """64-bit hash of names, shapes, dtypes and policies."""
        return int.from_bytes(hashlib.sha256(self.to_json()).digest()[:8], "little")

    def to_json(self) -> bytes:
        """Return the packing as JSON; :meth:`from_json` reads it."""
        rows = [
            [name, shape, dtype, int(name in self.modelled), int(name in self.kept)]
            for name, shape, dtype in _rows(self.arrays)
        ]
        return json.dumps(rows, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Packing:
        """Read what :meth:`to_json` wrote.

        Raises:
            FrameError: If it is something else.
        """
        try:
            rows = [
                (str(name), tuple(map(int, shape)), np.dtype(dtype).name, bool(m), bool(k))
                for name, shape, dtype, m, k in json.loads(text)
            ]
        except (ValueError, TypeError) as error:
            raise FrameError("layout", f"it cannot be read ({error}).") from error
        modelled = frozenset(name for name, _, _, m, _ in rows if m)
        if not modelled:
            raise FrameError("layout", "it models nothing.")
        names, shapes, dtypes, _, _ = zip(*rows, strict=True)
        if len({*names}) != len(names):
            raise FrameError("layout", "a name is there twice.")
        kept = frozenset(name for name, _, _, m, k in rows if k and not m)
        return cls(Layout(names, shapes, dtypes), modelled, kept)

    def check(self, arrays: Arrays) -> None:
        """Refuse arrays of other names, order, shapes or dtypes.

        Raises:
            FrameError: Naming the first difference.
        """
        for name, shape, dtype in _rows(self.arrays):
            if name not in arrays:
                raise FrameError(repr(name), "it is missing.")
            array = arrays[name]
            if tuple(array.shape) != shape:
                raise FrameError(repr(name), f"shape {tuple(array.shape)}, expected {shape}.")
            if str(array.dtype) != dtype:
                raise FrameError(repr(name), f"dtype {array.dtype}, expected {dtype}.")
        for position, name in enumerate(arrays):
            if name not in self.arrays.names:
                raise FrameError(repr(name), "it is not part of the model.")
            if name != self.arrays.names[position]:
                raise FrameError(repr(name), "the tensors come in another order.")

    def flatten(self, arrays: Arrays) -> Flat:
        """Return the modelled weights [N] of named arrays; a new vector."""
        parts = [np.asarray(arrays[name]).reshape(-1) for name in self.layout.names]
        return np.concatenate(parts).astype(self.dtype, copy=False)

    def unflatten(self, flat: Flat, raw: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Return named arrays, in their order, of a flat vector [N] and the others."""
        modelled = self._split(flat.astype(self.dtype))
        return {
            name: modelled[name] if name in modelled else raw[name] for name in self.arrays.names
        }

    def _split(self, flat: Flat) -> dict[str, npt.NDArray[Any]]:
        parts = self.layout.split(torch.from_numpy(flat))
        return {name: part.numpy() for name, part in parts.items()}

    def refuse_non_finite(self, flat: Flat, raw: Arrays) -> None:
        """Raise FrameError, naming the tensor and the count, if a value is NaN or infinite."""
        modelled = {} if np.isfinite(flat.sum(dtype=np.float64)) else self._split(flat)
        for name, array in {**modelled, **raw}.items():
            if np.issubdtype(array.dtype, np.floating):
                bad = int((~np.isfinite(array)).sum())
                if bad:
                    raise FrameError(
                        repr(name), f"{bad} of {array.size} values are NaN or infinite."
                    )

    def refuse_out_of_range(self, flat: Flat, raw: Arrays, start: Flat, others: Arrays) -> None:
        """Raise FrameError, naming the tensor, if finite values cannot be those of a network.

        These are values beyond 1e10 in a tensor that had none a tenth as large, and variances that
        became negative.

        Args:
            flat: [N] modelled weights of a trained model, finite.
            raw: Its other arrays, finite.
            start: [N] modelled weights the training started from.
            others: The other arrays it started from.
        """
        if not (flat.min() >= -_LARGEST and flat.max() <= _LARGEST):
            parts = self._split(start)
            for name, array in self._split(flat).items():
                _refuse_large(name, array, parts[name], _LARGEST)
        for name, array in raw.items():
            if np.issubdtype(array.dtype, np.floating) and array.size:
                is_variance = name.rsplit(".", 1)[-1] == _VARIANCE
                largest = _LARGEST**2 if is_variance else _LARGEST
                before = others.get(name, np.zeros_like(array))
                _refuse_large(name, array, before, largest)
                negative = int(((array < 0) & (before >= 0)).sum()) if is_variance else 0
                if negative:
                    raise FrameError(
                        repr(name), f"{negative} of {array.size} variances became negative."
                    )


def _refuse_large(
    name: str, array: npt.NDArray[Any], before: npt.NDArray[Any], largest: float
) -> None:
    size = float(np.abs(array).max())
    # Some models hold constants of that size, say -1e30 in a mask.
    if size > largest and size > 10.0 * float(np.abs(before).max()):
        count = int((np.abs(array) > largest).sum())
        raise FrameError(
            repr(name),
            f"{count} of {array.size} values lie beyond {largest:g}, the largest is {size:.3g}.",
        )


def _rows(layout: Layout) -> list[tuple[str, tuple[int, ...], str]]:
    return list(zip(layout.names, layout.shapes, layout.dtypes, strict=True))


def pack_arrays(layout: Layout, arrays: Arrays, *, coarse: bool = False) -> bytes:
    """Return the bytes of the arrays of a layout, in its order.

    Args:
        layout: As said.
        arrays: Name -> array.
        coarse: Send float32 statistics as bfloat16 (the range of float32, three digits) instead of
            as they are.
    """
    parts = []
    for name, _, dtype in _rows(layout):
        array = np.ascontiguousarray(arrays[name], dtype=np.dtype(dtype).newbyteorder("<"))
        if coarse and _is_coarse(name, dtype):
            array = torch.from_numpy(array).bfloat16().view(torch.int16).numpy().astype("<i2")
        parts.append(array.tobytes())
    return b"".join(parts)


def _is_coarse(name: str, dtype: str) -> bool:
    return dtype == "float32" and is_statistic(name)


def unpack_arrays(
    layout: Layout, data: bytes, *, coarse: bool = False
) -> dict[str, npt.NDArray[Any]]:
    """Read what :func:`pack_arrays` wrote.

    Raises:
        FrameError: If the number of bytes differs.
    """
    kinds = [
        np.dtype(np.int16 if coarse and _is_coarse(name, dtype) else dtype)
        for name, _, dtype in _rows(layout)
    ]
    expected = sum(size * kind.itemsize for size, kind in zip(layout.sizes, kinds, strict=True))
    if len(data) != expected:
        raise FrameError("raw", f"expected {expected} bytes, got {len(data)}.")
    found, at = {}, 0
    for (name, shape, dtype), size, kind in zip(_rows(layout), layout.sizes, kinds, strict=True):
        flat = np.frombuffer(data, kind.newbyteorder("<"), count=size, offset=at).astype(kind)
        at += flat.nbytes
        if coarse and _is_coarse(name, dtype):
            flat = torch.from_numpy(flat).view(torch.bfloat16).float().numpy()
        found[name] = flat.reshape(shape)
    return found
