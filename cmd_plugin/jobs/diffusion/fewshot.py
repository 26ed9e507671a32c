"""Few labels: how well they tell a generator that was seen, and those that were not."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmd_plugin.diffusion import (
    FewShotDetector,
    LatentCodec,
    manifold_features,
    match_histogram,
    reconstruction_error,
)
from cmd_plugin.errors import InputError
from cmd_plugin.jobs.diffusion.model import Images, LoadedModel, kinds_of, load_model, read_for
from cmd_plugin.jobs.diffusion.options import FewShotOptions
from cmd_plugin.jobs.diffusion.scoring import score_images
from cmd_plugin.runs.job import Job, make_job
from cmd_plugin.runs.process import own_random_state, own_threads
from cmd_plugin.runs.result import Result
from cmd_plugin.runs.separation import auroc

__all__ = ["run"]

_DETECTOR = "fewshot.safetensors"
_TERMS = ("curvature", "laplacian", "gradient", "bias", "mse")


@make_job("diffusion fewshot")
def run(job: Job, options: FewShotOptions) -> Result:
    """Fit few-shot detectors on one generator at a time, and one on all for later.

    Returns:
        ``seen`` and ``unseen``: labels of each kind -> ``mean`` AUROC, the ``lowest``, and of how
        many tests (None where there are too few images); ``images`` by kind, and what was
        ``left_out``.

    Raises:
        InputError: If model or images cannot be used, or there are no kinds, or none is real.
    """
    assert options.model is not None
    loaded = load_model(options.model, options.accelerator)
    images = read_for(loaded, Path(options.images[0]))
    kinds = kinds_of(images.found.names, options.real)
    if kinds is None:
        raise InputError(
            f"{options.images[0]} has no folder {options.real!r} beside folders of generated "
            "images: sort them, or name the folder of real ones with --real."
        )
    with own_random_state(), own_threads(options.threads):
        shown: Images | Tensor = images
        if options.matched:
            shown = _matched(images, kinds, options.real)
        experts = {"manifold": [f"{term}_t{time:g}" for term in _TERMS for time in options.time]}
        if isinstance(loaded.codec, LatentCodec):
            experts["reconstruction"] = ["reconstruction"]
        columns = [name for names in experts.values() for name in names]
        scored = score_images(
            job,
            "features.csv",
            columns,
            shown,
            partial(_features, loaded, options),
            images.found.names,
        )
        table = {
            expert: scored.values[:, [columns.index(name) for name in names]]
            for expert, names in experts.items()
        }
        spot = {number: row for row, number in enumerate(scored.kept)}
        rows = {k: torch.tensor([spot[n] for n in p if n in spot]) for k, p in kinds.items()}
        found = job.stage("tests", partial(_tests, job, options, table, rows))
        if options.gate == "logistic":  # a forest cannot be kept
            every = torch.cat([places for k, places in rows.items() if k != options.real])
            _fit(options, table, rows[options.real], every).save(job.folder.path(_DETECTOR))
    return job.finish(
        metrics={
            **found,
            "images": {kind: len(places) for kind, places in rows.items()},
            "left_out": [*images.skipped(), *scored.lost],
        },
        data={"path": str(options.images[0]), "model": str(options.model)},
    )


def _features(
    loaded: LoadedModel, options: FewShotOptions, part: Tensor, condition: Tensor | None
) -> Tensor:
    seen = loaded.codec.encode(part)
    parts = [
        manifold_features(
            loaded.model,
            seen,
            options.time,
            directions=options.directions,
            seed=options.seed,
            condition=condition,
            batch_size=options.batch_size,
        )
    ]
    if isinstance(loaded.codec, LatentCodec):
        parts.append(reconstruction_error(loaded.codec, part))
    return torch.cat(parts, dim=1)


def _matched(images: Images, kinds: dict[str, list[int]], real: str) -> Tensor:
    """All images in [-1, 1], each generator's with the real images' grey levels."""
    everything = images.read(0, len(images)) * 2.0 - 1.0
    for kind, places in kinds.items():
        if kind != real:
            everything[places] = match_histogram(everything[places], everything[kinds[real]])
    return everything


def _fit(
    options: FewShotOptions, table: dict[str, Tensor], real: Tensor, generated: Tensor
) -> FewShotDetector:
    both = torch.cat([real, generated])
    labels = torch.cat([torch.zeros(len(real)), torch.ones(len(generated))])
    detector = FewShotDetector(options.gate, seed=options.seed)
    return detector.fit({name: values[both] for name, values in table.items()}, labels)


def _tests(
    job: Job, options: FewShotOptions, table: dict[str, Tensor], rows: dict[str, Tensor]
) -> dict[str, Any]:
    """AUROC on generators seen and unseen, by number of labels."""
    real = rows[options.real]
    generators = {kind: places for kind, places in rows.items() if kind != options.real}
    found: dict[str, dict[str, Any]] = {"seen": {}, "unseen": {}}
    for done, count in enumerate(options.per_class):
        values: dict[str, list[float]] = {"seen": [], "unseen": []}
        for draw in range(options.draws):
            generator = torch.Generator().manual_seed(options.seed * 1000 + draw)
            mixed = real[torch.randperm(len(real), generator=generator)]
            for kind, places in generators.items():
                own = places[torch.randperm(len(places), generator=generator)]
                # Some must be left to test on.
                if min(len(mixed), len(own)) < count + 5:
                    continue
                detector = _fit(options, table, mixed[:count], own[:count])
                low = _say(detector, table, mixed[count:])
                values["seen"].append(auroc(low, _say(detector, table, own[count:])))
                values["unseen"] += [
                    auroc(low, _say(detector, table, others))
                    for other, others in generators.items()
                    if other != kind
                ]
        for name, numbers in values.items():
            found[name][str(count)] = (
                {
                    "mean": sum(numbers) / len(numbers),
                    "lowest": min(numbers),
                    "tests": len(numbers),
                }
                if numbers
                else None
            )
        job.report("tests", done + 1, len(options.per_class))
    return found


def _say(detector: FewShotDetector, table: dict[str, Tensor], rows: Tensor) -> Tensor:
    return detector.probability({name: values[rows] for name, values in table.items()})
