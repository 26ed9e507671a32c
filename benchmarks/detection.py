"""Is an image a model's own? The manifold-bias statistics against everything that could fool them.

    python -m benchmarks.detection --only digits          # 3 seeds, 5 minutes of CPU a seed
    python -m benchmarks.detection --data-root DATA       # MNIST too: a UNet, for a GPU
    python -m benchmarks.detection --quick                # one seed, tiny, nothing is kept

For each seed a model is trained, and another of another seed on other images. Images the first made
(by DDIM and by DDPM steps), images the other made, and training images are each compared with
held-out real ones, at several noise levels, as they are (rounded to 8 bits), quantised to the grey
levels of the real images, and with their histogram matched: only what survives that is said of the
picture and not of its contrast. Beside them: the norm, the total variation and the distance to the
nearest training image, which need no model, one half of the real images against the other, and a
few-shot detector on generators it has seen and others. AUROC below .5 is not turned round.

Each experiment and seed can have a process of its own (``--only digits --seed 1 --out FILE``;
``--merge FILE...`` collects). Results: ``results/detection.jsonl``, what ran on a GPU in
``detection_cuda.jsonl``, both together in ``detection.png``.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.machine import RESULTS, describe_machine
from benchmarks.rows import add_row_options, measure_missing
from cmd_plugin.diffusion import (
    ManifoldBiasDetector,
    content_statistics,
    match_histogram,
    match_levels,
    nearest_distance,
)
from cmd_plugin.jobs.diffusion import fewshot, train
from cmd_plugin.jobs.diffusion.data import load_planted
from cmd_plugin.jobs.diffusion.model import LoadedModel, load_model
from cmd_plugin.jobs.diffusion.options import FewShotOptions, TrainOptions
from cmd_plugin.runs.figures import (
    GREY,
    colour,
    figure_style,
    new_figure,
    save_figure,
)
from cmd_plugin.runs.separation import auroc

EXPERIMENTS: dict[str, dict[str, Any]] = {
    "digits": {"singles": 900},
    "mnist": {
        "data": "mnist",
        "singles": 4000,
        "model": "unet",
        "lr": 1e-3,
        "steps": 2000,
    },
}
TIMES = (10, 100, 300, 600)
VARIANTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "raw": lambda images, _: images,
    "quantised": match_levels,
    "matched": match_histogram,
}


def measure(given: argparse.Namespace, experiment: str, seed: int) -> dict[str, Any]:
    """One experiment with one seed: the row."""
    settings = {**EXPERIMENTS[experiment], "threads": given.threads, "looks": 0}
    settings |= {"accelerator": given.accelerator, "data_root": given.data_root}
    if given.quick:
        settings |= {"steps": 100, "model": "mlp"}
    count = 40 if given.quick else 400
    options = TrainOptions(**settings, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        trained = train.run(options, Path(folder, "own"))
        train.run(TrainOptions(**settings, seed=seed + 1000), Path(folder, "other"))
        own, other = (load_model(Path(folder, n), given.accelerator) for n in ("own", "other"))
        kinds = {
            "own, DDIM": own.sample(count, seed),
            "own, DDPM": own.sample(count, seed, steps=50 if given.quick else 250, eta=1.0),
            "other, DDIM": other.sample(count, seed),
            "members": own.probes.members,
        }
        data = load_planted(options)
        known = data.train.store.read(torch.arange(len(data.train))) * 2.0 - 1.0
        real = own.probes.held_out
        found = _zero_shot(own, real, kinds, known, seed)
        generators = {"ddim": kinds["own, DDIM"], "other": kinds["other, DDIM"]}
        labels = _few_shot(Path(folder), {"real": real, **generators}, options)
    return {
        "experiment": experiment,
        "seed": seed,
        "config": {k: v for k, v in trained.options.items() if k != "data_root"},
        "images": {"real": len(real)} | {name: len(images) for name, images in kinds.items()},
        "found": found,
        "few_shot": labels,
        "seconds": {"training": trained.seconds["training"]},
        "machine": describe_machine(),
    }


def _zero_shot(
    own: LoadedModel, real: Tensor, kinds: dict[str, Tensor], known: Tensor, seed: int
) -> dict[str, Any]:
    """Kind -> variant -> statistic (with its time) -> AUROC against the real images."""
    detectors = {t: ManifoldBiasDetector(own.model, t=t, batch_size=2048) for t in TIMES}

    def statistics(images: Tensor) -> dict[str, Tensor]:
        scores = {
            f"{name} t={t}": values
            for t, detector in detectors.items()
            for name, values in detector.terms(images).scores().items()
        }
        return scores | content_statistics(images) | {"nearest": nearest_distance(images, known)}

    low = statistics(real)
    found: dict[str, Any] = {}
    for kind, images in kinds.items():
        found[kind] = {}
        for variant, change in VARIANTS.items():
            high = statistics(change(images, real))
            found[kind][variant] = {name: auroc(low[name], high[name]) for name in low}
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))
    half, rest = order[::2], order[1::2]
    found["real halves"] = {"raw": {n: auroc(v[half], v[rest]) for n, v in low.items()}}
    return found


def _few_shot(folder: Path, kinds: dict[str, Tensor], options: TrainOptions) -> dict[str, Any]:
    """What ``diffusion fewshot`` finds in folders of pictures, as they are and matched."""
    from PIL import Image

    for kind, images in kinds.items():
        place = folder / "kinds" / kind
        place.mkdir(parents=True)
        for number, image in enumerate(images):
            levels = ((image[0] + 1.0) * 127.5).round().byte().numpy()
            Image.fromarray(levels).save(place / f"{number:04d}.png")
    few = min(len(images) for images in kinds.values())
    found = {}
    for name, matched in (("raw", False), ("matched", True)):
        asked = FewShotOptions(
            images=(folder / "kinds",),
            model=folder / "own",
            matched=matched,
            per_class=tuple(n for n in (5, 25, 100) if n + 5 <= few),
            threads=options.threads,
            accelerator=options.accelerator,
        )
        result = fewshot.run(asked, folder / name)
        found[name] = {group: result.metrics[group] for group in ("seen", "unseen")}
    return found


def collect(rows: list[dict[str, Any]], kind: str, variant: str, statistic: str) -> list[float]:
    """AUROC of each seed."""
    return [row["found"][kind][variant][statistic] for row in rows]


def show(rows: list[dict[str, Any]]) -> None:
    """Print mean and spread over the seeds, a table an experiment and kind."""
    console = Console(width=140, highlight=False, markup=False)
    for experiment in EXPERIMENTS:
        these = [row for row in rows if row["experiment"] == experiment]
        for kind in these[0]["found"] if these else ():
            title = f"{experiment}, {kind} above real: AUROC of {len(these)} seed(s)"
            table = Table(title=title, title_justify="left")
            variants = these[0]["found"][kind]
            for heading in ("statistic", *variants):
                table.add_column(heading, justify="right")
            for name in variants["raw"]:
                table.add_row(name, *(_cell(collect(these, kind, v, name)) for v in variants))
            console.print(table)
        for variant in ("raw", "matched") if these else ():
            for group in ("seen", "unseen"):
                found = [row["few_shot"][variant][group] for row in these]
                cells = [
                    f"{labels} labels {_cell([one[labels]['mean'] for one in found])}"
                    for labels in found[0]
                ]
                console.print(f"{experiment}, few-shot, {variant}, {group}: {', '.join(cells)}")


def _cell(values: list[float]) -> str:
    spread = f" +/- {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread}"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the AUROC of images the model made, raw and matched, with all controls."""
    experiments = [e for e in EXPERIMENTS if any(row["experiment"] == e for row in rows)]
    if not experiments:
        return
    with figure_style():
        figure = new_figure(11.0, 4.4 * len(experiments))
        grid = figure.subplots(len(experiments), 1, squeeze=False)
        for axes, experiment in zip(grid[:, 0], experiments, strict=True):
            _draw(axes, experiment, [r for r in rows if r["experiment"] == experiment])
        save_figure(figure, path)


def _draw(axes: Any, experiment: str, rows: list[dict[str, Any]]) -> None:
    kind = "own, DDIM"
    names = list(rows[0]["found"][kind]["raw"])
    series = [(kind, variant, variant) for variant in VARIANTS]
    series.append(("real halves", "raw", "real against real"))
    for number, (group, variant, label) in enumerate(series):
        each = [collect(rows, group, variant, name) for name in names]
        middles = [mean(v) for v in each]
        down = [m - min(v) for m, v in zip(middles, each, strict=True)]
        up = [max(v) - m for m, v in zip(middles, each, strict=True)]
        x = [place + (number - 1.5) * 0.16 for place in range(len(names))]
        tint = colour(number) if group == kind else GREY
        axes.errorbar(x, middles, [down, up], fmt="o", ms=4, lw=1.0, color=tint, label=label)
    for place in range(1, len(names)):
        axes.axvline(place - 0.5, color=GREY, lw=0.3)
    axes.axhline(0.5, color=GREY, lw=0.8)
    axes.set(ylim=(-0.02, 1.02), xlim=(-0.5, len(names) - 0.5), ylabel="AUROC above real images")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    axes.set_title(f"{experiment}: images the model made, {len(rows)} seed(s), mean and range")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing from the result file, print all, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=EXPERIMENTS, action="append")
    add_row_options(parser)
    given = parser.parse_args(arguments)
    names = given.only or list(EXPERIMENTS)
    if given.data_root is None and "mnist" in names and not given.merge:
        print("left out mnist: say where it lies by --data-root")
        names = [name for name in names if name != "mnist"]
    device = "" if given.accelerator == "cpu" else "_cuda"
    out = given.out or RESULTS / f"detection{device}.jsonl"
    # Rows of a CPU and of a GPU have a file each; what is counted in steps is shown together.
    beside = [] if given.out or given.quick else sorted(RESULTS.glob("detection*.jsonl"))
    seeds = range(given.seeds) if given.seed is None else [given.seed]
    wanted = [] if given.merge else [(name, seed) for name in names for seed in seeds]
    with tempfile.TemporaryDirectory() as folder:
        if given.quick:
            out, wanted = Path(folder, "rows.jsonl"), [("digits", 0)]
        rows = measure_missing(out, wanted, partial(measure, given), given.merge, beside)
        show(rows)
        if given.seed is None:  # one seed is a part of what another process collects
            draw(rows, RESULTS / "detection.png" if beside else out.with_suffix(".png"))


if __name__ == "__main__":
    main()
