"""What speaks for a class in a user's images: pictures, arrays, and a page."""

from __future__ import annotations

import html
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmd_plugin.data import ImageSet, read_images
from cmd_plugin.distinction.artefact import read_decomposer_about
from cmd_plugin.distinction.decomposition import Decomposition, decompose
from cmd_plugin.distinction.masks import mask_iou, mass_inside, pointing_game
from cmd_plugin.distinction.plots import plot_decomposition
from cmd_plugin.errors import InputError
from cmd_plugin.jobs.distinction.data import find_class
from cmd_plugin.jobs.distinction.marks import read_marks
from cmd_plugin.jobs.distinction.model import EXPLAINER, TrainedSplit, open_model
from cmd_plugin.jobs.distinction.options import ExplainOptions
from cmd_plugin.runs.figures import save_figure, write_page
from cmd_plugin.runs.files import write_atomically
from cmd_plugin.runs.job import Job, make_job
from cmd_plugin.runs.process import own_random_state, own_threads
from cmd_plugin.runs.result import Result

__all__ = ["run"]

_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow makes colours grey


@make_job("distinction explain")
def run(job: Job, options: ExplainOptions) -> Result:
    """Decompose images, and write what a person wants to see.

    Returns:
        ``images``: of each by name its ``target``, the probability of it ``before`` and ``after``
        (None without a classifier), the mean size of the ``residual``, and with masks ``iou``,
        ``pointing`` and ``mass``, whose means over the images in which something is ``marked`` are
        in ``masks``.

    Raises:
        InputError: If images, masks or folder cannot be used.
        StateMismatch: If the classifier is another one than that of the training.
    """
    trained = open_model(options.model, options.classifier)
    target = None
    if options.target is not None:
        target = find_class(options.target, trained.classes, "--target")
    elif trained.decomposer.classifier is None:
        raise InputError("this decomposition has no classifier that answers: give --target.")
    given = read_images(options.images, trained.size, labelled=False)
    count = min(options.limit, len(given.images))
    images = _prepared(given, count, trained, options)
    masks, marked = None, 0
    if options.masks is not None:
        masks, marked = read_marks(options.masks, options.images, given.names[:count], trained.size)
    with own_random_state(), own_threads(options.threads):
        split = decompose(trained.decomposer, images, target)
        names = [_file_name(name, number) for number, name in enumerate(given.names[:count])]
        found = _describe(trained, split, masks)
        for number, name in enumerate(names):
            job.report(given.names[number], number, count)
            figure = _figure(images, split, trained, number, given.names[number])
            save_figure(figure, job.folder.path(f"pictures/{name}.png"))
        _write_arrays(job.folder.path("maps.npz"), images, split, masks)
        _write_page(job.folder.path("page.html"), job, given.names[:count], names, found)
    metrics: dict[str, Any] = {"images": dict(zip(given.names[:count], found, strict=True))}
    if masks is not None:
        scores = {name: _mean([one[name] for one in found]) for name in _MASKED}
        metrics["masks"] = scores | {"marked": marked}
    return job.finish(
        metrics=metrics,
        data={
            "images": count,
            "left_out": len(given.images) - count,
            "classes": list(trained.classes),
            "size": list(trained.size),
        },
    )


_MASKED = ("iou", "pointing", "mass")


def _prepared(
    given: ImageSet, count: int, trained: TrainedSplit, options: ExplainOptions
) -> Tensor:
    """The images as the classifier takes them, [B, C, H, W]."""
    pixels = given.images.read(torch.arange(count))
    if pixels.shape[1] == 1 and trained.channels == 3:
        pixels = pixels.expand(-1, 3, -1, -1)
    elif pixels.shape[1] == 3 and trained.channels == 1:
        weights = torch.tensor(_GREY)[None, :, None, None]
        pixels = (pixels * weights).sum(dim=1, keepdim=True)
    about = read_decomposer_about(options.model / EXPLAINER)
    mean, std = (torch.tensor(about[name])[:, None, None] for name in ("mean", "std"))
    return (pixels - mean) / std


def _describe(
    trained: TrainedSplit, split: Decomposition, masks: Tensor | None
) -> list[dict[str, Any]]:
    residual = (split.residual.abs() / trained.decomposer.pixels.half_width).flatten(1).mean(dim=1)
    found: list[dict[str, Any]] = []
    for number, label in enumerate(split.target.tolist()):
        chances = {
            name: None if chance is None else float(chance[number])
            for name, chance in (("before", split.before), ("after", split.after))
        }
        found.append(
            {"target": trained.classes[label], **chances, "residual": float(residual[number])}
        )
    if masks is not None:
        scores = mask_iou, pointing_game, mass_inside
        for name, score in zip(_MASKED, scores, strict=True):
            for one, value in zip(found, score(split.distinct, masks).tolist(), strict=True):
                one[name] = value if math.isfinite(value) else None
    return found


def _figure(
    images: Tensor, split: Decomposition, trained: TrainedSplit, number: int, name: str
) -> Any:
    one: dict[str, Any] = {
        field: None if value is None else value[number : number + 1]
        for field, value in vars(split).items()
    }
    return plot_decomposition(
        images[number : number + 1],
        Decomposition(**one),
        trained.decomposer.pixels,
        trained.classes,
        [name],
    )


def _write_arrays(path: Path, images: Tensor, split: Decomposition, masks: Tensor | None) -> None:
    arrays = {
        "x_batch": images,
        "y_batch": split.target,
        "a_batch": split.distinct.abs().mean(dim=1, keepdim=True),
        "distinct": split.distinct,
        "agnostic": split.agnostic,
        "branches": split.branches,
    }
    if masks is not None:
        arrays["s_batch"] = masks[:, None]

    def write(temporary: Path) -> None:
        with temporary.open("wb") as stream:
            plain: dict[str, Any] = {name: tensor.numpy() for name, tensor in arrays.items()}
            np.savez(stream, **plain)

    write_atomically(path, write)


def _write_page(
    path: Path, job: Job, names: tuple[str, ...], files: list[str], found: list[dict[str, Any]]
) -> None:
    parts: list[str | bytes] = []
    for name, file, one in zip(names, files, found, strict=True):
        chances = [one["before"], one["after"]]
        said = ""
        if None not in chances:
            said = f": {100 * chances[0]:.1f} % before, {100 * chances[1]:.1f} % without it"
        parts.append(f"<h2>{html.escape(name)}</h2><p>{html.escape(one['target'])}{said}</p>")
        parts.append(job.folder.path(f"pictures/{file}.png").read_bytes())
    write_page(path, "What speaks for a class", parts)


def _file_name(name: str, number: int) -> str:
    """A name for an image's picture: its number keeps images of one name in two folders apart."""
    plain = "".join(c if c.isalnum() or c in "-_" else "_" for c in Path(name).stem)[:40]
    return f"{number:04d}_{plain}"


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
