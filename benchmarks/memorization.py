"""How well is planted memorisation found, dose by dose? The p-Laplace score beside its controls.

    python -m benchmarks.memorization --threads 1     # digits, 3 seeds, 4 minutes of CPU a seed
    python -m benchmarks.memorization --quick         # one seed, few steps, nothing is written

Runs ``cmd-plugin diffusion train`` with images planted 2 to 32 times, and then ``diffusion
memorization`` on its probes, for each seed. Every statistic sees the same images, noise and
network; AUROC is against held-out images, below .5 a statistic points the wrong way. A row is
written as soon as it is known; seeds that are there are not repeated. Results:
``results/memorization.jsonl``, and ``results/memorization.png`` of the first seed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import RESULTS, describe_machine
from cmd_plugin.jobs.diffusion import memorization, train
from cmd_plugin.jobs.diffusion.options import MemorizationOptions, TrainOptions

DOSES = "20x2,20x4,20x8,20x16,20x32"


def measure(seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Train and score once; the row."""
    fewer = {"steps": 300} if given.quick else {}
    options = TrainOptions(duplicate=DOSES, seed=seed, threads=given.threads, **fewer)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        trained = train.run(options, model)
        asked = MemorizationOptions(model=model, threads=given.threads)
        found = memorization.run(asked, Path(folder, "scores"))
        if seed == 0 and not given.quick:
            shutil.copy(model / "memorization.png", given.out.with_suffix(".png"))
    return {
        "seed": seed,
        "config": dict(trained.options),
        "data": dict(trained.data),
        "trained": dict(trained.metrics),
        "found": dict(found.metrics),
        "seconds": {"training": trained.seconds["training"], "scores": found.seconds["total"]},
        "machine": describe_machine(),
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print mean and spread of the AUROC of each statistic at each dose."""
    first = rows[0]["found"]
    doses = list(next(iter(first["auroc"].values())))
    where = f"at t={first['t'][0]:g}, {len(rows)} seed(s)"
    table = Table(title=f"AUROC against held-out images {where}")
    table.add_column("statistic")
    for dose in doses:
        table.add_column(f"x{dose}", justify="right")
    for name in first["auroc"]:
        cells = []
        for dose in doses:
            values = [row["found"]["auroc"][name][dose] for row in rows]
            spread = f" +/- {stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.3f}{spread}")
        table.add_row(name, *cells)
    Console(width=140, highlight=False).print(table)


def main(arguments: list[str] | None = None) -> None:
    """Run the seeds that are missing from the result file, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small, nothing is written")
    parser.add_argument("--out", type=Path, default=RESULTS / "memorization.jsonl")
    given = parser.parse_args(arguments)
    rows = []
    if given.out.exists() and not given.quick:
        rows = [json.loads(line) for line in given.out.read_text(encoding="utf-8").splitlines()]
    for seed in sorted(set(range(1 if given.quick else given.seeds)) - {r["seed"] for r in rows}):
        rows.append(measure(seed, given))
        if not given.quick:
            with given.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    show(rows)


if __name__ == "__main__":
    main()
