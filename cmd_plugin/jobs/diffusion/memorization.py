"""Which images a diffusion model has memorised: the probes it came with, a folder, or a set."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmd_plugin.diffusion import (
    MemorizationReport,
    MemorizationScore,
    infer_membership,
    membership_power,
    refuse_unlike,
    separate,
    separate_doses,
)
from cmd_plugin.diffusion.plots import plot_contact_sheet, plot_roc
from cmd_plugin.errors import InputError
from cmd_plugin.jobs.diffusion.model import Images, LoadedModel, load_model, read_for
from cmd_plugin.jobs.diffusion.options import MemorizationOptions
from cmd_plugin.jobs.diffusion.scoring import Scored, score_images
from cmd_plugin.runs.figures import save_figure
from cmd_plugin.runs.job import Job, make_job
from cmd_plugin.runs.process import own_random_state, own_threads
from cmd_plugin.runs.result import Result
from cmd_plugin.runs.separation import chance_band

__all__ = ["run"]

_SHOWN = 16
_POWER = (10, 30, 70)


@make_job("diffusion memorization")
def run(job: Job, options: MemorizationOptions) -> Result:
    """Score images, and write scores.csv (probes.csv, or suspects.csv and controls.csv).

    Returns:
        Of probes ``auroc`` at the first time (statistic -> dose -> AUROC against held-out images),
        ``auroc_by_time``, the mean ``standard_error`` of each p-Laplace score, and ``pairs`` (two
        of members, held-out images and the model's own samples -> statistic -> AUROC at the first
        time), of which ``alike`` names those that differ by no more than chance. Of a folder the
        ``most_memorised`` and what was ``left_out``. Of suspects ``p_value``, ``auroc``, ``power``
        by number of images, ``pixel_auroc`` and ``file_kinds``. Always ``t`` and ``directions``.

    Raises:
        InputError: If the model or the images cannot be used, or suspects and controls are told
            apart by their pixels alone.
    """
    assert options.model is not None
    loaded = load_model(options.model, options.accelerator)
    score = MemorizationScore(
        loaded.model,
        options.time,
        directions=options.directions,
        codec=loaded.codec,
        seed=options.seed,
        batch_size=options.batch_size,
    )
    with own_random_state(), own_threads(options.threads):
        if options.suspects is not None and options.controls is not None:
            found, data = _of_sets(job, options, loaded, score)
        elif options.images:
            found, data = _of_folder(job, Path(options.images[0]), loaded, score)
        else:
            found, data = _of_probes(job, options, loaded, score)
    about = {"t": list(options.time), "directions": options.directions}
    return job.finish(metrics={**found, **about}, data=data)


def _of_probes(
    job: Job, options: MemorizationOptions, loaded: LoadedModel, score: MemorizationScore
) -> tuple[dict[str, Any], dict[str, Any]]:
    probes = loaded.probes
    if probes is None:
        raise InputError(
            f"{options.model} has no probes of its own: give IMAGES, or --suspects and --controls."
        )
    assert probes.doses is not None
    # From what should look least memorised to what should look most.
    parts = {"held_out": probes.held_out}
    if options.samples:
        parts["samples"] = loaded.sample(
            options.samples, options.seed, batch_size=options.batch_size
        )
    parts["members"] = probes.members
    reports = {
        name: _scored(job, f"{name}.csv", score, images)[0] for name, images in parts.items()
    }
    members, held_out = reports["members"], reports["held_out"]
    by_dose = separate_doses(held_out, members, probes.each_dose())
    rows = [
        _sheet_row("members", probes.members, members, probes.doses),
        _sheet_row("held out", probes.held_out, held_out, None),
    ]
    save_figure(
        plot_contact_sheet(rows, f"highest p1 at t = {options.time[0]:g}"),
        job.folder.path("memorised.png"),
    )
    save_figure(
        plot_roc(
            {
                f"members above held out, t = {time:g}": {
                    name: (held_out.evidence(name)[:, n], members.evidence(name)[:, n])
                    for name in members.values
                }
                for n, time in enumerate(options.time)
            }
        ),
        job.folder.path("roc.png"),
    )
    pairs, alike = _pairs(reports)
    return {
        "auroc": _first(by_dose),
        "auroc_by_time": {
            f"{time:g}": _first(by_dose, number) for number, time in enumerate(options.time)
        },
        "standard_error": {
            name: float(values[:, 0].mean()) for name, values in members.standard_error.items()
        },
        "pairs": pairs,
        "alike": alike,
    }, {**{name: len(report) for name, report in reports.items()}, "model": str(options.model)}


def _pairs(
    reports: dict[str, MemorizationReport],
) -> tuple[dict[str, dict[str, float]], dict[str, list[str]]]:
    """AUROC of each pair of groups at the first time, and which statistics see no difference."""
    pairs, alike = {}, {}
    for low, high in itertools.combinations(reports, 2):
        found = separate(reports[low], reports[high])["auroc"]
        first = {name: values[0] for name, values in found.items()}
        band = chance_band(len(reports[low]), len(reports[high]))
        pairs[f"{high} above {low}"] = first
        alike[f"{high} above {low}"] = [n for n, v in first.items() if abs(v - 0.5) <= band]
    return pairs, alike


def _of_folder(
    job: Job, path: Path, loaded: LoadedModel, score: MemorizationScore
) -> tuple[dict[str, Any], dict[str, Any]]:
    images = read_for(loaded, path)
    report, (_, kept, lost) = _scored(job, "scores.csv", score, images)
    headline = report.evidence("p1")[:, 0]
    top = headline.argsort(descending=True, stable=True)[:_SHOWN].tolist()
    shown = torch.cat([images.read(kept[n], kept[n] + 1) for n in top]) * 2.0 - 1.0
    captions = [f"{float(headline[n]):.3f}" for n in top]
    half = (len(top) + 1) // 2
    rows = [("", shown[part], captions[part]) for part in (slice(half), slice(half, None))]
    save_figure(
        plot_contact_sheet([row for row in rows if len(row[1])], "highest p1"),
        job.folder.path("memorised.png"),
    )
    names = images.found.names
    return {
        "most_memorised": {names[kept[n]]: float(headline[n]) for n in top},
        "left_out": [*images.skipped(), *lost],
    }, {"images": len(report), "path": str(path)}


def _of_sets(
    job: Job, options: MemorizationOptions, loaded: LoadedModel, score: MemorizationScore
) -> tuple[dict[str, Any], dict[str, Any]]:
    assert options.suspects is not None
    assert options.controls is not None
    sets = {
        "suspects": read_for(loaded, Path(options.suspects)),
        "controls": read_for(loaded, Path(options.controls)),
    }
    # Before anything is scored: what this refuses, no score can mend.
    pixels = refuse_unlike(
        *(images.read(0, len(images)) for images in sets.values()), seed=options.seed
    )
    features: dict[str, Tensor] = {}
    left_out: list[str] = []
    for name, images in sets.items():
        report, scored = _scored(job, f"{name}.csv", score, images)
        features[name] = report.features()
        left_out += [*images.skipped(), *scored.lost]
    job.report("test", 0, 2)
    suspects, controls = features["suspects"], features["controls"]
    test = infer_membership(
        suspects, controls, permutations=options.permutations, seed=options.seed
    )
    job.report("test", 1, 2)
    power = membership_power(suspects, controls, _POWER, seed=options.seed)
    job.report("test", 2, 2)
    return {
        "p_value": test.p_value,
        "auroc": test.auroc,
        "power": {str(size): rate for size, rate in power.items()},
        "pixel_auroc": pixels,
        "file_kinds": {name: images.kinds() for name, images in sets.items()},
        "left_out": left_out,
    }, {"suspects": test.suspects, "controls": test.controls}


def _scored(
    job: Job, table: str, score: MemorizationScore, images: Images | Tensor
) -> tuple[MemorizationReport, Scored]:
    columns = _columns(score)

    def numbers(part: Tensor, condition: Tensor | None) -> Tensor:
        report = score(part, condition)
        return torch.cat([*report.values.values(), *report.standard_error.values()], dim=1)

    scored = score_images(job, table, columns, images, numbers)
    return _as_report(score, scored.values, columns), scored


def _columns(score: MemorizationScore) -> list[str]:
    powers = [f"p{power:g}" for power in score.powers]
    names = [*powers, *score.controls, *(f"{name}_error" for name in powers)]
    return [f"{name}_t{time:g}" for name in names for time in score.times]


def _as_report(score: MemorizationScore, values: Tensor, columns: list[str]) -> MemorizationReport:
    count = len(score.times)
    tables: Mapping[str, Tensor] = {
        columns[n].rpartition("_t")[0]: values[:, n : n + count]
        for n in range(0, len(columns), count)
    }
    errors = {n.removesuffix("_error"): v for n, v in tables.items() if n.endswith("_error")}
    return MemorizationReport(
        score.times, {n: v for n, v in tables.items() if not n.endswith("_error")}, errors
    )


def _first(by_dose: dict[str, dict[int, list[float]]], number: int = 0) -> dict[str, Any]:
    return {
        name: {str(dose): values[number] for dose, values in doses.items()}
        for name, doses in by_dose.items()
    }


def _sheet_row(
    name: str, images: Tensor, report: MemorizationReport, doses: Tensor | None
) -> tuple[str, Tensor, list[str]]:
    values = report.evidence("p1")[:, 0]
    top = values.argsort(descending=True, stable=True)[: _SHOWN // 2]
    captions = [
        f"{float(values[n]):.3f}" + ("" if doses is None else f" x{int(doses[n])}") for n in top
    ]
    return name, images[top], captions
