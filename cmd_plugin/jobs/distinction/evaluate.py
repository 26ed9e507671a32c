"""Measure a decomposition beside Captum's attributions, on held-out images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cmd_plugin.distinction import curves
from cmd_plugin.distinction.covariance import class_cosine
from cmd_plugin.distinction.curves import Curve
from cmd_plugin.distinction.decomposition import decompose, distinct_of_every_class
from cmd_plugin.distinction.plants import plant_recovery, plant_remainder
from cmd_plugin.distinction.quality import measure_split
from cmd_plugin.errors import InputError
from cmd_plugin.jobs.distinction.data import SplitData, load_split_data
from cmd_plugin.jobs.distinction.model import TrainedSplit, open_model
from cmd_plugin.jobs.distinction.options import EvaluateOptions
from cmd_plugin.jobs.distinction.rivals import rival_maps
from cmd_plugin.runs import figures
from cmd_plugin.runs.job import Job, make_job
from cmd_plugin.runs.process import find_device, own_random_state, own_threads
from cmd_plugin.runs.result import Result, finite

__all__ = ["run"]

_OURS = "distinction"
_RANDOM = "random"
_MOST_PATCHES = 256  # that the greedy ranking tries at a time
_FILLS = {"grey": curves.fill_grey, "filled": curves.fill_in}


@make_job("distinction evaluate")
def run(job: Job, options: EvaluateOptions) -> Result:
    """Measure a decomposition and its rivals.

    Returns:
        ``plant`` (iou, ncc, signed, cosine, remainder; None without one), ``psnr``,
        ``judge_accuracy`` of each class without the distinct part, ``cout``, ``class_cosine`` (how
        alike the parts for different classes are), areas under curves in ``auc``, the ``rivals``
        with the same, the ``limits`` of deletion, the whole ``split``, and its ``warnings``.

    Raises:
        InputError: If the folder or the data cannot be used.
        MissingDependency: If Captum is not installed and rivals are asked for.
    """
    device = find_device(options.accelerator)
    trained = open_model(options.model).to(device)
    data = load_split_data(trained.options, options.data_root)
    with own_random_state(), own_threads(options.threads):
        found = job.stage("measures", lambda: _measure(job, options, trained, data))
        drawn = found.pop("curves")
        figures.save_figure(_draw(drawn), job.folder.path("curves.png"))
        count = min(options.images, len(data.test))
        about = {"name": data.name, "classes": list(data.classes), "images": count}
        return job.finish(metrics=found, data=about)


def _measure(
    job: Job, options: EvaluateOptions, trained: TrainedSplit, data: SplitData
) -> dict[str, Any]:
    """Everything that is measured, as JSON types."""
    count = min(options.images, len(data.test))
    where = torch.arange(count) * len(data.test) // count
    device = trained.decomposer.pixels.low.device
    images, labels = (part.to(device) for part in data.test.__getitems__(where.tolist()))
    plants = None if data.plants is None else data.plants[where].to(device)
    total = 3.0 + len(options.rival)
    job.report("decomposition", 0, total)
    pixels = trained.decomposer.pixels
    report = measure_split(trained.decomposer, [(images, labels)], trained.judge)
    split = decompose(trained.decomposer, images, labels)
    x, distinct = pixels.to_unit(images), split.distinct / pixels.half_width
    classify, judge = (trained.classify(n) for n in (trained.classifier, trained.judge))
    job.report("rivals", 1, total)
    maps, left_out = rival_maps(classify, x, labels, options.rival, options.seed)
    parts = {_OURS: distinct} | {name: curves.heatmap_part(x, each) for name, each in maps.items()}
    maps = {_OURS: distinct, **maps}
    job.report("limits", 2, total)
    limits = _limits(options, classify, x, labels)
    measured = {}
    for number, (name, each) in enumerate(maps.items()):
        job.report(name, 3 + number, total + 1)
        measured[name] = _measure_map(classify, judge, x, labels, each, parts[name], plants, limits)
    ours = measured.pop(_OURS)
    with torch.no_grad():
        targets = _other_answer(classify(x - distinct), labels)
        cout = curves.counterfactual_transition(classify, x, x - distinct, labels, targets)
    return {
        "plant": ours["plant"],
        "psnr": report.as_dict()["psnr"],
        "judge_accuracy": report.as_dict()["judge_removed"],
        "cout": float(cout.mean()),
        "class_cosine": class_cosine(distinct_of_every_class(trained.decomposer, images)),
        "auc": ours["auc"],
        "rivals": {
            name: {k: v for k, v in r.items() if k != "curves"} for name, r in measured.items()
        },
        "rivals_left_out": left_out,
        "limits": {n: {k: finite(c.area) for k, c in each.items()} for n, each in limits.items()},
        "split": report.as_dict(),
        "warnings": report.warnings(),
        "curves": {name: each["curves"] for name, each in {_OURS: ours, **measured}.items()},
    }


def _measure_map(
    classify: nn.Module,
    judge: nn.Module,
    x: Tensor,
    labels: Tensor,
    maps: Tensor,
    part: Tensor,
    plants: Tensor | None,
    limits: Mapping[str, Mapping[str, Curve]],
) -> dict[str, Any]:
    """What is measured of one explanation."""
    removal = {
        name: curves.removal_curve(network, x, part, labels)
        for name, network in (("classifier", classify), ("judge", judge))
    }
    deletion = {
        name: curves.deletion_curve(classify, x, maps, labels, fill=fill)
        for name, fill in _FILLS.items()
    }
    recovered = None
    if plants is not None:
        recovered = plant_recovery(maps, plants)._asdict()
        recovered["remainder"] = plant_remainder(part, plants)
    placed = {
        f"{name}_normalised": curves.normalised_area(
            curve.area, limits[_RANDOM][name].area, limits["greedy"][name].area
        )
        for name, curve in deletion.items()
    }
    return {
        "plant": recovered,
        "auc": {
            "removal": {name: finite(curve.area) for name, curve in removal.items()},
            "deletion": {name: finite(curve.area) for name, curve in deletion.items()} | placed,
        },
        "curves": {
            "removal": removal["classifier"].accuracy,
            "judge": removal["judge"].accuracy,
            "deletion": deletion["grey"].accuracy,
        },
    }


def _limits(
    options: EvaluateOptions, classify: nn.Module, x: Tensor, labels: Tensor
) -> dict[str, dict[str, Curve]]:
    """Curves of deletion at random, and by the greedy ranking of some of the images."""
    draw = torch.Generator().manual_seed(options.seed)
    at_random = torch.rand(len(x), 1, *x.shape[-2:], generator=draw).to(x.device)
    with torch.no_grad():  # of an image that is answered wrongly there is nothing to learn
        right = classify(x).argmax(dim=1) == labels
    some = (~right).long().argsort(stable=True)[: options.limit_images]
    patch = _patch(x.shape[-2], x.shape[-1])
    found: dict[str, dict[str, Curve]] = {_RANDOM: {}, "greedy": {}}
    for name, fill in _FILLS.items():
        found[_RANDOM][name] = curves.deletion_curve(classify, x, at_random, labels, fill=fill)
        ranking = curves.greedy_ranking(classify, x[some], labels[some], patch=patch, fill=fill)
        found["greedy"][name] = curves.deletion_curve(
            classify, x[some], ranking, labels[some], fill=fill
        )
    return found


def _patch(height: int, width: int) -> int:
    """Smallest side of a patch that divides the image into no more patches than are tried."""
    for side in range(1, min(height, width) + 1):
        fits = height % side == 0 and width % side == 0
        if fits and (height // side) * (width // side) <= _MOST_PATCHES:
            return side
    raise InputError(
        f"{height}x{width} images cannot be divided into at most {_MOST_PATCHES} squares: train on "
        "another --image-size."
    )


def _other_answer(logits: Tensor, labels: Tensor) -> Tensor:
    """The likeliest class that is not the label, [B]."""
    return logits.scatter(1, labels[:, None], -torch.inf).argmax(dim=1)


def _draw(drawn: Mapping[str, Mapping[str, list[float]]]) -> Any:
    """Three panels: removal seen by the classifier and by the judge, and deletion."""
    panels = {
        "removal": (
            "Removal, by the classifier",
            "share of the part taken away",
            curves.REMOVED_SHARES,
        ),
        "judge": ("Removal, by the judge", "share of the part taken away", curves.REMOVED_SHARES),
        "deletion": ("Deletion to grey", "share of pixels deleted", curves.DELETED_SHARES),
    }
    with figures.figure_style():
        figure = figures.new_figure(11.0, 4.2)
        for axes, (kind, (title, label, shares)) in zip(
            figure.subplots(1, 3, sharey=True), panels.items(), strict=True
        ):
            for number, (name, each) in enumerate(drawn.items()):
                wide = 2.4 if name == _OURS else 1.2
                axes.plot(shares, each[kind], color=figures.colour(number), lw=wide, label=name)
            axes.set_title(title)
            axes.set_xlabel(label)
        figure.axes[0].set_ylabel("accuracy")
        figures.legend_below(figure.axes[1], columns=4)
    return figure
