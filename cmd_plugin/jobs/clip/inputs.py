"""What the clip commands read: embeddings on disk, one set or pairs, a piece at a time.

Every input ends up here. Images and captions are encoded first (``encode.py``) into the same kind
of file that a user may bring: ``NAME.npy``, and beside it ``NAME.json`` that says what its rows
are. So there is one reader, and no row is encoded twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmd_plugin.errors import InputError, ShapeError
from cmd_plugin.runs.files import write_json

__all__ = ["EmbeddingFile", "Rows", "is_embeddings", "open_embeddings", "write_about"]

_ENDINGS = (".npy", ".safetensors")
_PAIR = (("image", "text"), ("image_embeds", "text_embeds"), ("images", "texts"))
_SCHEMA = "cmd-plugin/embeddings/1"
_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_FEWEST = 2  # values in a row: a single one has no geometry

Read = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Rows:
    """Embeddings of one kind of thing, that stay on disk until they are read.

    Attributes:
        read: Gives rows [start, stop) as float32, or float64 if they are kept so, [n, d].
        count: Number of rows N.
        dimension: Values in a row, d.
        first: Which row of the file the first one is.
        modality: ``"image"`` or ``"text"``; None if the file does not say.
        names: Of each row: an image's path or a caption; None if they have only numbers.
        about: What is known of the encoder: ``encoder``, ``encoder_dtype``, ``source``.
    """

    read: Read
    count: int
    dimension: int
    first: int = 0
    modality: str | None = None
    names: tuple[str, ...] | None = None
    about: dict[str, str] | None = None

    def __len__(self) -> int:
        """Number of rows."""
        return self.count

    def pieces(self, size: int) -> Iterator[Tensor]:
        """Yield all rows in order, so many at a time, [n, d]."""
        for start in range(0, self.count, size):
            yield self.read(start, min(start + size, self.count))

    def all(self) -> Tensor:
        """Return all rows, [N, d], for what needs them at once."""
        return self.read(0, self.count)

    def name_of(self, row: int) -> str:
        """The name of a row; its number in the file if it has none."""
        return str(self.first + row) if self.names is None else self.names[row]

    def between(self, start: int, stop: int) -> Rows:
        """The rows [start, stop) alone."""
        read = self.read
        return replace(
            self,
            read=lambda a, b: read(start + a, start + b),
            count=stop - start,
            first=self.first + start,
            names=None if self.names is None else self.names[start:stop],
        )


@dataclass(frozen=True)
class EmbeddingFile:
    """One file of embeddings.

    Attributes:
        path: The file.
        parts: One set of rows, or those of images and of texts, row i of both a pair.
    """

    path: Path
    parts: tuple[Rows, ...]

    def single(self, modality: str | None) -> Rows:
        """The one set of rows, or that of a modality.

        Raises:
            InputError: If the file holds pairs and none is chosen, or the one that is not there.
        """
        if len(self.parts) == 1:
            (rows,) = self.parts
            if None not in (modality, rows.modality) and modality != rows.modality:
                raise InputError(
                    f"{self.path} holds embeddings of {rows.modality}s, not of {modality}s: leave "
                    "out --modality."
                )
            return rows if modality is None else replace(rows, modality=modality)
        if modality is None:
            raise InputError(
                f"{self.path} holds pairs of images and texts, which have no distribution in "
                "common: choose one by --modality image or text."
            )
        return next(rows for rows in self.parts if rows.modality == modality)

    def pair(self) -> tuple[Rows, Rows]:
        """The rows of images and of their texts.

        Raises:
            InputError: If the file holds one set only.
        """
        if len(self.parts) != 2:
            raise InputError(
                f"{self.path} holds one set of embeddings: give pairs, a .npy of shape [2, N, d] "
                "(images, then their texts) or a .safetensors with the tensors image and text."
            )
        return self.parts[0], self.parts[1]


def is_embeddings(path: Path) -> bool:
    """Whether a file's name is that of embeddings."""
    return path.suffix.lower() in _ENDINGS


def open_embeddings(path: str | Path) -> EmbeddingFile:
    """Open a file of embeddings; its values stay on disk.

    Args:
        path: ``.npy`` of shape [N, d], or [2, N, d] for pairs (images first); or ``.safetensors``
            with one such tensor, or the pair ``image`` and ``text``. Of any float type.

    Raises:
        ShapeError: If the array has another shape or type.
        InputError: If the file is missing, damaged, or holds something else.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"there is no file {path}: check the path.")
    reader = _open_npy if path.suffix.lower() == ".npy" else _open_safetensors
    parts = [_checked(path, rows) for rows in reader(path)]
    if len(parts) == 2:
        if (len(parts[0]), parts[0].dimension) != (len(parts[1]), parts[1].dimension):
            raise ShapeError(
                f"{path} holds {len(parts[0])} images of {parts[0].dimension} values and "
                f"{len(parts[1])} texts of {parts[1].dimension}: pairs are as many and as long."
            )
        parts = [replace(rows, modality=name) for rows, name in zip(parts, _PAIR[0], strict=True)]
    return EmbeddingFile(path, tuple(_with_about(path, parts)))


def write_about(path: Path, names: Mapping[Any, Sequence[str]], about: Mapping[str, str]) -> None:
    """Write what the rows of a file of embeddings are, beside it.

    Args:
        path: The .json.
        names: Names of the rows by modality.
        about: What is known of the encoder.
    """
    write_json(path, {"schema": _SCHEMA, "about": dict(about), "names": dict(names)})


def _with_about(path: Path, parts: list[Rows]) -> list[Rows]:
    """Rows with what the file beside theirs says of them, if it is one of ours."""
    beside = path.with_suffix(".json")
    if not beside.is_file():
        return parts
    try:
        content = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return parts  # it is somebody else's
    if not isinstance(content, dict) or content.get("schema") != _SCHEMA:
        return parts
    names, about = content.get("names"), content.get("about")
    if not (isinstance(names, dict) and isinstance(about, dict) and _fits(names, parts)):
        raise InputError(
            f"{beside} does not belong to {path}, or is damaged: encode the images or captions "
            "again, or move it away."
        )
    return [
        replace(rows, modality=modality, names=tuple(map(str, texts)), about=_plain(about))
        for rows, (modality, texts) in zip(parts, names.items(), strict=True)
    ]


def _fits(names: dict[Any, Any], parts: list[Rows]) -> bool:
    """Whether each set of rows has a name for each."""
    return len(names) == len(parts) and all(
        isinstance(texts, list) and len(texts) == len(rows)
        for rows, texts in zip(parts, names.values(), strict=True)
    )


def _plain(about: dict[Any, Any]) -> dict[str, str]:
    return {str(name): str(value) for name, value in about.items()}


def _checked(path: Path, rows: Rows) -> Rows:
    if not len(rows) or rows.dimension < _FEWEST:
        raise ShapeError(
            f"{path} holds {len(rows)} rows of {rows.dimension} values: embeddings are [N, d] with "
            "at least one row and two values."
        )
    return rows


def _open_npy(path: Path) -> list[Rows]:
    try:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # damaged headers end in almost any exception
        reason = " ".join(str(error).split())[:200].rstrip(". ")
        raise InputError(
            f"{path} is not a readable .npy file ({reason}): make or copy it again."
        ) from error
    if not isinstance(mapped, np.ndarray):
        mapped.close()
        raise InputError(f"{path} is an archive of arrays: save one array with numpy.save.")
    if mapped.dtype.kind != "f" or mapped.dtype.itemsize > 8:
        raise ShapeError(f"{path} holds values of type {mapped.dtype}: embeddings are floats.")

    def part(array: np.ndarray[Any, Any]) -> Rows:
        return Rows(lambda a, b: _as_tensor(array[a:b]), array.shape[0], array.shape[1])

    return [part(array) for array in _parts(path, mapped, mapped.shape)]


def _open_safetensors(path: Path) -> list[Rows]:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            names = _chosen(path, shapes)
            for name in names:
                kind = file.get_slice(name)[:0].dtype
                if kind not in _FLOATS:
                    raise ShapeError(f"{path} holds values of type {kind}: embeddings are floats.")
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200].rstrip(". ")
        raise InputError(
            f"{path} is not a readable .safetensors file ({reason}): make or copy it again."
        ) from error

    def part(name: str, *outer: int) -> Rows:
        def read(start: int, stop: int) -> Tensor:
            with safe_open(path, framework="pt") as file:
                found: Tensor = file.get_slice(name)[(*outer, slice(start, stop))]
            return found if found.dtype == torch.float64 else found.float()

        shape = shapes[name][-2:]
        return Rows(read, shape[0], shape[1])

    if len(names) == 1 and len(shapes[names[0]]) == 3:
        _parts(path, [0, 1], tuple(shapes[names[0]]))
        return [part(names[0], number) for number in (0, 1)]
    for name in names:
        _parts(path, None, tuple(shapes[name]), pairs=False)
    return [part(name) for name in names]


def _chosen(path: Path, shapes: dict[str, Any]) -> list[str]:
    for pair in _PAIR:
        if set(pair) <= set(shapes):
            return list(pair)
    if len(shapes) == 1 or "embeddings" in shapes:
        return ["embeddings"] if "embeddings" in shapes else list(shapes)
    raise InputError(
        f"{path} holds the tensors {', '.join(sorted(shapes)[:5])}: embeddings are one tensor "
        "(named embeddings if there are others), or two named image and text."
    )


def _parts(path: Path, array: Any, shape: tuple[int, ...], *, pairs: bool = True) -> list[Any]:
    """An array, or its two halves if it holds pairs."""
    if len(shape) == 2:
        return [array]
    if pairs and len(shape) == 3 and shape[0] == 2:
        return [array[0], array[1]]
    raise ShapeError(
        f"{path} holds an array of shape {list(shape)}: embeddings are [N, d], pairs [2, N, d]."
    )


def _as_tensor(values: np.ndarray[Any, Any]) -> Tensor:
    kind = np.float64 if values.dtype.itemsize == 8 else np.float32
    return torch.from_numpy(np.array(values, dtype=kind))  # a copy, which torch may write to
