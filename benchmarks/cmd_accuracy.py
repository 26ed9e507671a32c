"""Do modelled weights generalise better? CMD beside EMA, SWA and P-BFGS on the same training runs.

    python -m benchmarks.cmd_accuracy --quick                       # digits, 1 seed, a minute
    python -m benchmarks.cmd_accuracy --data-root DATA              # all of it, about two hours on
    one core

Every averaging method watches the *same* SGD run and is evaluated on the same test set after the
last epoch, so differences between
columns are not differences between runs. Rows are appended to ``results/cmd_accuracy.jsonl`` as
runs finish; a run that is there is
not repeated.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from benchmarks.machine import RESULTS, describe_machine
from benchmarks.subspace import train_in_subspace
from cmd_plugin.data import load_dataset
from cmd_plugin.modes import OnlineModes
from cmd_plugin.networks import SmallConvNet, evaluate, recalibrated

EMA_PER_STEP = (0.9, 0.99, 0.999)
EMA_PER_EPOCH = 0.9
TEST_LIMIT = 2000
SWA_SHARE = 0.25  # of the epochs, the last ones

# Options of OnlineModes under test; the paper's method is the one without any.
VARIANTS: dict[str, dict[str, Any]] = {
    "cmd M=2": {"modes": 2},
    "cmd M=5": {"modes": 5},
    "cmd M=10": {"modes": 10},
    "cmd M=10 shrink": {"modes": 10, "shrink": True},
    "cmd M=10 mean": {"modes": 10, "profile": "mean"},
    "cmd M=10 mean shrink": {"modes": 10, "profile": "mean", "shrink": True},
    "cmd M=10 forget .9": {"modes": 10, "forgetting": 0.9},
    "cmd M=10 keep BN": {"modes": 10, "buffers": "keep"},
    "cmd M=2 recal.": {"modes": 2, "buffers": "recalibrate"},
    "cmd M=10 recal.": {"modes": 10, "buffers": "recalibrate"},
    "cmd M=10 shrink recal.": {"modes": 10, "shrink": True, "buffers": "recalibrate"},
    "cmd M=10 mean recal.": {"modes": 10, "profile": "mean", "buffers": "recalibrate"},
}


@dataclass(frozen=True)
class Case:
    """One training problem."""

    data: str
    train_limit: int | None
    label_noise: float
    epochs: int
    warmup: int
    batch_size: int
    rate: float
    width: int


CASES = (
    Case("digits", None, 0.2, 60, 20, 64, 0.05, 16),
    Case("mnist", 1000, 0.2, 40, 13, 64, 0.05, 8),
    Case("cifar10", 2000, 0.0, 40, 13, 64, 0.05, 8),
)
QUICK = (Case("digits", None, 0.2, 30, 10, 64, 0.05, 16),)
SCHEDULES = ("constant", "cosine")


def whole(dataset: Any) -> tuple[Tensor, Tensor]:
    """Return all images and labels of a data set as two tensors."""
    images, labels = dataset.__getitems__(range(len(dataset)))
    return images, labels


def batches(images: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches in order."""
    yield from zip(images.split(size), labels.split(size), strict=True)


def train_once(
    case: Case, schedule: str, seed: int, data_root: str | None, advance: Any
) -> dict[str, Any]:
    """Train one network with every method watching, and evaluate them all after the last epoch."""
    data = load_dataset(
        case.data,
        data_root=data_root,
        label_noise=case.label_noise,
        train_limit=case.train_limit,
        seed=seed,
    )
    images, labels = whole(data.train)
    # Image folders come sorted by class, and a batch of one class has no representative statistics.
    mixed = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    images, labels = images[mixed], labels[mixed]
    images_left, labels_left = whole(data.test)
    # One fixed random part of a large test set: 25 variants are evaluated on it in every run.
    part = torch.randperm(len(labels_left), generator=torch.Generator().manual_seed(0))[:TEST_LIMIT]
    test = images_left[part], labels_left[part]
    torch.manual_seed(seed)
    model = SmallConvNet(data.channels, len(data.classes), case.width)
    optimizer = torch.optim.SGD(model.parameters(), lr=case.rate, momentum=0.9)
    steps = case.epochs * -(-len(labels) // case.batch_size)
    scheduler = (
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        if schedule == "cosine"
        else torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    )
    averages = {
        f"ema step {decay}": AveragedModel(
            model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True
        )
        for decay in EMA_PER_STEP
    }
    per_epoch = AveragedModel(
        model, multi_avg_fn=get_ema_multi_avg_fn(EMA_PER_EPOCH), use_buffers=True
    )
    swa = AveragedModel(model, use_buffers=True)
    observers = {
        name: OnlineModes(model, warmup=case.warmup, seed=seed, **{"buffers": "model", **options})
        for name, options in VARIANTS.items()
    }
    snapshots: list[Tensor] = []
    seconds = 0.0
    order = torch.Generator().manual_seed(seed)
    for epoch in range(case.epochs):
        started = time.perf_counter()
        model.train()
        for index in torch.randperm(len(labels), generator=order).split(case.batch_size):
            optimizer.zero_grad(set_to_none=True)
            cross_entropy(model(images[index]), labels[index]).backward()
            optimizer.step()
            scheduler.step()
            seconds -= time.perf_counter()
            for average in averages.values():
                average.update_parameters(model)
            seconds += time.perf_counter()
        seconds += time.perf_counter() - started
        per_epoch.update_parameters(model)
        if epoch >= case.epochs * (1 - SWA_SHARE):
            swa.update_parameters(model)
        for observer in observers.values():
            observer.update()
        if epoch <= case.warmup:
            snapshots.append(parameters_to_vector(model.parameters()).detach().clone())
        advance()

    training_batches = list(batches(images, labels, 512))
    averages |= {f"ema epoch {EMA_PER_EPOCH}": per_epoch, "swa": swa}
    watched = {"raw": model, **{name: average.module for name, average in averages.items()}}
    scores = {}
    for name, network in watched.items():
        scores[name] = evaluate(network, batches(*test, 512))
        # BatchNorm's statistics re-estimated for the final weights: what CMD's "recalibrate" row
        # has to be compared with.
        with recalibrated(network, training_batches):
            scores[f"{name} recal."] = evaluate(network, batches(*test, 512))
    for name, observer in observers.items():
        with observer.swap(recalibrate=training_batches):
            scores[name] = evaluate(model, batches(*test, 512))
    started = time.perf_counter()
    low = copy.deepcopy(model)
    train_in_subspace(low, torch.stack(snapshots), images, labels, case.epochs - case.warmup - 1)
    update_bn(training_batches, low)
    scores["p-bfgs recal."] = evaluate(low, batches(*test, 512))
    paper = observers["cmd M=10"]
    return {
        "case": asdict(case),
        "data": data.name,
        "schedule": schedule,
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_images": len(labels),
        "test_images": len(test[1]),
        "accuracy": {name: score.accuracy for name, score in scores.items()},
        "loss": {name: score.loss for name, score in scores.items()},
        "explained_variance": {n: o.explained_variance() for n, o in observers.items()},
        "state_bytes_per_parameter": paper.state_bytes / paper.numel,
        "train_seconds": round(seconds, 1),
        "subspace_seconds": round(time.perf_counter() - started, 1),
    }


def summarise(rows: list[dict[str, Any]], console: Console) -> None:
    """Print a table for each case and schedule: mean, spread, wins over the best EMA and SWA."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["data"], row["schedule"]), []).append(row)
    for (data, schedule), group in groups.items():
        case = group[0]["case"]
        names = list(group[0]["accuracy"])
        accuracy = {n: [100 * row["accuracy"][n] for row in group] for n in names}
        best_ema = max((n for n in names if n.startswith("ema")), key=lambda n: mean(accuracy[n]))
        table = Table(
            title=f"{data}, {group[0]['train_images']} training images, label noise "
            f"{case['label_noise']:g}, {schedule} learning rate, {case['epochs']} epochs, "
            f"{len(group)} seeds"
        )
        for column in (
            "method",
            "accuracy %",
            "loss",
            "against raw",
            f"against {best_ema}",
            "against swa",
        ):
            table.add_column(column, justify="left" if column == "method" else "right")
        for name in names:
            spread = f" +/- {stdev(accuracy[name]):.2f}" if len(group) > 1 else ""
            label = f"{name} (best EMA, chosen on this test set)" if name == best_ema else name
            table.add_row(
                label,
                f"{mean(accuracy[name]):.2f}{spread}",
                f"{mean(row['loss'][name] for row in group):.3f}",
                *(_versus(accuracy[name], accuracy[other]) for other in ("raw", best_ema, "swa")),
            )
        console.print(table)


def _versus(mine: list[float], theirs: list[float]) -> str:
    """Mean difference and how many seeds were won, tied and lost."""
    wins = sum(a > b for a, b in zip(mine, theirs, strict=True))
    losses = sum(a < b for a, b in zip(mine, theirs, strict=True))
    return f"{mean(mine) - mean(theirs):+.2f} ({wins}-{len(mine) - wins - losses}-{losses})"


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table of the README: accuracy of each method (rows) in each case (columns)."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(f"{row['data']}, {row['schedule']}", []).append(row)
    lines = ["| weights | " + " | ".join(groups) + " |", "|---|" + "---|" * len(groups)]
    for name in rows[0]["accuracy"]:
        cells = []
        for group in groups.values():
            values = [100 * row["accuracy"][name] for row in group]
            spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.1f}{spread}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing from the result file, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="digits only, one seed, 30 epochs")
    parser.add_argument("--data-root", help="folder with MNIST and CIFAR-10")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=[case.data for case in CASES], help="one data set")
    parser.add_argument("--markdown", action="store_true", help="print the README's table only")
    parser.add_argument("--out", type=Path, help="result file; default results/cmd_accuracy.jsonl")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    cases = QUICK if options.quick else CASES
    cases = tuple(c for c in cases if options.only in (None, c.data))
    seeds = range(1 if options.quick else options.seeds)
    path = options.out or (None if options.quick else RESULTS / "cmd_accuracy.jsonl")
    rows = [json.loads(line) for line in path.open()] if path and path.exists() else []
    if options.markdown:
        Console(soft_wrap=True).print(markdown(rows), highlight=False, markup=False)
        return
    done = {(json.dumps(row["case"]), row["schedule"], row["seed"]) for row in rows}
    todo = [
        (case, schedule, seed)
        for case in cases
        for seed in seeds
        for schedule in SCHEDULES
        if (json.dumps(asdict(case)), schedule, seed) not in done
    ]
    terminal = Console(stderr=True)
    with Progress(console=terminal, disable=not terminal.is_terminal) as progress:
        bar = progress.add_task("training", total=sum(case.epochs for case, _, _ in todo))
        for case, schedule, seed in todo:
            row = train_once(case, schedule, seed, options.data_root, lambda: progress.advance(bar))
            row["machine"] = describe_machine()
            rows.append(row)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    summarise(rows, Console(width=140))


if __name__ == "__main__":
    sys.exit(main())
