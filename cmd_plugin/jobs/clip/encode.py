"""Images and captions into embeddings, in parts that a stopped run need not encode again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cmd_plugin.clip.towers import Modality, Tower
from cmd_plugin.data.files import ImageFile, Skipped
from cmd_plugin.errors import InputError, NonFiniteError
from cmd_plugin.jobs.clip.encoder import describe_encoder, find_tower
from cmd_plugin.jobs.clip.inputs import (
    EmbeddingFile,
    is_embeddings,
    open_embeddings,
    write_about,
)
from cmd_plugin.jobs.clip.options import EncoderOptions
from cmd_plugin.jobs.clip.pictures import batches_of, find_images, is_images
from cmd_plugin.runs.job import Job
from cmd_plugin.runs.table import Table
from cmd_plugin.runs.tensors import Schema

__all__ = ["LEFT_OUT", "Opened", "open_input"]

LEFT_OUT = "left_out.csv"

_PART = Schema("encoded-part", 1, "a part of an encoding")
_PART_BATCHES = 16
_COLUMNS: dict[str, Callable[[str], Any]] = {"file": str, "reason": str}


class _Encoded(NamedTuple):
    """The rows of one batch, and which of its items they are; the rest with the reason why not."""

    rows: Tensor | None
    kept: list[int]
    left_out: list[Skipped]


class Opened(NamedTuple):
    """An input as embeddings.

    Attributes:
        file: The embeddings.
        data: What is to be said of it in the result.
    """

    file: EmbeddingFile
    data: dict[str, Any]


def open_input(
    job: Job,
    options: EncoderOptions,
    path: Path,
    captions: Path | None = None,
    *,
    name: str = "embeddings",
    shard: tuple[int, int] = (1, 1),
) -> Opened:
    """Open embeddings, or make them of images and captions; what was made before is not again.

    Images and captions leave ``NAME.npy`` and ``NAME.json`` in the job's folder, which any command
    reads as it reads other embeddings, and ``left_out.csv`` if something could not be read.

    Args:
        job: The run.
        options: The encoder.
        path: Embeddings, images, or captions.
        captions: Of images: their captions, which makes pairs.
        name: Of the files.
        shard: Number, from 1, and count: only this part of the input is used.

    Raises:
        InputError: If something cannot be used.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise InputError(f"{path} does not exist: check the path.")
    if path.is_file() and is_embeddings(path):
        return _stored(options, path, captions, shard)
    if options.model is None:
        raise InputError(
            f"{path} holds images or captions, which an encoder has to turn into embeddings: "
            "give --model, or embeddings as .npy or .safetensors."
        )
    work = _Work(job, options, path, captions, name, shard)
    found = job.stage(f"{name}-encoded", work.encode)
    opened = open_embeddings(job.folder.path(f"{name}.npy"))
    _list_left_out(job, found["left_out"])
    data = {"input": str(path.resolve()), **{k: v for k, v in found.items() if k != "left_out"}}
    return Opened(opened, {**data, "left_out": len(found["left_out"])})


def _stored(
    options: EncoderOptions, path: Path, captions: Path | None, shard: tuple[int, int]
) -> Opened:
    if captions is not None:
        raise InputError(f"--captions belong to images, and {path} holds embeddings: leave it out.")
    if options.model is not None:
        raise InputError(f"{path} holds embeddings, which need no encoder: leave out --model.")
    file = open_embeddings(path)
    start, stop = _range(len(file.parts[0]), shard, path)
    file = EmbeddingFile(path, tuple(rows.between(start, stop) for rows in file.parts))
    rows = file.parts[0]
    kind = "pairs" if len(file.parts) == 2 else "embeddings"
    return Opened(
        file,
        {
            "input": str(path.resolve()),
            "kind": kind,
            "rows": len(rows),
            "first_row": start,
            "dimension": rows.dimension,
            "left_out": 0,
        },
    )


def _range(count: int, shard: tuple[int, int], path: Path) -> tuple[int, int]:
    """First and last row, not included, of a shard."""
    number, shards = shard
    if shards > count:
        raise InputError(f"{path} has {count} rows, too few for {shards} shards: ask for fewer.")
    return (number - 1) * count // shards, number * count // shards


def _list_left_out(job: Job, left_out: Sequence[Sequence[str]]) -> None:
    if left_out:
        table = Table(job.folder.path(LEFT_OUT), _COLUMNS)
        known = table.rows()
        table.replace([*known, *(row for row in map(tuple, left_out) if row not in known)])


class _Side(NamedTuple):
    """One modality of an input: what there is to encode, and the files its rows will be in."""

    modality: Modality
    names: list[str]
    files: Sequence[ImageFile]
    parts: list[Path]


class _Work:
    """The encoding of one input."""

    def __init__(
        self,
        job: Job,
        options: EncoderOptions,
        path: Path,
        captions: Path | None,
        name: str,
        shard: tuple[int, int],
    ) -> None:
        self.job, self.options, self.path, self.name = job, options, path, name
        self.captions, self.shard = captions, shard
        self.left_out: list[Skipped] = []

    def encode(self) -> dict[str, Any]:
        """Encode what is not encoded yet, and write all embeddings; what they are."""
        sides = self._sides()
        about: dict[str, str] = {}
        total, before = sum(len(side.names) for side in sides), 0
        for side in sides:
            tower = find_tower(self.options, side.modality)
            about = {**describe_encoder(self.options, tower), **about}
            self._encode_side(tower, side, total, before)
            before += len(side.names)
        return self._write(sides, about)

    def _sides(self) -> list[_Side]:
        if not is_images(self.path):
            if self.captions is not None:
                raise InputError(
                    f"--captions belong to images, and {self.path} holds none: leave it out."
                )
            texts = _read_captions(self.path)
            start, stop = _range(len(texts), self.shard, self.path)
            return [self._side("text", texts[start:stop])]
        listing = find_images(self.path)
        self.left_out += listing.skipped
        start, stop = _range(len(listing.files), self.shard, self.path)
        files = listing.files[start:stop]
        sides = [self._side("image", [file.label for file in files], files)]
        if self.captions is not None:
            texts = _read_captions(self.captions)
            if len(texts) != len(listing.files):
                raise InputError(
                    f"--captions {self.captions} has {len(texts)} lines, and {self.path} has "
                    f"{len(listing.files)} images whose headers can be read: give each image, in "
                    "the order of their names, one line."
                )
            sides.append(self._side("text", texts[start:stop]))
        return sides

    def _side(self, modality: Modality, names: list[str], files: Sequence[ImageFile] = ()) -> _Side:
        count = -(-len(names) // (self.options.batch_size * _PART_BATCHES))
        parts = (f"{self.name}-{modality}-{n:06d}.safetensors" for n in range(count))
        return _Side(modality, names, files, [self.job.folder.state(part) for part in parts])

    def _encode_side(self, tower: Tower, side: _Side, total: int, before: int) -> None:
        """Encode in parts, each a file; those that are there are taken as they are."""
        there = next((n for n, p in enumerate(side.parts) if not p.exists()), len(side.parts))
        done = min(there * self.options.batch_size * _PART_BATCHES, len(side.names))
        stage = f"encoding {side.modality}s"
        self.job.report(stage, before + done, total)
        if there == len(side.parts):
            return
        held: list[_Encoded] = []
        options = self.options
        batches = (
            _images(tower, side.files[done:], options)
            if side.modality == "image"
            else _captions(tower, side.names, done, options.batch_size)
        )
        for encoded in batches:
            held.append(encoded)
            done += len(encoded.kept) + len(encoded.left_out)
            if len(held) == _PART_BATCHES or done == len(side.names):
                _save_part(side.parts[there], held)
                held, there = [], there + 1
            self.job.report(stage, before + done, total)

    def _write(self, sides: Sequence[_Side], about: dict[str, str]) -> dict[str, Any]:
        kept = [_kept_rows(side.parts) for side in sides]
        order = sorted(set.intersection(*map(set, kept)))
        bad = [item for side in sides for part in side.parts for item in _read_part(part).left_out]
        left_out = [*self.left_out, *bad]
        if not order:
            name, reason = left_out[0]
            raise InputError(
                f"nothing in {self.path} could be read ({name} {reason}): check the files."
            )
        folder = self.job.folder
        widths = {_width(side.parts) for side in sides}
        if len(widths) > 1:
            raise InputError(
                f"--model {self.options.model} makes embeddings of images and texts that are not "
                "equally long: it is no model of pairs."
            )
        (width,) = widths
        shape = (len(order), width) if len(sides) == 1 else (len(sides), len(order), width)
        path = folder.path(f"{self.name}.npy")
        folder.write(path, lambda file: _assemble(file, shape, sides, set(order)))
        names = {side.modality: [side.names[row] for row in order] for side in sides}
        about = {**about, "source": str(self.path.resolve())}
        write_about(folder.path(f"{self.name}.json"), names, about)
        return {
            "kind": "pairs" if len(sides) > 1 else f"{sides[0].modality}s",
            "rows": len(order),
            "dimension": width,
            **about,
            "left_out": [list(item) for item in left_out],
        }


def _images(
    tower: Tower, files: Sequence[ImageFile], options: EncoderOptions
) -> Iterator[_Encoded]:
    assert tower.preprocessing is not None
    for batch in batches_of(files, tower.preprocessing, options.batch_size, options.workers):
        pixels = [item for item in batch if isinstance(item, Tensor)]
        yield _Encoded(
            tower.encode(torch.stack(pixels)).float().cpu() if pixels else None,
            [row for row, item in enumerate(batch) if isinstance(item, Tensor)],
            [item for item in batch if isinstance(item, Skipped)],
        )


def _captions(tower: Tower, texts: Sequence[str], done: int, size: int) -> Iterator[_Encoded]:
    for start in range(done, len(texts), size):
        batch = texts[start : start + size]
        good = [row for row, text in enumerate(batch) if text]
        empty = [row for row, text in enumerate(batch) if not text]
        yield _Encoded(
            tower.embed([batch[row] for row in good]).float().cpu() if good else None,
            good,
            [Skipped(f"caption {start + row + 1}", "is empty") for row in empty],
        )


def _save_part(path: Path, held: Sequence[_Encoded]) -> None:
    filled = [encoded.rows for encoded in held if encoded.rows is not None]
    rows = torch.cat(filled) if filled else torch.empty(0, 0)
    bad = int((~rows.isfinite().all(dim=1)).sum())
    if bad:
        raise NonFiniteError(
            f"the encoder gives NaN or infinite values for {bad} of {len(rows)} inputs: check its "
            "weights, or encode in float32."
        )
    kept: list[int] = []
    left_out: list[Skipped] = []
    items = 0
    for encoded in held:
        kept += [items + row for row in encoded.kept]
        left_out += encoded.left_out
        items += len(encoded.kept) + len(encoded.left_out)
    about = {"kept": kept, "left_out": left_out, "items": items}
    _PART.save(path, {"rows": rows}, {"about": json.dumps(about)})


class _Part(NamedTuple):
    """What a part holds: its rows, the numbers of their items in it, and how many it is of."""

    rows: Tensor
    kept: list[int]
    left_out: list[Skipped]
    items: int


def _read_part(path: Path) -> _Part:
    tensors, metadata = _PART.load(path)
    about = json.loads(metadata["about"])
    left_out = [Skipped(*item) for item in about["left_out"]]
    return _Part(tensors["rows"], about["kept"], left_out, about["items"])


def _kept_rows(parts: Sequence[Path]) -> list[int]:
    """Numbers of the items that were encoded."""
    kept, first = [], 0
    for path in parts:
        part = _read_part(path)
        kept += [first + row for row in part.kept]
        first += part.items
    return kept


def _width(parts: Sequence[Path]) -> int:
    return max(_read_part(path).rows.shape[1] for path in parts)


def _assemble(path: Path, shape: tuple[int, ...], sides: Sequence[_Side], rows: set[int]) -> None:
    """Write the chosen rows of all parts into one .npy, a part at a time."""
    with path.open("wb") as stream:
        np.lib.format.write_array_header_1_0(
            stream, {"descr": "<f4", "fortran_order": False, "shape": shape}
        )
        for side in sides:
            first = 0
            for part in map(_read_part, side.parts):
                chosen = [place for place, row in enumerate(part.kept) if first + row in rows]
                stream.write(part.rows[chosen].numpy().astype("<f4").tobytes())
                first += part.items


def _read_captions(path: Path) -> list[str]:
    if path.suffix.lower() not in ("", ".txt"):
        raise InputError(
            f"{path} is no input of these commands: give embeddings (.npy, .safetensors), a folder "
            "or archive of images, or captions as .txt."
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}): give a text file in UTF-8.") from error
    texts = [line.strip() for line in lines]
    while texts and not texts[-1]:
        texts.pop()
    if not texts:
        raise InputError(f"{path} holds no captions: write one a line.")
    return texts
