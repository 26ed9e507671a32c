"""Remove the gap between images and texts, and say what that does to search."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmd_plugin.clip import Alignment, fit_alignment, recall_at
from cmd_plugin.errors import InputError
from cmd_plugin.jobs.clip.encode import open_input
from cmd_plugin.jobs.clip.fitting import shrinkage_of, spread_rows
from cmd_plugin.jobs.clip.inputs import Rows, write_about
from cmd_plugin.jobs.clip.options import AlignOptions
from cmd_plugin.runs.job import Job, make_job
from cmd_plugin.runs.process import own_threads
from cmd_plugin.runs.result import Result

__all__ = ["ALIGNED", "run"]

ALIGNED = {"centred": "centre", "whitened": "whiten"}
"""Name of what is written -> how it is made."""

_RECALLS = (1, 5, 10)
_FEWEST = 20  # pairs, half of which are fitted on
_PIECE = 16384
_FITTED = 100_000  # rows of each modality that are fitted on, at most

_Pair = tuple[Tensor, Tensor]


@make_job("clip align")
def run(job: Job, options: AlignOptions) -> Result:
    """Align the modalities of pairs, and measure retrieval before and after.

    Written are, of each way, the aligned pairs (unit vectors, float32) and the alignment itself,
    for embeddings to come.

    Returns:
        Metrics: ``retrieval`` of raw, centred and whitened pairs: for ``text_to_image`` and
        ``image_to_text`` the recall at 1, 5 and 10 in a ``mixed`` gallery (all images, and all
        texts but the query) and ``alone`` (the other modality only). Each pair was tested once, by
        an alignment that was fitted on the other half. Data: the pairs, and how many were tested in
        a ``gallery``.

    Raises:
        InputError: If the input holds no pairs, or too few, or rows that are not finite.
    """
    with own_threads(options.threads):
        opened = open_input(job, options, options.input, options.captions)
        images, texts = opened.file.pair()
        if len(images) < _FEWEST:
            raise InputError(
                f"{options.input} holds {len(images)} pairs, and at least {_FEWEST} are needed to "
                "fit on one half and test on the other."
            )
        tested = job.stage("retrieval", lambda: _test(job, options, images, texts))
        _export(job, options, images, texts)
    return job.finish(
        metrics={"retrieval": tested["retrieval"]},
        data={**opened.data, "gallery": tested["gallery"]},
    )


def _test(job: Job, options: AlignOptions, images: Rows, texts: Rows) -> dict[str, Any]:
    pairs = tuple(spread_rows([rows], options.most_pairs) for rows in (images, texts))
    generator = torch.Generator().manual_seed(options.seed)
    halves = torch.randperm(len(pairs[0]), generator=generator).tensor_split(2)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ("raw", *ALIGNED)}
    steps = 2 * len(found)
    for number, (test, train) in enumerate((halves, halves[::-1])):
        inside, outside = ((pairs[0][rows], pairs[1][rows]) for rows in (test, train))
        for place, name in enumerate(found):
            job.report("testing retrieval", number * len(found) + place, steps, name)
            moved = inside
            if name in ALIGNED:
                alignment = _fit(options, outside, ALIGNED[name])
                moved = alignment.apply(inside[0], "image"), alignment.apply(inside[1], "text")
            found[name].append(_retrieval(moved))
    return {
        "retrieval": {name: _mean(rows) for name, rows in found.items()},
        "gallery": [len(half) for half in halves],
    }


def _fit(options: AlignOptions, pairs: _Pair, method: str) -> Alignment:
    return fit_alignment(
        *pairs,
        method,  # type: ignore[arg-type]
        shrinkage=shrinkage_of(options.shrinkage),
    )


def _retrieval(pairs: _Pair) -> dict[str, Any]:
    directions = {"text_to_image": pairs[::-1], "image_to_text": pairs}
    found: dict[str, Any] = {}
    for name, (queries, others) in directions.items():
        own = len(others) + torch.arange(len(queries))
        galleries = {
            "mixed": recall_at(queries, torch.cat((others, queries)), _RECALLS, leave_out=own),
            "alone": recall_at(queries, others, _RECALLS),
        }
        found[name] = {
            kind: {str(k): value for k, value in recalls.items()}
            for kind, recalls in galleries.items()
        }
    return found


def _mean(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean of equally nested numbers."""
    first = rows[0]
    return {
        name: _mean([row[name] for row in rows])
        if isinstance(first[name], dict)
        else sum(row[name] for row in rows) / len(rows)
        for name in first
    }


def _export(job: Job, options: AlignOptions, images: Rows, texts: Rows) -> None:
    fitted_on = tuple(spread_rows([rows], _FITTED) for rows in (images, texts))
    sides = {"image": images, "text": texts}
    shape = (2, len(images), images.dimension)
    names = {name: list(rows.names) for name, rows in sides.items() if rows.names is not None}
    for place, (name, method) in enumerate(ALIGNED.items()):
        job.report("writing", place, len(ALIGNED), name)
        alignment = _fit(options, (fitted_on[0], fitted_on[1]), method)
        alignment.save(job.folder.path(f"{name}.safetensors"))

        def write(path: Path, alignment: Alignment = alignment) -> None:
            with path.open("wb") as stream:
                about = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(stream, about)
                for piece in _aligned(alignment, sides):
                    stream.write(piece.numpy().astype("<f4").tobytes())

        job.folder.write(job.folder.path(f"{name}.npy"), write)
        if len(names) == len(sides):
            about = {**(images.about or {}), "aligned": name}
            write_about(job.folder.path(f"{name}.json"), names, about)


def _aligned(alignment: Alignment, sides: dict[str, Rows]) -> Iterator[Tensor]:
    for modality, rows in sides.items():
        for piece in rows.pieces(_PIECE):
            yield alignment.apply(piece, modality)  # type: ignore[arg-type]
