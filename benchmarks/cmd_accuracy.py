"""Which weights of a training run should be kept? CMD beside every average of weights we know.

    python -m benchmarks.cmd_accuracy --quick                     # digits, 1 seed, a minute
    python -m benchmarks.cmd_accuracy --data-root DATA            # all of it, half an hour
    python -m benchmarks.cmd_accuracy --only 'mnist-*' --seed 3   # a part, for one process of many
    python -m benchmarks.cmd_accuracy --merge A.jsonl B.jsonl     # their rows into the result file

One run is kept whole, with the weights after every step; all methods are computed from it and
evaluated on the same test set, so that differences between them are not differences between runs.
Only schedule-free SGD trains for itself, from the same start on the same batches. A network with
BatchNorm is evaluated three times: with *running* statistics that are averaged or modelled like
weights, with statistics *recalibrated* on the training images, and with those of the test *batch*
(128 mixed images, as in the paper). One with GroupNorm has none.

Rows are appended to ``results/cmd_accuracy.jsonl`` as runs finish; one that is there is not
repeated.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.accuracy_tables import markdown, show
from benchmarks.kept_weights import Run, modelled, rivals
from benchmarks.machine import RESULTS, describe_machine
from benchmarks.small_problems import CASES, QUICK, Case, Problem, batches, load, score
from benchmarks.subspace import train_in_subspace
from cmd_plugin.errors import require
from cmd_plugin.modes import Layout
from cmd_plugin.modes.layout import find_weights
from cmd_plugin.networks import SmallConvNet, kept_buffers, recalibrated

NORMS = ("batchnorm", "groupnorm")
SCHEDULES = ("constant", "cosine", "schedule-free")
STATISTICS = {"batchnorm": ("running", "recalibrated", "batch"), "groupnorm": ("none",)}

TEST_BATCH = 128
# The authors advise 10 to 50 times the rate of plain SGD, and a warm-up.
SCHEDULE_FREE = {"schedule-free x10": 10.0, "schedule-free x50": 50.0}
SCHEDULE_FREE_WARMUP = 0.05  # of the steps


@dataclass(frozen=True)
class Setting:
    """A training problem, the network's normalisation, and how the rate goes."""

    case: Case
    norm: str
    schedule: str

    @property
    def name(self) -> str:
        """What ``--only`` selects by."""
        return f"{self.case.data}-{self.norm}-{self.schedule}"


_load = lru_cache(maxsize=1)(load)

Scored = list[float | None] | None


def build(setting: Setting, problem: Problem, seed: int) -> nn.Module:
    """Return the untrained network, with the same weights for either normalisation."""
    torch.manual_seed(seed)
    model = SmallConvNet(problem.channels, problem.classes, setting.case.width)
    if setting.norm == "groupnorm":
        for name, module in list(model.named_children()):
            if isinstance(module, nn.BatchNorm2d):
                setattr(model, name, nn.GroupNorm(4, module.num_features))
    return model.to(memory_format=torch.channels_last)  # twice as fast on a CPU


def train(
    model: nn.Module,
    problem: Problem,
    case: Case,
    seed: int,
    step: Callable[[], None],
    advance: Callable[[], None],
) -> Run:
    """Train with batches in an order that depends on the seed alone, and keep all weights.

    Args:
        model: The network, trained in place.
        problem: The images.
        case: Epochs and batch size.
        seed: Of the order.
        step: What follows a backward pass.
        advance: Called after each epoch.
    """
    layout = Layout.of_model(model)
    tensors = list(find_weights(layout, model, "the model").values())
    order = torch.Generator().manual_seed(seed)
    count = len(problem.labels)
    weights = torch.empty(case.epochs * -(-count // case.batch_size), layout.numel)
    rows = iter(weights)
    started = time.perf_counter()
    model.train()
    for _ in range(case.epochs):
        for index in torch.randperm(count, generator=order).split(case.batch_size):
            model.zero_grad(set_to_none=True)
            cross_entropy(model(problem.images[index]), problem.labels[index]).backward()
            step()
            torch.cat([tensor.detach().flatten() for tensor in tensors], out=next(rows))
        advance()
    per_epoch = len(weights) // case.epochs
    ends = torch.arange(per_epoch - 1, len(weights), per_epoch)
    return Run(model, layout, weights, ends, time.perf_counter() - started)


def evaluate(model: nn.Module, problem: Problem, kinds: Sequence[str]) -> list[Scored]:
    """Return [accuracy, loss] for each kind of statistics; the model's own are left as they are.

    Args:
        model: The network, with the weights to evaluate.
        problem: Held-out images, and training images to recalibrate on.
        kinds: Of ``STATISTICS``.
    """
    training = list(batches((problem.images, problem.labels), 512))
    found: list[Scored] = []
    for kind in kinds:
        with (
            kept_buffers(list(model.modules())),
            recalibrated(model, training) if kind == "recalibrated" else nullcontext(),
        ):
            model.train(kind == "batch")
            accuracy, loss = score(model, batches(problem.test, TEST_BATCH))
        found.append([round(accuracy, 4), round(loss, 4) if isfinite(loss) else None])
    return found


def without_running(model: nn.Module, problem: Problem, kinds: Sequence[str]) -> list[Scored]:
    """Return the same for a network whose running statistics are not those of its weights."""
    found = iter(evaluate(model, problem, [kind for kind in kinds if kind != "running"]))
    return [None if kind == "running" else next(found) for kind in kinds]


def compare(
    setting: Setting, seed: int, data_root: str | None, advance: Callable[[], None]
) -> dict[str, Any]:
    """Train once and evaluate every way to choose weights of that run."""
    case, kinds = setting.case, STATISTICS[setting.norm]
    problem = _load(case, seed, data_root)
    model = build(setting, problem, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=case.rate, momentum=0.9)
    steps = case.epochs * -(-len(problem.labels) // case.batch_size)
    scheduler = CosineAnnealingLR(optimizer, steps) if setting.schedule == "cosine" else None

    def step() -> None:
        optimizer.step()
        if scheduler is not None:
            scheduler.step()

    run = train(model, problem, case, seed, step, advance)
    scores = {"raw": evaluate(model, problem, kinds)}
    tensors = find_weights(run.layout, model, "the model")

    def show_weights(weights: Tensor) -> nn.Module:
        for variance in run.layout.variances():
            weights[variance].clamp_(min=0.0)
        for key, value in run.layout.split(weights).items():
            tensors[key].detach().copy_(value)
        return model

    for name, weights in rivals(run):
        scores[name] = evaluate(show_weights(weights), problem, kinds)
    found, states = modelled(run, case, seed, statistics=False)
    for name, weights in found.items():
        scores[name] = without_running(show_weights(weights), problem, kinds)
    if "running" in kinds:
        for name, weights in modelled(run, case, seed, statistics=True)[0].items():
            scores[name][:1] = evaluate(show_weights(weights), problem, kinds[:1])
    low = copy.deepcopy(model)
    early = run.weights[run.ends[: case.warmup + 1]][:, run.parameters]
    left = case.epochs - case.warmup - 1
    train_in_subspace(low, early, problem.images, problem.labels, left)
    scores["p-bfgs"] = without_running(low, problem, kinds)
    return {
        "scores": scores,
        "explained_variance": {n: round(s.explained_variance(), 4) for n, s in states.items()},
        "train_seconds": round(run.seconds, 1),
    }


def train_schedule_free(
    setting: Setting, seed: int, data_root: str | None, advance: Callable[[], None]
) -> dict[str, Any]:
    """Train by schedule-free SGD (Defazio et al., 2024) at each rate, and evaluate its average."""
    optimizers = require("schedulefree", "test")
    case = setting.case
    problem = _load(case, seed, data_root)
    scores, seconds = {}, 0.0
    for name, factor in SCHEDULE_FREE.items():
        model = build(setting, problem, seed)
        steps = case.epochs * -(-len(problem.labels) // case.batch_size)
        optimizer = optimizers.SGDScheduleFree(
            model.parameters(),
            lr=factor * case.rate,
            warmup_steps=int(SCHEDULE_FREE_WARMUP * steps),
        )
        optimizer.train()
        run = train(model, problem, case, seed, optimizer.step, advance)
        optimizer.eval()
        seconds += run.seconds
        # Running statistics were collected where gradients are taken, not where the average is.
        scores[name] = without_running(model, problem, STATISTICS[setting.norm])
    return {"scores": scores, "train_seconds": round(seconds, 1)}


def measure(
    setting: Setting, seed: int, data_root: str | None, advance: Callable[[], None]
) -> dict[str, Any]:
    """Return one row of the result file."""
    problem = _load(setting.case, seed, data_root)
    method = train_schedule_free if setting.schedule == "schedule-free" else compare
    return {
        "case": asdict(setting.case),
        "data": problem.name,
        "norm": setting.norm,
        "schedule": setting.schedule,
        "seed": seed,
        "parameters": sum(p.numel() for p in build(setting, problem, seed).parameters()),
        "train_images": len(problem.labels),
        "test_images": len(problem.test[1]),
        "statistics": STATISTICS[setting.norm],
        **method(setting, seed, data_root, advance),
        "machine": describe_machine(),
    }


def _key(row: dict[str, Any]) -> tuple[str, str, str, int]:
    return json.dumps(row["case"]), row["norm"], row["schedule"], row["seed"]


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def merge(path: Path, parts: list[Path]) -> None:
    """Write the rows of several files into one, in the order of cases; later files win."""
    rows = {_key(row): row for part in (path, *parts) for row in _read(part)}
    first = [case.data for case in CASES]
    ordered = sorted(
        rows.values(),
        key=lambda row: (first.index(row["case"]["data"]), row["norm"], row["schedule"]),
    )
    text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in ordered)
    path.write_text(text, encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing from the result file, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="digits only, one seed, 30 epochs")
    parser.add_argument("--data-root", help="folder with MNIST and CIFAR-10")
    parser.add_argument("--only", default="*", help="settings, as 'digits-batchnorm-*'")
    parser.add_argument("--seed", type=int, action="append", help="one seed, may be repeated")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--markdown", action="store_true", help="print the tables of the docs only")
    parser.add_argument("--merge", nargs="+", type=Path, metavar="FILE", help="take rows over")
    parser.add_argument("--out", type=Path, help="result file; default results/cmd_accuracy.jsonl")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    path = options.out or RESULTS / "cmd_accuracy.jsonl"
    if options.merge:
        merge(path, options.merge)
    rows = [] if options.quick and options.out is None else _read(path)
    if options.markdown or options.merge:
        Console(soft_wrap=True).print(markdown(rows), highlight=False, markup=False)
        return
    settings = [
        Setting(case, norm, schedule)
        for case in (QUICK if options.quick else CASES)
        for norm in NORMS
        for schedule in SCHEDULES
    ]
    done = {_key(row) for row in rows}
    todo = [
        (setting, seed)
        for seed in options.seed or range(1 if options.quick else 5)
        for setting in settings
        if fnmatchcase(setting.name, options.only)
        and _key({**asdict(setting), "seed": seed}) not in done
    ]
    terminal = Console(stderr=True)
    with Progress(console=terminal, disable=not terminal.is_terminal) as progress:
        epochs = sum(
            setting.case.epochs * (len(SCHEDULE_FREE) if setting.schedule == "schedule-free" else 1)
            for setting, _ in todo
        )
        bar = progress.add_task("training", total=epochs)
        for setting, seed in todo:
            row = measure(setting, seed, options.data_root, lambda: progress.advance(bar))
            rows.append(row)
            if not options.quick or options.out is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row, separators=(",", ":")) + "\n")
    show(rows, Console(width=140))


if __name__ == "__main__":
    sys.exit(main())
