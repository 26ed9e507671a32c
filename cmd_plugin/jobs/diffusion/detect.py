"""Was an image made by this model? Real images set the scale, re-deliveries test the verdict."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmd_plugin.diffusion import (
    ManifoldBiasDetector,
    RealReference,
    match_histogram,
    redeliver,
    verdicts,
)
from cmd_plugin.diffusion.delivery import DELIVERIES
from cmd_plugin.errors import InputError
from cmd_plugin.jobs.diffusion.model import Images, LoadedModel, kinds_of, load_model, read_for
from cmd_plugin.jobs.diffusion.options import CalibrateOptions, DetectOptions
from cmd_plugin.jobs.diffusion.scoring import Scored, score_images
from cmd_plugin.runs.job import Job, make_job
from cmd_plugin.runs.process import own_random_state, own_threads
from cmd_plugin.runs.result import Result
from cmd_plugin.runs.separation import auroc, average_precision

__all__ = ["REFERENCE", "calibrate", "detect"]

REFERENCE = "reference.safetensors"

_SCORES = ("criterion", "bias", "curvature", "gradient")
_FEWEST = 19  # real images with which p can get to .05 at all


@make_job("diffusion calibrate")
def calibrate(job: Job, options: CalibrateOptions) -> Result:
    """Score real images into reference.safetensors.

    Returns:
        The number of ``images``, the paper's ``threshold`` (mean and one standard deviation), the
        ``smallest_p`` these images allow, ``file_kinds`` and what was ``left_out``.

    Raises:
        InputError: If the model or the images cannot be used, or they are fewer than 19.
    """
    with own_random_state(), own_threads(options.threads):
        loaded, detector = _detector(options)
        images = read_for(loaded, Path(options.images[0]))
        scored = score_images(job, "scores.csv", _SCORES, images, partial(_numbers, detector))
    if len(scored.kept) < _FEWEST:
        raise InputError(
            f"{len(scored.kept)} real images are too few, since no p-value could get below .05: "
            f"give at least {_FEWEST}."
        )
    scores = dict(zip(_SCORES, scored.values.unbind(1), strict=True))
    about = {**detector.settings(), "files": " ".join(images.kinds())}
    reference = RealReference(scores, about)
    reference.save(job.folder.path(REFERENCE))
    return job.finish(
        metrics={
            "images": len(reference),
            "threshold": reference.threshold("criterion"),
            "smallest_p": 1 / (len(reference) + 1),
            "file_kinds": images.kinds(),
            "left_out": [*images.skipped(), *scored.lost],
        },
        data={"path": str(options.images[0]), "model": str(options.model)},
    )


@make_job("diffusion detect")
def detect(job: Job, options: DetectOptions) -> Result:
    """Score images, compare them with real ones, and deliver each again in five ways.

    Returns:
        ``verdicts`` by image and their ``counts``; with kinds in folders ``separation`` (kind ->
        ``raw`` and ``matched`` -> statistic -> AUROC and average precision against the real ones);
        ``warnings``, and what was ``left_out``.

    Raises:
        InputError: If the model, the reference or the images cannot be used.
        StateMismatch: If the reference was made with another model or other settings.
    """
    assert options.reference is not None
    with own_random_state(), own_threads(options.threads):
        loaded, detector = _detector(options)
        known = RealReference.load(Path(options.reference) / REFERENCE)
        files = known.about.get("files", "")
        detector.use_reference(
            RealReference(known.scores, {k: v for k, v in known.about.items() if k != "files"})
        )
        images = read_for(loaded, Path(options.images[0]))
        columns = [f"{name}_{score}" for name in ("as_is", *DELIVERIES) for score in _SCORES]
        scored = score_images(job, "scores.csv", columns, images, partial(_delivered, detector))
        criterion = scored.values[:, :: len(_SCORES)]
        p = torch.stack([known.p_values("criterion", c) for c in criterion.unbind(1)], dim=1)
        found = verdicts(p, options.level)
        names = [images.found.names[n] for n in scored.kept]
        table = job.table(
            "verdicts.csv", {"name": str, "verdict": str, **dict.fromkeys(_ways(), float)}
        )
        table.replace([[n, v, *line] for n, v, line in zip(names, found, p.tolist(), strict=True)])
        metrics: dict[str, Any] = {
            "verdicts": dict(zip(names, found, strict=True)),
            "counts": {kind: found.count(kind) for kind in ("real", "generated", "unsure")},
            "level": options.level,
            "real_images": len(known),
            "warnings": _warnings(images, files, len(known), options.level),
            "left_out": [*images.skipped(), *scored.lost],
        }
        kinds = kinds_of(names, options.real)
        if kinds is not None:
            metrics["separation"] = job.stage(
                "separation", partial(_separation, detector, images, scored, kinds, options.real)
            )
    return job.finish(metrics=metrics, data={"images": len(names), "path": str(options.images[0])})


def _detector(
    options: CalibrateOptions | DetectOptions,
) -> tuple[LoadedModel, ManifoldBiasDetector]:
    assert options.model is not None
    loaded = load_model(options.model)
    return loaded, ManifoldBiasDetector(
        loaded.model,
        t=options.time,
        directions=options.directions,
        codec=loaded.codec,
        seed=options.seed,
        batch_size=options.batch_size,
    )


def _numbers(detector: ManifoldBiasDetector, part: Tensor) -> Tensor:
    scores = detector.terms(part).scores()
    return torch.stack([scores[name] for name in _SCORES], dim=1)


def _delivered(detector: ManifoldBiasDetector, part: Tensor) -> Tensor:
    """Numbers of images as they are and delivered again, [B, 6 * 4]."""
    levels = ((part / 2 + 0.5) * 255).round().to(torch.uint8)
    ways = [part]
    delivered = [redeliver(image) for image in levels]
    ways += [torch.stack([d[way] for d in delivered]).float() / 127.5 - 1 for way in DELIVERIES]
    return torch.cat([_numbers(detector, images) for images in ways], dim=1)


def _ways() -> list[str]:
    return [f"p_{way}" for way in ("as_is", *DELIVERIES)]


def _warnings(images: Images, files: str, count: int, level: float) -> list[str]:
    found = []
    if files and files != " ".join(images.kinds()):
        found.append(
            f"the real images are {files} files and these {' '.join(images.kinds())}: a verdict "
            "may be one on file formats"
        )
    if 1 / (count + 1) > level:
        found.append(f"{count} real images are too few for a level of {level:g}: nothing can pass")
    return found


def _separation(
    detector: ManifoldBiasDetector,
    images: Images,
    scored: Scored,
    kinds: dict[str, list[int]],
    real: str,
) -> dict[str, Any]:
    """How well each statistic tells each kind from the real images, as they are and matched."""

    def read(places: list[int]) -> Tensor:
        return torch.cat([images.read(scored.kept[n], scored.kept[n] + 1) for n in places])

    pixels = read(kinds[real])
    raw = scored.values[kinds[real], : len(_SCORES)]
    found: dict[str, Any] = {}
    for kind, places in kinds.items():
        if kind == real:
            continue
        matched = _numbers(detector, match_histogram(read(places), pixels) * 2 - 1)
        found[kind] = {
            name: {
                score: {
                    "auroc": auroc(low, high),
                    "average_precision": average_precision(low, high),
                }
                for score, low, high in zip(_SCORES, raw.unbind(1), values.unbind(1), strict=True)
            }
            for name, values in (
                ("raw", scored.values[places, : len(_SCORES)]),
                ("matched", matched),
            )
        }
    return found
