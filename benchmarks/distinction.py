"""Do distinction maps find what we planted, and is evidence really gone? With Captum's rivals.

    python -m benchmarks.distinction --only cross --threads 1            # about 15 minutes a seed
    python -m benchmarks.distinction --data-root DATA --seeds 3          # everything

Runs `cmd-plugin distinction train` and `evaluate` for each experiment, objective and seed. A row is
written as soon as it is known, so a run that was stopped goes on with the rows that are missing.
Results: ``results/distinction.jsonl``, a table of medians over the seeds with the thresholds that
were set before anything was measured, and ``results/distinction.png`` (examples of the first seed).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import RESULTS, describe_machine
from cmd_plugin.jobs.distinction import evaluate, train
from cmd_plugin.jobs.distinction.options import EvaluateOptions, TrainOptions

# What each experiment is, besides the objective and the seed.
EXPERIMENTS: dict[str, dict[str, Any]] = {
    "cross": {"plant": "cross", "model": "cnn:16"},
    "noise": {"plant": "noise", "model": "cnn:16"},
    "tint": {"plant": "tint", "model": "cnn:16"},
    "control": {"random_labels": True, "model": "cnn:16"},
    "mnist 3 or 8": {
        "data": "mnist",
        "pick": ("3", "8"),
        "image_size": 16,
        "train_limit": 40_000,
        "epochs": 2,
        "classifier_epochs": 5,
    },
    "mnist 4 or 9": {
        "data": "mnist",
        "pick": ("4", "9"),
        "image_size": 16,
        "train_limit": 40_000,
        "epochs": 2,
        "classifier_epochs": 5,
    },
}

# Median over the seeds, and the side it has to be on; those of the specification.
WANTED: dict[tuple[str, str], dict[str, tuple[str, float]]] = {
    ("cross", "dxai_distilled"): {
        "iou": ("at least", 0.85),
        "ncc": ("at least", 0.78),
        "psnr": ("at least", 26.0),
        "judge with": ("at most", 0.10),
        "iou above rivals": ("at least", 0.20),
    },
    ("cross", "distinction"): {"iou": ("at least", 0.85), "ncc": ("at least", 0.75)},
    ("cross", "dxai"): {"iou": ("at least", 0.50), "ncc": ("at least", 0.60)},
    ("noise", "dxai_distilled"): {"signed": ("at least", 0.75)},
    ("tint", "dxai_distilled"): {"cosine": ("at least", 0.9)},
    ("mnist 3 or 8", "dxai_distilled"): {
        "removal": ("at most", 0.62),
        "removal below rivals": ("at least", 0.03),
        "removal by judge": ("at most", 0.62),
        "deletion": ("at most", 0.72),
        "psnr": ("at least", 25.0),
    },
}


def measure(
    experiment: str, objective: str, seed: int, given: argparse.Namespace
) -> dict[str, Any]:
    """Train and evaluate once; the row."""
    settings = dict(EXPERIMENTS[experiment])
    if "data" in settings:
        settings["data_root"] = given.data_root
    options = TrainOptions(**settings, objective=objective, seed=seed, threads=given.threads)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        trained = train.run(options, model)
        asked = EvaluateOptions(model=model, data_root=given.data_root, threads=given.threads)
        found = evaluate.run(asked, None)
        if seed == 0 and experiment == "cross" and objective == "dxai_distilled":
            shutil.copy(model / "examples.png", given.out.with_suffix(".png"))
    config = {name: v for name, v in trained.options.items() if name != "data_root"}
    return {
        "experiment": experiment,
        "objective": objective,
        "seed": seed,
        "config": config,
        "classifier": trained.metrics["classifier"]["accuracy"],
        "judge": trained.metrics["judge"]["accuracy"],
        "found": dict(found.metrics),
        "seconds": {"training": trained.seconds["training"], "evaluation": found.seconds["total"]},
        "machine": describe_machine(),
    }


def summarise(row: dict[str, Any]) -> dict[str, float | None]:
    """The numbers of a row that have a threshold or a column."""
    found, rivals = row["found"], row["found"]["rivals"]
    plant = found["plant"] or {}
    removal = found["auc"]["removal"]
    best_iou = max((r["plant"]["iou"] for r in rivals.values()), default=None) if plant else None
    lowest = min((r["auc"]["removal"]["classifier"] for r in rivals.values()), default=None)
    ours = removal["classifier"]
    return {
        **{name: plant.get(name) for name in ("iou", "ncc", "signed", "cosine")},
        "iou above rivals": None if best_iou is None else plant["iou"] - best_iou,
        "psnr": found["psnr"],
        "judge without": found["judge_accuracy"][0],
        "judge with": found["judge_accuracy"][1],
        "removal": ours,
        "removal by judge": removal["judge"],
        "removal below rivals": None if lowest is None or ours is None else lowest - ours,
        "deletion": found["auc"]["deletion"]["grey"],
        "deletion placed": found["auc"]["deletion"]["grey_normalised"],
        "cout": found["cout"],
    }


def medians(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, float]]:
    """Median over the seeds of each number, by experiment and objective."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in rows:
        place = found.setdefault((row["experiment"], row["objective"]), {})
        for name, value in summarise(row).items():
            if value is not None:
                place.setdefault(name, []).append(value)
    return {
        key: {name: statistics.median(values) for name, values in each.items()}
        for key, each in found.items()
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print medians, and which thresholds were met and which were not."""
    console = Console(width=120, highlight=False, markup=False)
    table = Table(title="Medians over the seeds")
    names = ("iou", "ncc", "signed", "cosine", "psnr", "judge with", "removal", "deletion", "cout")
    for column in ("experiment", "objective", "seeds", *names):
        table.add_column(column)
    known = medians(rows)
    for (experiment, objective), found in known.items():
        seeds = sum((r["experiment"], r["objective"]) == (experiment, objective) for r in rows)
        cells = (f"{found[name]:.3f}" if name in found else "-" for name in names)
        table.add_row(experiment, objective, str(seeds), *cells)
    console.print(table)
    for key, wanted in WANTED.items():
        for name, (side, bound) in wanted.items():
            value = known.get(key, {}).get(name)
            if value is None:
                continue
            met = value >= bound if side == "at least" else value <= bound
            verdict = "met" if met else "MISSED"
            console.print(f"{verdict}: {', '.join(key)}: {name} {value:.3f}, wanted {side} {bound}")


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing, print all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", default=os.environ.get("CMD_PLUGIN_DATA"))
    parser.add_argument("--only", choices=EXPERIMENTS, action="append")
    parser.add_argument("--objective", action="append")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "distinction.jsonl")
    given = parser.parse_args(arguments)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    lines = given.out.read_text().splitlines() if given.out.exists() else []
    rows = [json.loads(line) for line in lines]
    done = {(row["experiment"], row["objective"], row["seed"]) for row in rows}
    for experiment in given.only or EXPERIMENTS:
        if "data" in EXPERIMENTS[experiment] and given.data_root is None:
            print(f"left out {experiment}: say where the data lie by --data-root")
            continue
        for objective in given.objective or ["dxai_distilled"]:
            for seed in range(given.seeds):
                if (experiment, objective, seed) in done:
                    continue
                rows.append(measure(experiment, objective, seed, given))
                with given.out.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(rows[-1], allow_nan=False) + "\n")
    show(rows)


if __name__ == "__main__":
    main()
