"""Do distinction maps find what we planted, and is evidence really gone? With Captum's rivals.

    python -m benchmarks.distinction --only cross --seed 0 --threads 1    # five minutes on a core
    python -m benchmarks.distinction --data-root DATA                     # everything, three seeds
    python -m benchmarks.distinction --only noise --seed 2 --accelerator cuda --out noise_2.jsonl

Runs `cmd-plugin distinction train` and `evaluate` for each experiment, objective and seed. A row is
written as soon as it is known, so a run that was stopped goes on with the rows that are missing;
rows are independent of one another, so they can be measured by as many processes, each with an
--out of its own. `python -m benchmarks.distinction_report` joins such files and prints the tables.
Results: ``results/distinction.jsonl``, and of the first seed a picture of each experiment's
examples, ``distinction_EXPERIMENT.png`` beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.distinction_report import Row, key_of, read_rows, rounded, show
from benchmarks.machine import RESULTS, describe_machine
from cmd_plugin.data import LabelledImages, make_loader
from cmd_plugin.distinction.names import OBJECTIVE_NAMES
from cmd_plugin.distinction.quality import measure_split
from cmd_plugin.jobs.classifier import Classifier
from cmd_plugin.jobs.distinction import evaluate, train
from cmd_plugin.jobs.distinction.data import load_split_data
from cmd_plugin.jobs.distinction.model import open_model
from cmd_plugin.jobs.distinction.options import EvaluateOptions, TrainOptions
from cmd_plugin.jobs.fitting import make_trainer
from cmd_plugin.networks import build_model
from cmd_plugin.runs.process import find_device

_DEFAULT = "dxai_distilled"
_BATCH = 64
_MNIST: dict[str, Any] = {
    "data": "mnist",
    "image_size": 16,
    "train_limit": 40_000,
    "epochs": 3,
    "classifier_epochs": 5,
}

# What each experiment is, besides the objective and the seed.
EXPERIMENTS: dict[str, dict[str, Any]] = {
    "cross": {"plant": "cross", "model": "cnn:16"},
    "noise": {"plant": "noise", "model": "cnn:16"},
    "tint": {"plant": "tint", "model": "cnn:16"},
    "control": {"random_labels": True, "model": "cnn:16"},
    "mnist-3-8": {**_MNIST, "pick": ("3", "8")},
    "mnist-4-9": {**_MNIST, "pick": ("4", "9")},
    "mnist-3-5-8": {**_MNIST, "pick": ("3", "5", "8")},
    "cifar-car-truck": {
        "data": "cifar10",
        "pick": ("automobile", "truck"),
        "epochs": 4,
        "width": 16,
        "critic_width": 32,
        "classifier_epochs": 12,
    },
}


def ask_another_judge(folder: Path, options: TrainOptions) -> dict[str, Any]:
    """How a judge answers that learnt other labels of the same images, all drawn at random.

    Classifier and judge of a run learn the same labels of the same images, so also the same
    accidents. This one cannot know them: what moves it has nothing to do with labels.
    """
    trained, data = open_model(folder), load_split_data(options)
    images = data.train
    other = torch.randperm(len(images), generator=torch.Generator().manual_seed(options.seed))
    images = LabelledImages(images.store, images.labels[other], data.mean, data.std)
    torch.manual_seed(options.seed)
    shape = {"channels": data.channels, "classes": len(data.classes), "size": data.size}
    judge = build_model(options.judge, **shape)
    module = Classifier(judge, len(data.classes), "adam", options.classifier_lr, schedule="cosine")
    trainer = make_trainer("cpu", options.classifier_epochs, [], folder)
    trainer.fit(module, make_loader(images, _BATCH, shuffle_seed=options.seed))
    held_out = make_loader(data.test, _BATCH)
    found = measure_split(trained.decomposer, held_out, judge.eval())
    return {"accuracy": list(found.judge_accuracy), "removed": list(found.judge_removed)}


def measure(
    experiment: str, objective: str, seed: int, given: argparse.Namespace, accelerator: str
) -> Row:
    """Train and evaluate once; the row."""
    settings = dict(EXPERIMENTS[experiment])
    if "data" in settings:
        settings["data_root"] = given.data_root
    machine: dict[str, Any] = {"threads": given.threads, "accelerator": accelerator}
    options = TrainOptions(**settings, **machine, objective=objective, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        trained = train.run(options, model)
        asked = EvaluateOptions(model=model, data_root=given.data_root, **machine)
        found = evaluate.run(asked, None)
        more = {}
        if options.random_labels:
            more["another_judge"] = ask_another_judge(model, options)
        if seed == 0 and objective == _DEFAULT:
            picture = given.out.parent / f"distinction_{experiment}.png"
            shutil.copy(model / "examples.png", picture)
    config = {name: v for name, v in trained.options.items() if name != "data_root"}
    row: Row = rounded(
        {
            "experiment": experiment,
            "objective": objective,
            "seed": seed,
            "config": config,
            "data": trained.data,
            "classifier": trained.metrics["classifier"]["accuracy"],
            "judge": trained.metrics["judge"]["accuracy"],
            "found": dict(found.metrics) | more,
            "seconds": {
                "training": trained.seconds["training"],
                "with classifier and judge": trained.seconds["total"],
                "evaluation": found.seconds["total"],
            },
            "machine": describe_machine(),
        }
    )
    return row


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing, print all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", default=os.environ.get("CMD_PLUGIN_DATA"))
    parser.add_argument("--only", choices=EXPERIMENTS, action="append")
    parser.add_argument("--objective", choices=OBJECTIVE_NAMES, action="append")
    parser.add_argument("--seed", type=int, action="append", help="default: 0, 1 and 2")
    parser.add_argument("--accelerator", default="cpu", help="cpu, cuda or auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "distinction.jsonl")
    given = parser.parse_args(arguments)
    accelerator = find_device(given.accelerator).type
    given.out.parent.mkdir(parents=True, exist_ok=True)
    rows = read_rows(given.out)
    done = {key_of(row) for row in rows}
    for experiment in given.only or EXPERIMENTS:
        if "data" in EXPERIMENTS[experiment] and given.data_root is None:
            print(f"left out {experiment}: say where the data lie by --data-root")
            continue
        for objective in given.objective or [_DEFAULT]:
            for seed in given.seed or range(3):
                if (experiment, objective, accelerator, seed) in done:
                    continue
                rows.append(measure(experiment, objective, seed, given, accelerator))
                with given.out.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(rows[-1], allow_nan=False) + "\n")
    show(rows)


if __name__ == "__main__":
    main()
