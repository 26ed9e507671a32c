"""What does the p-Laplace score find of what a diffusion model has memorised, beside its controls?

    python -m benchmarks.memorization --only e1-digits     # 3 seeds, 4 minutes of CPU a seed
    python -m benchmarks.memorization --data-root DATA     # everything; MNIST lies there
    python -m benchmarks.memorization --quick              # one seed, tiny, nothing is kept

- ``e0``: the exact score of a data set, that is of a perfect memoriser; no training.
- ``e1``: images planted 2 to 32 times, found dose by dose in a trained model.
- ``e1b``: the step at which training and held-out images separate (AUROC above .6, and .65;
  constant learning rate) against the number n of training images. Theory: it grows as n, slope 1.

Every statistic sees the same images, noise and network; AUROC is against held-out images, below .5
a statistic points the wrong way. Each experiment and seed can have a process of its own (``--only
e1b-512 --seed 1 --out FILE``; ``--merge FILE...`` collects). A row is written as soon as it is
known; what is there is not repeated. Results: ``results/memorization.jsonl``, what ran on a GPU in
``memorization_cuda.jsonl``, both together in ``memorization.png``.
"""

from __future__ import annotations

import argparse
import csv
import math
import tempfile
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import RESULTS, describe_machine
from benchmarks.rows import add_row_options, measure_missing
from cmd_plugin.diffusion import (
    MemorizationReport,
    MemorizationScore,
    NoiseSchedule,
    ScoreModel,
    separate_doses,
)
from cmd_plugin.jobs.diffusion import memorization, train
from cmd_plugin.jobs.diffusion.data import load_planted
from cmd_plugin.jobs.diffusion.options import MemorizationOptions, TrainOptions
from cmd_plugin.runs.figures import (
    GREY,
    colour,
    figure_style,
    legend_below,
    new_figure,
    save_figure,
)
from cmd_plugin.runs.process import find_device

DOSES = "20x2,20x4,20x8,20x16,20x32"
SIZES = (256, 512, 1024, 2048)
LIMITS = (0.6, 0.65)  # that of MemorizationMonitor, and one further from chance

EXPERIMENTS: dict[str, dict[str, Any]] = {
    "e0-digits": {"duplicate": "20x40", "singles": 800},
    "e0-mnist": {"data": "mnist", "duplicate": "20x100", "singles": 2000},
    "e1-digits": {"duplicate": DOSES},
    "e1-mnist": {"data": "mnist", "duplicate": DOSES, "singles": 4000, "width": 1024},
    "e1-mnist-unet": {
        "data": "mnist",
        "duplicate": DOSES,
        "singles": 1000,
        "model": "unet",
        "lr": 1e-3,
        "steps": 2000,
        "looks": 4,
        "time": (25.0,),
    },
    **{
        f"e1b-{n}": {
            "data": "mnist",
            "image_size": 8,
            "held_out": 1000,
            "singles": n,
            "steps": 3000 + 10 * n,
            # A rate that falls, or a long average, would put a clock of its own into the times.
            "lr_end": 1.0,
            "ema": 0.99,
            "looks": 40,
            "time": (25.0,),
        }
        for n in SIZES
    },
}
E0_TIMES = (10.0, 50.0, 100.0, 200.0, 400.0, 600.0)


def measure(given: argparse.Namespace, experiment: str, seed: int) -> dict[str, Any]:
    """One experiment with one seed: the row."""
    settings = {**EXPERIMENTS[experiment], "seed": seed, "threads": given.threads}
    settings |= {"accelerator": given.accelerator, "data_root": given.data_root}
    if given.quick:
        settings |= {"steps": 100, "looks": 4}
    kind = experiment.partition("-")[0]
    found = {"e0": _exact, "e1": _planted, "e1b": _separated}[kind](TrainOptions(**settings))
    about = {"experiment": experiment, "seed": seed}
    return about | found | {"machine": describe_machine()}


def _exact(options: TrainOptions) -> dict[str, Any]:
    """E0: all statistics of the score that the training set itself has."""
    data = load_planted(options)
    device = find_device(options.accelerator)
    # In float64, and rounded: at low noise the members' values differ in their last digits only.
    images = data.train.store.read(torch.arange(len(data.train))).double() * 2.0 - 1.0
    model = ScoreModel.from_data(images.to(device), NoiseSchedule.linear())
    score = MemorizationScore(model, E0_TIMES, seed=options.seed, batch_size=2048)
    held_out, members = (
        _rounded(score(images.double())) for images in (data.probes.held_out, data.probes.members)
    )
    places = data.probes.each_dose()
    values = {n: v[places[1]] for n, v in members.values.items()}
    once = MemorizationReport(members.times, values, {})
    return {
        "config": {"data": data.name, "duplicate": options.duplicate, "singles": options.singles},
        "found": {
            "times": E0_TIMES,
            "auroc": separate_doses(held_out, members, places),
            "planted above once": {
                name: found[max(places)]
                for name, found in separate_doses(once, members, places).items()
            },
            "p1 of held-out": held_out.values["p1"].mean(0).tolist(),
            "p1 of members": members.values["p1"].mean(0).tolist(),
        },
    }


def _rounded(report: MemorizationReport) -> MemorizationReport:
    values = {name: value.round(decimals=4) for name, value in report.values.items()}
    return MemorizationReport(report.times, values, {})


def _train(options: TrainOptions, folder: Path) -> dict[str, Any]:
    trained = train.run(options, folder)
    return {
        "config": {k: v for k, v in trained.options.items() if k != "data_root"},
        "data": dict(trained.data),
        "trained": dict(trained.metrics),
        "seconds": {"training": trained.seconds["training"]},
    }


def _planted(options: TrainOptions) -> dict[str, Any]:
    """E1: train, then score the probes as ``diffusion memorization`` does."""
    with tempfile.TemporaryDirectory() as folder:
        row = _train(options, Path(folder, "model"))
        asked = MemorizationOptions(
            model=Path(folder, "model"), threads=options.threads, accelerator=options.accelerator
        )
        found = memorization.run(asked, Path(folder, "scores"))
    row["seconds"]["scores"] = found.seconds["total"]
    return row | {"found": dict(found.metrics)}


def _separated(options: TrainOptions) -> dict[str, Any]:
    """E1b: train, and look often; when does each statistic separate?"""
    with tempfile.TemporaryDirectory() as folder:
        row = _train(options, Path(folder))
        with Path(folder, "memorization.csv").open(encoding="utf-8") as stream:
            looks = list(csv.DictReader(stream))
    steps = sorted({int(look["step"]) for look in looks})
    curves = {
        name: [float(look["auroc"]) for look in looks if look["statistic"] == name]
        for name in ("p1", "mse")
    }
    tau = {
        f"{name} > {limit:g}": crossing(steps, curve, limit)
        for name, curve in curves.items()
        for limit in LIMITS
    }
    del row["trained"]["auroc"]
    return row | {"found": {"n": row["data"]["images"], "tau": tau, "steps": steps, **curves}}


def crossing(steps: list[int], curve: list[float], limit: float) -> float | None:
    """Step at which a curve first passes a limit, on the line between two looks; None if never."""
    before = (0.0, 0.5)
    for step, value in zip(steps, curve, strict=True):
        if value > limit:
            return before[0] + (step - before[0]) * (limit - before[1]) / (value - before[1])
        before = (float(step), value)
    return None


def slope(rows: list[dict[str, Any]], statistic: str) -> tuple[float, float, float] | None:
    """Slope of log tau on log n by least squares, half its 95 % interval, and the intercept.

    Of sizes of which every run got there: those that did would be the quick ones.
    """
    from scipy.stats import linregress, t

    points = [(r["found"]["n"], r["found"]["tau"][statistic]) for r in rows]
    late = {n for n, tau in points if tau is None}
    points = [(math.log(n), math.log(tau)) for n, tau in points if n not in late]
    if len(points) < 3 or len({n for n, _ in points}) < 2:
        return None
    fit = linregress(*zip(*points, strict=True))
    half = float(t.ppf(0.975, len(points) - 2)) * float(fit.stderr)
    return float(fit.slope), half, float(fit.intercept)


def show(rows: list[dict[str, Any]]) -> None:
    """Print what was found, a table an experiment."""
    console = Console(width=140, highlight=False, markup=False)
    for experiment in EXPERIMENTS:
        these = [row for row in rows if row["experiment"] == experiment]
        if these and experiment.startswith("e1-"):
            first = these[0]["found"]
            title = f"{experiment}: AUROC against held-out images at t={first['t'][0]:g}"
            console.print(_table(title, these, [row["found"]["auroc"] for row in these]))
        elif these and experiment.startswith("e0-"):
            for dose in these[0]["found"]["auroc"]["p1"]:
                cells = [
                    {
                        n: dict(zip(row["found"]["times"], d[dose], strict=True))
                        for n, d in row["found"]["auroc"].items()
                    }
                    for row in these
                ]
                console.print(_table(f"{experiment}: x{dose} above held out, by t", these, cells))
            cells = [
                {
                    n: dict(zip(row["found"]["times"], values, strict=True))
                    for n, values in row["found"]["planted above once"].items()
                }
                for row in these
            ]
            console.print(_table(f"{experiment}: planted above those seen once", these, cells))
    times = [row for row in rows if row["experiment"].startswith("e1b-")]
    for row in times:
        tau = {k: None if v is None else round(v) for k, v in row["found"]["tau"].items()}
        console.print(f"{row['experiment']} seed {row['seed']}: step of separation {tau}")
    for statistic in times[0]["found"]["tau"] if times else ():
        fit = slope(times, statistic)
        reached = sum(row["found"]["tau"][statistic] is not None for row in times)
        line = "too few" if fit is None else f"slope {fit[0]:.2f} +/- {fit[1]:.2f} (95 %), theory 1"
        console.print(f"{statistic}: reached in {reached} of {len(times)} runs, {line}")


def _table(title: str, rows: list[dict[str, Any]], cells: list[dict[str, Any]]) -> Table:
    table = Table(title=f"{title}, {len(rows)} seed(s)", title_justify="left")
    table.add_column("statistic")
    columns = list(next(iter(cells[0].values())))
    for column in columns:
        table.add_column(str(column), justify="right")
    for name in cells[0]:
        line = []
        for column in columns:
            values = [cell[name][column] for cell in cells]
            spread = f" +/- {stdev(values):.3f}" if len(values) > 1 else ""
            line.append(f"{mean(values):.3f}{spread}")
        table.add_row(name, *line)
    return table


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw AUROC by dose of each trained kind, and the time of separation against n."""
    planted = [name for name in EXPERIMENTS if name.startswith("e1-")]
    panels = [name for name in planted if any(row["experiment"] == name for row in rows)]
    times = [row for row in rows if row["experiment"].startswith("e1b-")]
    if len({row["experiment"] for row in times}) < 2:
        times = []  # one size says nothing of a slope
    count = len(panels) + bool(times)
    if not count:
        return
    with figure_style():
        figure = new_figure(4.2 * count, 4.2)
        axes = list(figure.subplots(1, count, squeeze=False)[0])
        for place, experiment in zip(axes, panels, strict=False):
            _draw_doses(place, experiment, [r for r in rows if r["experiment"] == experiment])
        if times:
            _draw_times(axes[-1], times)
        save_figure(figure, path)


def _draw_doses(axes: Any, experiment: str, rows: list[dict[str, Any]]) -> None:
    for number, name in enumerate(rows[0]["found"]["auroc"]):
        doses = list(rows[0]["found"]["auroc"][name])
        each = [[row["found"]["auroc"][name][dose] for row in rows] for dose in doses]
        x = [int(dose) for dose in doses]
        axes.plot(x, [mean(v) for v in each], color=colour(number), marker="o", ms=3, label=name)
        axes.fill_between(
            x,
            [min(v) for v in each],
            [max(v) for v in each],
            color=colour(number),
            alpha=0.15,
            lw=0,
        )
    axes.axhline(0.5, color=GREY, lw=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(x, map(str, x))
    axes.set(xlabel="times in the training set", ylabel="AUROC against held-out images")
    axes.set_title(f"{experiment}, t = {rows[0]['found']['t'][0]:g}, {len(rows)} seeds (range)")
    legend_below(axes, columns=3)


def _draw_times(axes: Any, rows: list[dict[str, Any]]) -> None:
    for number, statistic in enumerate(rows[0]["found"]["tau"]):
        found = [(r["found"]["n"], r["found"]["tau"][statistic]) for r in rows]
        points = [(n, tau) for n, tau in found if tau is not None]
        if not points:
            continue
        fit, label = slope(rows, statistic), statistic
        if fit:
            label = f"{statistic}: slope {fit[0]:.2f} ± {fit[1]:.2f}"
            ends = [min(n for n, _ in points), max(n for n, _ in points)]
            line = [math.exp(fit[2]) * n ** fit[0] for n in ends]
            axes.plot(ends, line, color=colour(number), lw=1.0)
        x = [n * (0.97 + 0.02 * number) for n, _ in points]  # side by side, not one on the other
        axes.scatter(x, [tau for _, tau in points], color=colour(number), s=14, label=label)
    late = [r["found"] for r in rows if None in r["found"]["tau"].values()]
    if late:
        x, y = [f["n"] for f in late], [f["steps"][-1] for f in late]
        axes.scatter(
            x, y, marker="^", facecolors="none", edgecolors=GREY, label="end of some, unreached"
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(SIZES, map(str, SIZES))
    ends = [int(value).bit_length() for value in axes.get_ylim()]
    axes.set_yticks([2**k for k in range(*ends)], [str(2**k) for k in range(*ends)])
    axes.set(xlabel="training images n", ylabel="first step with such an AUROC")
    axes.set_title("separation against n (theory: slope 1)")
    legend_below(axes, columns=1)


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing from the result file, print all, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", help="e0, e1-digits, e1b-512, ... (repeatable)")
    add_row_options(parser)
    given = parser.parse_args(arguments)
    names = [
        name
        for name in EXPERIMENTS
        if not given.only or any(name == o or name.startswith(f"{o}-") for o in given.only)
    ]
    if not names:
        parser.error(f"--only must be the beginning of one of {', '.join(EXPERIMENTS)}")
    left = [name for name in names if "mnist" in str(EXPERIMENTS[name].get("data"))]
    if given.data_root is None and left and not given.merge:
        print(f"left out {', '.join(left)}: say where MNIST lies by --data-root")
        names = [name for name in names if name not in left]
    device = "" if given.accelerator == "cpu" else "_cuda"
    out = given.out or RESULTS / f"memorization{device}.jsonl"
    # Rows of a CPU and of a GPU have a file each; what is counted in steps is shown together.
    beside = [] if given.out or given.quick else sorted(RESULTS.glob("memorization*.jsonl"))
    seeds = range(given.seeds) if given.seed is None else [given.seed]
    wanted = [(name, seed) for name in names for seed in seeds]
    if given.merge:
        wanted = []
    with tempfile.TemporaryDirectory() as folder:
        if given.quick:
            out = Path(folder, "rows.jsonl")
            wanted = [(name, 0) for name in names if name in ("e0-digits", "e1-digits", "e1b-256")]
        rows = measure_missing(out, wanted, partial(measure, given), given.merge, beside)
        show(rows)
        if given.seed is None:  # one seed is a part of what another process collects
            draw(rows, RESULTS / "memorization.png" if beside else out.with_suffix(".png"))


if __name__ == "__main__":
    main()
