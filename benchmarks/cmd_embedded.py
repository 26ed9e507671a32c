"""What does embedding cost in accuracy? Embedded CMD beside plain SGD and beside freezing.

    python -m benchmarks.cmd_embedded --quick                 # digits, 1 seed, two minutes
    python -m benchmarks.cmd_embedded --data-root DATA        # all of it, under an hour on one core

Every row is a training of its own, from the same start on the same batches. *freeze* is the
control: the same weights are chosen at the same epochs, but stay at the value they have then
instead of following a reference. Rows are appended to ``results/cmd_embedded.jsonl`` as trainings
finish; one that is there is not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from benchmarks.machine import RESULTS, describe_machine
from benchmarks.small_problems import CASES, QUICK, Case, batches, load
from cmd_plugin.modes import Embedding, OnlineModes
from cmd_plugin.networks import SmallConvNet, evaluate, recalibrated

MODES, EVERY, PERCENT = 10, 5, 10.0
OFTEN = 2  # epochs between events in the rows that embed most

# What each training does: options of Embedding, "buffers", or "freeze" for the control.
TRAININGS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "epoch (paper)": {"project": "epoch"},
    "epoch, statistics modelled": {"project": "epoch", "buffers": "model"},
    "epoch, relative": {"project": "epoch", "relative": True},
    "epoch, slots zeroed": {"project": "epoch", "slots": "zero"},
    "step": {"project": "step"},
    "tie": {"project": "tie"},
    "freeze": {"freeze": True},
    f"epoch, L={OFTEN}": {"project": "epoch", "every": OFTEN},
    f"step, L={OFTEN}": {"project": "step", "every": OFTEN},
    f"tie, L={OFTEN}": {"project": "tie", "every": OFTEN},
    f"freeze, L={OFTEN}": {"freeze": True, "every": OFTEN},
}


class Freezer:
    """Keeps every weight at the value it has when the modes embed it."""

    def __init__(self, modes: OnlineModes, model: torch.nn.Module) -> None:
        self._modes, self._model = modes, model
        self._mask = torch.zeros(modes.numel, dtype=torch.bool)
        self._values = torch.zeros(modes.numel)

    def adopt(self) -> None:
        """Remember the values of new members."""
        weights = parameters_to_vector(self._model.parameters()).detach()
        now = self._modes.embedded
        self._values = torch.where(now & ~self._mask, weights, self._values)
        self._mask = now

    def write(self) -> None:
        """Put the members back to their values."""
        weights = parameters_to_vector(self._model.parameters()).detach()
        vector_to_parameters(
            torch.where(self._mask, self._values, weights), self._model.parameters()
        )


def train_once(case: Case, name: str, seed: int, root: str | None, advance: Any) -> dict[str, Any]:
    """Train one network and evaluate it after the last epoch."""
    problem = load(case, seed, root)
    images, labels = problem.images, problem.labels
    test = list(batches(problem.test, 512))
    options = dict(TRAININGS[name])
    freeze, buffers = options.pop("freeze", False), options.pop("buffers", "recalibrate")
    project = options.get("project", "epoch")
    embedding = Embedding(**{"every": EVERY, "percent": PERCENT, **options})
    torch.manual_seed(seed)
    model = SmallConvNet(problem.channels, problem.classes, case.width)
    optimizer = torch.optim.SGD(model.parameters(), lr=case.rate, momentum=0.9)
    modes = OnlineModes(
        model,
        MODES,
        case.warmup,
        seed=seed,
        buffers=buffers,
        embedding=None if name == "sgd" else embedding,
    )
    freezer = Freezer(modes, model) if freeze else None
    order = torch.Generator().manual_seed(seed)
    seconds = own = 0.0
    for _ in range(case.epochs):
        started = time.perf_counter()
        model.train()
        for index in torch.randperm(len(labels), generator=order).split(case.batch_size):
            optimizer.zero_grad(set_to_none=True)
            cross_entropy(model(images[index]), labels[index]).backward()
            before = time.perf_counter()
            if project == "tie":
                modes.tie_gradients(optimizer)
            own += time.perf_counter() - before
            optimizer.step()
            before = time.perf_counter()
            if project != "epoch":
                modes.project(optimizers=[optimizer])
            own += time.perf_counter() - before
        before = time.perf_counter()
        if freezer is None:
            modes.project(optimizers=[optimizer])
        else:
            freezer.write()
        modes.update()
        if freezer is not None:
            freezer.adopt()
        own += time.perf_counter() - before
        seconds += time.perf_counter() - started
        advance()
    training_batches = list(batches((images, labels), 512))
    scores = {"trained": evaluate(model, test)}
    with recalibrated(model, training_batches):
        scores["trained recal."] = evaluate(model, test)
    with modes.swap(recalibrate=training_batches):
        scores["modelled"] = evaluate(model, test)
    return {
        "case": asdict(case),
        "data": problem.name,
        "training": name,
        "options": {"every": EVERY, "percent": PERCENT, "modes": MODES, **TRAININGS[name]},
        "seed": seed,
        "parameters": modes.numel,
        "train_images": len(labels),
        "accuracy": {kind: score.accuracy for kind, score in scores.items()},
        "loss": {kind: score.loss for kind, score in scores.items()},
        "embedded_fraction": modes.embedded_fraction,
        "saved_percent": modes.saved_percent,
        "volume_percent": modes.volume_percent,
        "byte_percent": 100 * modes.volume_bytes / (4 * modes.updates * modes.numel),
        "explained_variance": modes.explained_variance(),
        "train_seconds": round(seconds, 2),
        "cmd_seconds": round(own, 2),
    }


def summarise(rows: list[dict[str, Any]], console: Console) -> None:
    """Print a table for each data set."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["data"], []).append(row)
    for data, group in groups.items():
        case, seeds = group[0]["case"], {row["seed"] for row in group}
        table = Table(
            title=f"{data}, {group[0]['train_images']} training images, label noise "
            f"{case['label_noise']:g}, {case['epochs']} epochs (warm-up {case['warmup']}), "
            f"{group[0]['parameters']:,} weights, {len(seeds)} seeds"
        )
        table.add_column("training")
        for column in ("accuracy %", "recal. %", "modelled %", "embedded", "saved", "bytes"):
            table.add_column(column, justify="right")
        for name in TRAININGS:
            mine = [row for row in group if row["training"] == name]
            if mine:
                table.add_row(name, *_cells(mine))
        console.print(table)


def _cells(rows: list[dict[str, Any]]) -> list[str]:
    cells = []
    for kind in ("trained", "trained recal.", "modelled"):
        values = [100 * row["accuracy"][kind] for row in rows]
        spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
        cells.append(f"{mean(values):.1f}{spread}")
    if rows[0]["training"] == "sgd":
        return [*cells, "-", "-", "100.0 %"]
    shares = [100 * mean(row["embedded_fraction"] for row in rows)]
    shares.append(mean(row["saved_percent"] for row in rows))
    frozen = rows[0]["training"].startswith("freeze")  # sends no references, and no coefficients
    shares.append(mean(row["volume_percent" if frozen else "byte_percent"] for row in rows))
    return [*cells, *(f"{share:.1f} %" for share in shares)]


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table of the documentation: accuracy of each training in each case."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["data"], []).append(row)
    heads = [f"{data} | embedded, bytes" for data in groups]
    lines = ["| training | " + " | ".join(heads) + " |", "|---|" + "---|---|" * len(groups)]
    for name in TRAININGS:
        cells = []
        for group in groups.values():
            found = _cells([row for row in group if row["training"] == name])
            cells.append(f"{found[1]} | {found[3]}, {found[5]}".replace(" %", "%"))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing from the result file, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="digits only, one seed, 30 epochs")
    parser.add_argument("--data-root", help="folder with MNIST and CIFAR-10")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--markdown", action="store_true", help="print the documentation's table")
    parser.add_argument("--out", type=Path, help="result file; default results/cmd_embedded.jsonl")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    cases = QUICK if options.quick else CASES
    seeds = range(1 if options.quick else options.seeds)
    path = options.out or (None if options.quick else RESULTS / "cmd_embedded.jsonl")
    rows = [json.loads(line) for line in path.open()] if path and path.exists() else []
    if options.markdown:
        Console(soft_wrap=True).print(markdown(rows), highlight=False, markup=False)
        return
    done = {(json.dumps(row["case"]), row["training"], row["seed"]) for row in rows}
    todo = [
        (case, name, seed)
        for seed in seeds
        for case in cases
        for name in TRAININGS
        if (json.dumps(asdict(case)), name, seed) not in done
    ]
    terminal = Console(stderr=True)
    with Progress(console=terminal, disable=not terminal.is_terminal) as progress:
        bar = progress.add_task("training", total=sum(case.epochs for case, _, _ in todo))
        for case, name, seed in todo:
            row = train_once(case, name, seed, options.data_root, lambda: progress.advance(bar))
            row["machine"] = describe_machine()
            rows.append(row)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    summarise(rows, Console(width=140))


if __name__ == "__main__":
    sys.exit(main())
