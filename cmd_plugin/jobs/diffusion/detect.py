"""Was an image made by this model? Real images set the scale, re-deliveries test the verdict."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmd_plugin.diffusion import (
    ManifoldBiasDetector,
    RealReference,
    content_statistics,
    match_histogram,
    match_levels,
    redeliver,
    verdicts,
)
from cmd_plugin.diffusion.delivery import DELIVERIES
from cmd_plugin.diffusion.plots import plot_roc
from cmd_plugin.errors import InputError
from cmd_plugin.jobs.diffusion.model import (
    Images,
    LoadedModel,
    kinds_of,
    load_model,
    read_captions,
    read_for,
)
from cmd_plugin.jobs.diffusion.options import CalibrateOptions, DetectOptions
from cmd_plugin.jobs.diffusion.scoring import Scored, score_images
from cmd_plugin.runs.figures import save_figure
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
        given = _conditions(options, loaded, images)
        numbers = partial(_numbers, detector)
        scored = score_images(job, "scores.csv", _SCORES, images, numbers, condition=given)
    if len(scored.kept) < _FEWEST:
        raise InputError(
            f"{len(scored.kept)} real images are too few, since no p-value could get below .05: "
            f"give at least {_FEWEST}."
        )
    scores = dict(zip(_SCORES, scored.values.unbind(1), strict=True))
    about = {**_settings(options, detector), "files": " ".join(images.kinds())}
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
        ``raw``, ``quantised`` to the real images' grey levels, and ``matched`` to how often they
        have each -> statistic -> AUROC and average precision against the real ones) and
        ``control`` (the same AUROC of one half of the real images against the other). Beside the
        detector's statistics stand two of pixels alone. ``warnings``, and what was ``left_out``.

    Raises:
        InputError: If the model, the reference or the images cannot be used.
        StateMismatch: If the reference was made with another model or other settings.
    """
    assert options.reference is not None
    with own_random_state(), own_threads(options.threads):
        loaded, detector = _detector(options)
        known = RealReference.load(Path(options.reference) / REFERENCE)
        files = known.about.get("files", "")
        known.check({**_settings(options, detector), "files": files})
        images = read_for(loaded, Path(options.images[0]))
        columns = [f"{name}_{score}" for name in ("as_is", *DELIVERIES) for score in _SCORES]
        given = _conditions(options, loaded, images)
        numbers = partial(_delivered, detector)
        scored = score_images(job, "scores.csv", columns, images, numbers, condition=given)
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
            shown = _Shown(detector, images, scored, given)
            metrics |= job.stage("separation", partial(_separation, job, shown, kinds, options))
    return job.finish(metrics=metrics, data={"images": len(names), "path": str(options.images[0])})


def _detector(
    options: CalibrateOptions | DetectOptions,
) -> tuple[LoadedModel, ManifoldBiasDetector]:
    assert options.model is not None
    loaded = load_model(options.model, options.accelerator)
    return loaded, ManifoldBiasDetector(
        loaded.model,
        t=options.time,
        directions=options.directions,
        codec=loaded.codec,
        seed=options.seed,
        batch_size=options.batch_size,
    )


def _settings(
    options: CalibrateOptions | DetectOptions, detector: ManifoldBiasDetector
) -> dict[str, str]:
    return {**detector.settings(), "captions": "none" if options.captions is None else "given"}


def _conditions(
    options: CalibrateOptions | DetectOptions, loaded: LoadedModel, images: Images
) -> Callable[[int, int], Tensor] | None:
    """What images are conditioned on: their captions, encoded when they are needed, once each."""
    if options.captions is None:
        return None
    encode = loaded.encode
    if encode is None:
        raise InputError(f"{options.model} takes no prompts: leave --captions out.")
    captions = read_captions(options.captions, images.found.names)
    return lambda start, stop: encode(captions[start:stop])


def _numbers(detector: ManifoldBiasDetector, part: Tensor, condition: Tensor | None) -> Tensor:
    scores = detector.terms(part, condition).scores()
    return torch.stack([scores[name] for name in _SCORES], dim=1)


def _delivered(detector: ManifoldBiasDetector, part: Tensor, condition: Tensor | None) -> Tensor:
    """Numbers of images as they are and delivered again, [B, 6 * 4]."""
    levels = ((part / 2 + 0.5) * 255).round().to(torch.uint8)
    ways = [part]
    delivered = [redeliver(image) for image in levels]
    ways += [torch.stack([d[way] for d in delivered]).float() / 127.5 - 1 for way in DELIVERIES]
    return torch.cat([_numbers(detector, images, condition) for images in ways], dim=1)


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


class _Shown(NamedTuple):
    """Images with what has to be known to score them once more."""

    detector: ManifoldBiasDetector
    images: Images
    scored: Scored
    condition: Callable[[int, int], Tensor] | None

    def pixels(self, places: list[int]) -> Tensor:
        """Images in [0, 1]."""
        kept = [self.scored.kept[n] for n in places]
        return torch.cat([self.images.read(n, n + 1) for n in kept])

    def given(self, places: list[int]) -> Tensor | None:
        """What they are conditioned on."""
        if self.condition is None:
            return None
        kept = [self.scored.kept[n] for n in places]
        return torch.cat([self.condition(n, n + 1) for n in kept])

    def statistics(self, places: list[int], changed: Tensor | None = None) -> dict[str, Tensor]:
        """All statistics of images as they are, or changed to others in [0, 1]."""
        if changed is None:
            values, pixels = self.scored.values[places, : len(_SCORES)], self.pixels(places)
        else:
            pixels = changed
            values = _numbers(self.detector, pixels * 2 - 1, self.given(places))
        own = dict(zip(_SCORES, values.unbind(1), strict=True))
        return own | content_statistics(pixels * 2 - 1)


def _separation(
    job: Job, shown: _Shown, kinds: dict[str, list[int]], options: DetectOptions
) -> dict[str, Any]:
    """How well each statistic tells each kind from the real images, and those from themselves."""
    places = kinds[options.real]
    real, pixels = shown.statistics(places), shown.pixels(places)
    found: dict[str, Any] = {}
    panels: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for kind, others in kinds.items():
        if kind == options.real:
            continue
        made = shown.pixels(others)
        groups = {
            "raw": shown.statistics(others),
            "quantised": shown.statistics(others, match_levels(made, pixels)),
            "matched": shown.statistics(others, match_histogram(made, pixels)),
        }
        found[kind] = {
            group: {
                name: {
                    "auroc": auroc(real[name], values),
                    "average_precision": average_precision(real[name], values),
                }
                for name, values in statistics.items()
            }
            for group, statistics in groups.items()
        }
        panels[f"{kind} above {options.real}"] = {
            group: (real["criterion"], statistics["criterion"])
            for group, statistics in groups.items()
        } | {"norm, raw": (real["norm"], groups["raw"]["norm"])}
    save_figure(plot_roc(panels), job.folder.path("roc.png"))
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(options.seed))
    one, other = order[::2], order[1::2]
    control = {name: auroc(v[one], v[other]) for name, v in real.items()} if len(other) else None
    return {"separation": found, "control": control}
