"""Numbers of many images, part by part into a table that an interrupted job goes on with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cmd_plugin.errors import InputError, NonFiniteError
from cmd_plugin.jobs.diffusion.model import Images
from cmd_plugin.runs.job import Job

__all__ = ["Scored", "score_images"]

_PART = 64  # images scored between rows on disk


class Scored(NamedTuple):
    """What was scored.

    Attributes:
        values: [K, columns] float64 numbers of the images that could be scored.
        kept: Which they are, of those there were.
        lost: The others, and why.
    """

    values: Tensor
    kept: list[int]
    lost: list[str]


def score_images(
    job: Job,
    table: str,
    columns: Sequence[str],
    images: Images | Tensor,
    score: Callable[[Tensor, Tensor | None], Tensor],
    names: Sequence[str] | None = None,
    condition: Callable[[int, int], Tensor] | None = None,
) -> Scored:
    """Score images into a table; what an earlier process scored is read from there.

    Args:
        job: The job.
        table: The table's file.
        columns: Name of each number.
        images: A folder's, or a tensor [N, C, H, W] in [-1, 1].
        score: Returns [B, columns] of a part [B, C, H, W] in [-1, 1] and its conditions. Where it
            raises NonFiniteError, the part's images are tried one by one: one image that the model
            cannot bear does not cost the others.
        names: Name of each image; by default the folder's, of a tensor its number.
        condition: Returns what images number ``start`` to ``stop`` are conditioned on, [B, ...]; by
            default the model's own condition stays.

    Raises:
        InputError: If no image can be scored.
    """
    count = len(images)
    if names is None:
        names = images.found.names if isinstance(images, Images) else [str(n) for n in range(count)]
    rows = job.table(table, {"number": int, "name": str, **dict.fromkeys(columns, float)})
    done = rows.rows()
    for first in range(done[-1][0] + 1 if done else 0, count, _PART):
        last = min(first + _PART, count)
        part = (
            images[first:last] if isinstance(images, Tensor) else images.read(first, last) * 2 - 1
        )
        given = None if condition is None else condition(first, last)
        lines = _bear(score, part, given, len(columns)).tolist()
        rows.append([first + n, names[first + n], *line] for n, line in enumerate(lines))
        job.report(Path(table).stem, last, count)
    done = rows.rows()
    values = torch.tensor([row[2:] for row in done], dtype=torch.float64)
    sound = values.isfinite().all(1).tolist()
    if not any(sound):
        raise InputError("the model returned NaN or infinite values for every image.")
    return Scored(
        values[torch.tensor(sound)],
        [row[0] for row, good in zip(done, sound, strict=True) if good],
        [
            f"{r[1]} NaN or infinite values of the model"
            for r, s in zip(done, sound, strict=True)
            if not s
        ],
    )


def _bear(
    score: Callable[[Tensor, Tensor | None], Tensor],
    part: Tensor,
    given: Tensor | None,
    columns: int,
) -> Tensor:
    try:
        return score(part, given).double()
    except NonFiniteError:
        if len(part) == 1:
            return torch.full((1, columns), math.nan, dtype=torch.float64)
        return torch.cat(
            [
                _bear(score, part[n : n + 1], None if given is None else given[n : n + 1], columns)
                for n in range(len(part))
            ]
        )
