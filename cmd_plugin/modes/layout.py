"""Which tensors of a model are modelled, and where each lies in the flat vector of N weights."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from cmd_plugin.errors import InputError, ShapeError, StateMismatch
from cmd_plugin.networks.names import by_clean_name, clean_name

__all__ = [
    "BUFFER_POLICIES",
    "Layout",
    "by_clean_name",
    "check_buffers",
    "clean_name",
    "find_weights",
    "named_weights",
]

BUFFER_POLICIES = ("model", "recalibrate", "keep")

_DTYPES = {"float64", "float32", "float16", "bfloat16"}
_STATISTICS = ("running_mean", "running_var")


def _is_statistic(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in _STATISTICS


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the modelled tensors, in the order in which they fill the flat vector.

    Attributes:
        names: Cleaned names, unique.
        shapes: One shape per name; ``()`` for a scalar.
        dtypes: Names of the torch dtypes, as ``"float32"``.
        aliases: Other names of the same tensors (tied weights): alias -> name in ``names``.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of weights of each tensor."""
        return tuple(prod(shape) for shape in self.shapes)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Flat position of the first weight of each tensor."""
        return tuple(accumulate(self.sizes, initial=0))[:-1]

    @cached_property
    def numel(self) -> int:
        """Number of weights N."""
        return sum(self.sizes)

    @cached_property
    def state_dtype(self) -> torch.dtype:
        """float64 when every tensor is float64, otherwise float32."""
        return torch.float64 if set(self.dtypes) == {"float64"} else torch.float32

    @cached_property
    def fingerprint(self) -> str:
        """Hash of names and shapes: two models with the same one can share a state."""
        text = json.dumps([self.names, self.shapes])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def locate(self, position: int) -> tuple[str, int]:
        """Return the tensor that holds a flat position, and the position inside it."""
        index = bisect_right(self.offsets, position) - 1
        return self.names[index], position - self.offsets[index]

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Return views of a flat vector [N] by name, in the tensors' shapes."""
        if flat.shape != (self.numel,):
            raise ShapeError(f"expected {self.numel} weights, got shape {tuple(flat.shape)}.")
        return {
            name: flat[start : start + size].view(shape)
            for name, shape, start, size in zip(
                self.names, self.shapes, self.offsets, self.sizes, strict=True
            )
        }

    def select(self, chosen: Container[str]) -> Layout:
        """Return the layout of the tensors with a name in ``chosen``, in the same order."""
        rows = zip(self.names, self.shapes, self.dtypes, strict=True)
        kept = [row for row in rows if row[0] in chosen]
        names, shapes, dtypes = zip(*kept, strict=True) if kept else ((), (), ())
        return Layout(names, shapes, dtypes)

    def variances(self) -> list[slice]:
        """Flat positions of BatchNorm's running variances: no modelled one may be negative."""
        return [
            slice(start, start + size)
            for name, start, size in zip(self.names, self.offsets, self.sizes, strict=True)
            if name.endswith("running_var")
        ]

    def require_same(self, other: Layout, what: str) -> None:
        """Raise StateMismatch, naming a difference, if ``other`` has other names or shapes."""
        if self.fingerprint == other.fingerprint:
            return
        mine, theirs = (dict(zip(x.names, x.shapes, strict=True)) for x in (self, other))
        for name, shape in mine.items():
            if name not in theirs:
                raise StateMismatch(f"{what} lacks the tensor {name!r} of shape {shape}.")
            if theirs[name] != shape:
                raise StateMismatch(
                    f"{what} has {name!r} with shape {theirs[name]}, expected {shape}."
                )
        extra = [name for name in theirs if name not in mine]
        if extra:
            raise StateMismatch(f"{what} has a tensor {extra[0]!r} that is not expected.")
        raise StateMismatch(f"{what} lists the same tensors in another order.")

    def to_json(self) -> str:
        """Return the layout as JSON text; :meth:`from_json` reads it."""
        return json.dumps(
            {
                "names": self.names,
                "shapes": self.shapes,
                "dtypes": self.dtypes,
                "aliases": dict(self.aliases),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Layout:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: If the text is something else, or its parts do not fit one another.
        """
        data = json.loads(text)
        if not isinstance(data, dict):
            raise ValueError("a layout is a JSON object")
        parts: list[Any] = [data.get(key) for key in ("names", "shapes", "dtypes", "aliases")]
        names, shapes, dtypes, aliases = parts
        sound = (
            _is_list(names, str)
            and len(set(names)) == len(names) > 0
            and _is_list(shapes, list)
            and all(_is_list(shape, int) and all(n > 0 for n in shape) for shape in shapes)
            and _is_list(dtypes, str)
            and set(dtypes) <= _DTYPES
            and len(names) == len(shapes) == len(dtypes)
            and isinstance(aliases, dict)
            and all(name in names and alias not in names for alias, name in aliases.items())
        )
        if not sound:
            raise ValueError("a layout's names, shapes, dtypes and aliases do not fit")
        return cls(tuple(names), tuple(map(tuple, shapes)), tuple(dtypes), aliases)

    @classmethod
    def of_vector(cls, numel: int, dtype: torch.dtype = torch.float32) -> Layout:
        """Return the layout of one nameless vector of N weights."""
        return cls(("weights",), ((numel,),), (str(dtype).removeprefix("torch."),))

    @classmethod
    def of_tensors(
        cls, tensors: Mapping[str, Tensor], aliases: Mapping[str, str] | None = None
    ) -> Layout:
        """Return the layout of named tensors, in the mapping's order."""
        return cls(
            tuple(tensors),
            tuple(tuple(t.shape) for t in tensors.values()),
            tuple(str(t.dtype).removeprefix("torch.") for t in tensors.values()),
            dict(aliases or {}),
        )

    @classmethod
    def of_model(
        cls,
        model: nn.Module,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        buffers: str = "model",
    ) -> Layout:
        """Return the layout of the weights of a model that :func:`named_weights` selects."""
        return cls.of_tensors(*named_weights(model, include, exclude, buffers))


def _is_list(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def check_buffers(buffers: str) -> None:
    """Raise InputError unless ``buffers`` is one of :data:`BUFFER_POLICIES`."""
    if buffers not in BUFFER_POLICIES:
        raise InputError(f"buffers must be one of {', '.join(BUFFER_POLICIES)}, got {buffers!r}.")


def is_selected(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether globs choose a name: ``include``, or all if it is empty, less ``exclude``."""
    wanted = not include or any(fnmatchcase(name, pattern) for pattern in include)
    return wanted and not any(fnmatchcase(name, pattern) for pattern in exclude)


def named_weights(
    source: nn.Module | Mapping[str, Tensor],
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    buffers: str = "model",
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Select the tensors to model, by cleaned name, and the aliases of tied ones.

    From a model: floating parameters with ``requires_grad``, each once, then BatchNorm's running
    statistics when ``buffers`` is ``"model"`` (the authors' code models them; leaving the raw run's
    costs accuracy). From a state_dict, which does not say what is a parameter: every floating
    entry, running statistics by the same policy, tied entries once.

    Args:
        source: Model or state_dict.
        include: Globs (``conv*``) on names; empty means all.
        exclude: Globs (``conv*``) on names, applied after ``include``.
        buffers: ``"model"``, ``"recalibrate"`` or ``"keep"``; only the first models the running
            statistics.

    Raises:
        InputError: If the policy is unknown, nothing is selected, or two tensors have the same
            cleaned name.
    """
    check_buffers(buffers)
    if isinstance(source, nn.Module):
        tied = list(source.named_parameters(remove_duplicate=False))
        candidates: Iterable[tuple[str, object]] = [
            *((name, p) for name, p in tied if p.requires_grad),
            *(
                (name, b)
                for name, b in source.named_buffers(remove_duplicate=False)
                if _is_statistic(name)
            ),
        ]
    else:
        candidates = source.items()
    chosen: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[object, ...], str] = {}
    for name, tensor in by_clean_name(candidates).items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        if _is_statistic(name) and buffers != "model":
            continue
        if not is_selected(name, include, exclude):
            continue
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.device)
        if key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        chosen[name] = tensor
    if not chosen:
        raise InputError(
            f"no floating weights are left to model (include={list(include)}, "
            f"exclude={list(exclude)}): widen the globs or unfreeze parameters."
        )
    return chosen, aliases


def find_weights(
    layout: Layout, source: nn.Module | Mapping[str, Tensor], what: str
) -> dict[str, Tensor]:
    """Return the tensors of a layout, by name, out of a model or a state_dict.

    Whether a parameter is trained at the moment does not matter: one that was frozen in the middle
    of a run is still followed.

    Args:
        layout: Layout to fill.
        source: Where the tensors are; it may hold others.
        what: Name of the source for error messages.

    Raises:
        StateMismatch: If a tensor is missing or has another shape.
    """
    if isinstance(source, nn.Module):
        entries: Iterable[tuple[str, object]] = [
            *source.named_parameters(remove_duplicate=False),
            *source.named_buffers(remove_duplicate=False),
        ]
    else:
        entries = source.items()
    found = by_clean_name(entries)
    for alias, name in layout.aliases.items():  # of tied tensors a file may hold any one name
        if name not in found and alias in found:
            found[name] = found[alias]
    chosen = {name: found[name] for name in layout.names if name in found}
    layout.require_same(Layout.of_tensors(chosen), what)
    return chosen
