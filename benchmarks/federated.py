"""Accuracy against bytes: CMD beside FedAvg, APF, top-k, FedPAQ, EDEN and adapters, on Flower.

    python -m benchmarks.federated --quick                     # digits, one seed, some minutes
    python -m benchmarks.federated --data-root DATA            # all of it, about 3 CPU hours
    python -m benchmarks.federated --report                    # what is in the result file
    python -m benchmarks.federated --data-root DATA --only cifar10 --partition iid --seed 2 \
        --method "EDEN 1 bit" --new some.jsonl                 # one run, for many side by side
    python -m benchmarks.federated --merge *.jsonl --report    # put such rows into the result file

The schedule of CMD (F, L, P, M, pooling, projection) is searched on seed 0 of CIFAR-10 IID alone:
the most accurate one within 40 % of FedAvg's bytes, with 8-bit values within 12 %, with EDEN's
within 6 %; so are rank, scale and rate of low-rank adapters, within 6 %. Everything is reported on
other seeds. Bytes are those of Flower's serialised messages, up and down, over all clients.
Accuracy is the mean over the last five rounds. Rows are appended to ``results/federated.jsonl`` as
runs end; a run that is there is not repeated.

The problems are small on purpose, so that two cores finish: 1000 training images at 16x16 pixels
(CIFAR-10) or 14x14 (MNIST) over 10 clients, a network of 15 thousand weights, 40 rounds of three
local epochs. In one more, 5000 images lie with 100 clients, of which 10 take part in each of 60
rounds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.progress import Progress

from benchmarks.federated_report import LAST, draw, share, table
from benchmarks.machine import RESULTS, describe_machine
from cmd_plugin.jobs.federated import SimulateOptions, simulate

COMMON: dict[str, Any] = {
    "model": "cnn:16",
    "clients": 10,
    "rounds": 40,
    "local_epochs": 3,
    "batch_size": 20,
}
PROBLEMS: dict[str, dict[str, Any]] = {
    "cifar10": {**COMMON, "data": "cifar10", "image_size": 16, "lr": 0.1},
    "mnist": {**COMMON, "data": "mnist", "image_size": 14, "lr": 0.1},
}
LIMITS = {"train_limit": 1000, "test_limit": 2000}
PARTITIONS = ("iid", "dirichlet:0.3")
MANY = {
    **PROBLEMS["cifar10"],
    **LIMITS,
    "partition": "dirichlet:0.3",
    "clients": 100,
    "fraction": 0.1,
    "rounds": 60,
    "train_limit": 5000,
}
MANY_NAME = "cifar10, 10 of 100 clients, dirichlet:0.3"
QUICK = {"data": "digits", "model": "cnn", "clients": 4, "rounds": 16}

# What a schedule does not say is as in the paper, not as in the command's defaults.
PAPER = {"relative": False, "project": "epoch", "pool": False, "coding": "linear"}

# What the search chooses from; the first is the paper's method, without pooling, ten modes.
_POOLED = {"modes": 250, "pool": True}
_STEPS = {**_POOLED, "project": "step", "relative": True}
SCHEDULES: tuple[dict[str, Any], ...] = (
    {"warmup": 4, "modes": 10, "embed_every": 2, "embed_percent": 10.0},
    {"warmup": 4, "modes": 10, "embed_every": 2, "embed_percent": 10.0, "pool": True},
    {**_POOLED, "warmup": 4, "embed_every": 2, "embed_percent": 10.0},
    {**_POOLED, "warmup": 4, "embed_every": 2, "embed_percent": 20.0, "relative": True},
    {**_STEPS, "warmup": 4, "embed_every": 2, "embed_percent": 20.0},
    {**_STEPS, "warmup": 4, "embed_every": 2, "embed_percent": 30.0},
    {**_STEPS, "warmup": 6, "embed_every": 1, "embed_percent": 30.0},
    {**_STEPS, "warmup": 8, "embed_every": 1, "embed_percent": 25.0},
    {**_STEPS, "warmup": 8, "embed_every": 1, "embed_percent": 40.0},
    {**_STEPS, "warmup": 10, "embed_every": 1, "embed_percent": 60.0},
)

# The same with 8-bit values, where the rounds before the first event weigh more.
SCHEDULES_8_BIT: tuple[dict[str, Any], ...] = tuple(
    {**_STEPS, "embed_every": 1, "bits": 8, "warmup": warmup, "embed_percent": percent}
    for warmup, percent in ((7, 30.0), (8, 25.0), (8, 30.0), (8, 40.0))
)

# Of these the better with two bits is taken; with one bit it is the same.
SCHEDULES_EDEN: tuple[dict[str, Any], ...] = tuple(
    {**_STEPS, "embed_every": 1, "coding": "eden", "bits": bits, "warmup": warmup} | percent
    for bits, warmup, percent in (
        (2, 8, {"embed_percent": 25.0}),
        (2, 8, {"embed_percent": 40.0}),
        (2, 11, {"embed_percent": 30.0}),
    )
)

# Low-rank adapters from scratch, 8 bits both ways: their rate and scale are searched alike.
ADAPTERS: tuple[dict[str, Any], ...] = tuple(
    {"method": "eden", "bits": 8, "adapters": rank, "adapter_scale": scale, "lr": lr}
    for rank, scale, lr in product((2, 4), (2.0, 8.0), (0.1, 0.3))
)

BASELINES: dict[str, dict[str, Any]] = {
    "FedAvg": {"method": "fedavg"},
    "APF": {"method": "apf"},
    "A-APF": {"method": "a-apf"},
    "top-k 10 %": {"method": "topk", "topk": 0.1},
    "FedPAQ 8 bit": {"method": "fedpaq", "bits": 8},
    "EDEN 2 bit": {"method": "eden", "bits": 2},
    "EDEN 1 bit": {"method": "eden", "bits": 1},
}
IN_MANY = ("FedAvg", "top-k 10 %", "FedPAQ 8 bit", "EDEN 1 bit")
"""Baselines on the problem with many clients; CMD has its quantised schedules there."""


def methods(
    schedule: dict[str, Any],
    quantised: dict[str, Any],
    rotated: dict[str, Any],
    adapters: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """Return the options of every row of the tables, for the schedules the search chose."""
    paper = SCHEDULES[0]
    absolute = {"relative": False, "embed_percent": 10.0}
    return {
        **BASELINES,
        "low-rank adapters, 8 bit": adapters,
        "CMD, paper": {"method": "cmd", **paper},
        "CMD, paper, tie": {"method": "cmd", **paper, "project": "tie"},
        "CMD absolute": {"method": "cmd", **schedule, **absolute},
        "CMD relative": {"method": "cmd", **schedule},
        "CMD, paper, tie, 8 bit": {"method": "cmd", **paper, "project": "tie", "bits": 8},
        "CMD absolute, 8 bit": {"method": "cmd", **quantised, **absolute},
        "CMD relative, 8 bit": {"method": "cmd", **quantised},
        "CMD relative, EDEN 2 bit": {"method": "cmd", **rotated},
        "CMD relative, EDEN 1 bit": {"method": "cmd", **rotated, "bits": 1},
    }


def methods_for_many(quantised: dict[str, Any], rotated: dict[str, Any]) -> dict[str, Any]:
    """Return the options of the rows with many clients: half as many rounds more of everything."""
    longer = {"warmup": round(1.5 * quantised["warmup"])}
    return {
        **{name: BASELINES[name] for name in IN_MANY},
        "CMD relative, 8 bit": {"method": "cmd", **quantised, **longer},
        "CMD relative, EDEN 2 bit": {"method": "cmd", **rotated, **longer},
    }


def run_once(options: dict[str, Any], seed: int, data_root: str | None) -> dict[str, Any]:
    """Train once; the row of the result file."""
    if options["method"] == "cmd":
        options = {**PAPER, **options}
    result = simulate.run(SimulateOptions(**options, seed=seed, data_root=data_root), None)
    summary, rounds = result.metrics, result.metrics["rounds"]
    return {
        "accuracy": mean(r["accuracy"] for r in rounds[-LAST:]),
        "bytes_up": summary["bytes_up"],
        "bytes_down": summary["bytes_down"],
        "mask_bytes": summary["mask_bytes"],
        "fedavg_bytes": summary["fedavg_bytes"],
        "embedded_fraction": summary["embedded_fraction"],
        "parameters": summary["parameters"],
        "data": result.data["name"],
        "seconds": round(result.seconds["total"], 1),
        "curve": [
            [round(r["accuracy"], 4), r["bytes_up"] + r["bytes_down"], r["fedavg_bytes"]]
            for r in rounds
        ],
    }


class Results:
    """The rows of the result file: each is run once.

    Args:
        path: The file; None keeps nothing.
        data_root: Folder of data sets.
        new: File for new rows, if not the same one.
    """

    def __init__(self, path: Path | None, data_root: str | None, new: Path | None = None) -> None:
        self.path, self.data_root = new or path, data_root
        self.rows = read_rows(path) + ([] if new is None else read_rows(new))

    def merge(self, path: Path) -> None:
        """Append the rows of another file that are not there."""
        for row in read_rows(path):
            if self.find(row["kind"], row["method"], row["options"], row["seed"]) is None:
                self.add(row)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row."""
        self.rows.append(row)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def find(
        self, kind: str, method: str, options: dict[str, Any], seed: int
    ) -> dict[str, Any] | None:
        """Return a row, None if it is not there."""
        wanted = (kind, method, options, seed)
        for row in self.rows:
            if (row["kind"], row["method"], row["options"], row["seed"]) == wanted:
                return row
        return None

    def get(self, kind: str, method: str, options: dict[str, Any], seed: int) -> dict[str, Any]:
        """Return a row, running it first if it is not there."""
        row = self.find(kind, method, options, seed)
        if row is not None:
            return row
        row = {"kind": kind, "method": method, "seed": seed, "options": options}
        row |= run_once(options, seed, self.data_root)
        row["machine"] = describe_machine()
        self.add(row)
        return row


def read_rows(path: Path | None) -> list[dict[str, Any]]:
    """Return the rows of a file, none if it is not there."""
    lines = path.read_text().splitlines() if path is not None and path.exists() else []
    return [json.loads(line) for line in lines]


def search(
    results: Results,
    problem: dict[str, Any],
    schedules: Sequence[dict[str, Any]],
    budget: float,
    *,
    run: bool = True,
) -> dict[str, Any]:
    """Choose on seed 0: the most accurate schedule within a share of FedAvg's bytes.

    Without ``run`` it is chosen of those that were tried; the first if none was.
    """
    affordable = []
    for schedule in schedules:
        name = "adapters" if "adapters" in schedule else "CMD"
        asked = ("search", name, {**problem, "method": "cmd", **schedule}, 0)
        row = results.get(*asked) if run else results.find(*asked)
        if row is not None and share(row) <= budget:
            affordable.append((schedule, row))
    if not affordable and not run:
        return schedules[0]
    return max(affordable, key=lambda t: t[1]["accuracy"])[0]


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing from the result file, then print tables and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="digits, one seed, nothing is written")
    parser.add_argument("--data-root", help="folder with MNIST and CIFAR-10")
    parser.add_argument(
        "--seeds", type=int, default=3, help="seeds reported: 1, 2, ... (default 3)"
    )
    parser.add_argument("--only", choices=[*PROBLEMS], help="one data set")
    parser.add_argument("--partition", choices=PARTITIONS, help="one way of splitting it")
    parser.add_argument("--seed", type=int, help="this seed alone")
    parser.add_argument("--many", action="store_true", help="the problem with 100 clients alone")
    parser.add_argument("--method", action="append", help="this row of the tables; repeatable")
    parser.add_argument("--new", type=Path, help="file for new rows, to be merged later")
    parser.add_argument("--merge", type=Path, nargs="+", default=[], help="files made with --new")
    parser.add_argument("--report", action="store_true", help="run nothing, show what is there")
    parser.add_argument("--out", type=Path, help="result file; default results/federated.jsonl")
    options = parser.parse_args(arguments)
    path = options.out or (None if options.quick else RESULTS / "federated.jsonl")
    results = Results(path, options.data_root, options.new)
    for other in options.merge:
        results.merge(other)
    if options.quick:
        quick = {**_STEPS, "modes": 50, "warmup": 3, "embed_every": 1, "embed_percent": 25.0}
        rotated = {**quick, "bits": 2, "coding": "eden"}
        given = quick, {**quick, "bits": 8}, rotated, ADAPTERS[0]
        problems = {"digits, iid": (QUICK, methods(*given))}
    else:
        searched = {**PROBLEMS["cifar10"], **LIMITS, "partition": "iid"}
        # Not needed to choose: it says what the schedules lose on the seed of the search.
        run = not options.report
        if run:
            results.get("search", "FedAvg", {**searched, "method": "fedavg"}, 0)
        chosen = [
            search(results, searched, tried, budget, run=run)
            for tried, budget in (
                (SCHEDULES, 0.40),
                (SCHEDULES_8_BIT, 0.12),
                (SCHEDULES_EDEN, 0.06),
                (ADAPTERS, 0.06),
            )
        ]
        rows = methods(*chosen)
        problems = {
            f"{data}, {partition}": ({**PROBLEMS[data], **LIMITS, "partition": partition}, rows)
            for data in PROBLEMS
            for partition in PARTITIONS
            if options.only in (None, data) and options.partition in (None, partition)
        }
        if options.many:
            problems = {}
        if options.many or (options.only is None and options.partition is None):
            problems[MANY_NAME] = MANY, methods_for_many(*chosen[1:3])
    seeds = range(1, 2 if options.quick else 1 + options.seeds)
    if options.seed is not None:
        seeds = range(options.seed, options.seed + 1)
    wanted = [
        (seed, problem, method, extra)
        for seed, (problem, rows) in product(seeds, problems.values())
        for method, extra in rows.items()
        if options.method is None or method in options.method
    ]
    terminal = Console(stderr=True)
    with Progress(console=terminal, disable=options.report or not terminal.is_terminal) as progress:
        bar = progress.add_task("training", total=len(wanted))
        for seed, problem, method, extra in wanted:
            if not options.report:
                results.get("report", method, {**problem, **extra}, seed)
            progress.advance(bar)
    console = Console(width=170)
    if not options.quick:
        for schedule in chosen:
            console.print(f"schedule chosen on seed 0: {schedule}", highlight=False)
    found = {}
    for title, (problem, rows) in problems.items():
        groups = complete(results, problem, rows, seeds)
        if groups:
            name = title.replace("cifar10", groups["FedAvg"][0]["data"])
            found[f"{name}, seeds {', '.join(str(r['seed']) for r in groups['FedAvg'])}"] = groups
    for title, groups in found.items():
        console.print(table(title, groups))
    if path is not None and found and options.new is None:
        draw(path.with_suffix(".png"), found)


def complete(
    results: Results, problem: dict[str, Any], rows: dict[str, dict[str, Any]], seeds: Sequence[int]
) -> dict[str, list[dict[str, Any]]]:
    """Return the runs of each method that has one for every seed that FedAvg has."""
    runs = {
        method: [results.find("report", method, {**problem, **extra}, seed) for seed in seeds]
        for method, extra in rows.items()
    }
    there = [number for number, row in enumerate(runs["FedAvg"]) if row is not None]
    found = {m: [row for n in there if (row := of[n]) is not None] for m, of in runs.items()}
    return {method: of for method, of in found.items() if of and len(of) == len(there)}


if __name__ == "__main__":
    main()
