"""Train a network's defences on a data set and fill the robustness table, reproducibly."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import nn

from cmd_plugin.errors import InputError
from cmd_plugin.jobs.points.data import load_point_data
from cmd_plugin.jobs.points.options import RobustnessOptions
from cmd_plugin.pointcloud import PointClouds, build_network
from cmd_plugin.pointcloud.defences import STAGES, Defences, initial_defences, train_defences
from cmd_plugin.pointcloud.robustness import (
    SETS,
    CorruptedSet,
    corrupted_sets,
    evaluate_corruptions,
    released_sets,
)
from cmd_plugin.pointcloud.robustness_plots import draw_report
from cmd_plugin.runs.figures import save_figure
from cmd_plugin.runs.job import Job, make_job
from cmd_plugin.runs.process import own_threads
from cmd_plugin.runs.result import Result

__all__ = ["run"]

_NETWORKS = "networks.safetensors"


@make_job("points robustness")
def run(job: Job, options: RobustnessOptions) -> Result:
    """Train the five networks, or take those of an earlier run, and evaluate them.

    A run that was stopped goes on after the last stage it finished (plain network, ensemble,
    network on subsets), and ends as if it had not been stopped.

    Returns:
        What :meth:`cmd_plugin.pointcloud.RobustnessReport.as_dict` gives.

    Raises:
        InputError: If data or folder cannot be used, or the networks given are not trained.
        StateMismatch: If the networks given were trained under other options.
        NonFiniteError: If a loss or a logit becomes NaN or infinite.
        KeyboardInterrupt: If the user stops the run; it can be resumed.
    """
    with own_threads(options.threads):
        train, test = load_point_data(
            options.data,
            options.data_root,
            options.points,
            options.train_clouds,
            options.test_clouds,
            options.seed,
        )
        sets: Iterable[CorruptedSet] = corrupted_sets(test, seed=options.seed)
        if options.released is not None:
            sets = released_sets(options.released, classes=train.classes)

        def make() -> nn.Module:
            return build_network(options.model, len(train.classes), options.width)

        defences = initial_defences(make, options.points, options.seed)
        if options.networks is not None:
            _take(defences, Path(options.networks), options)
        started = time.perf_counter()
        done = 0 if options.networks is not None else _train(job, options, make, train, defences)
        trained = time.perf_counter()
        report = evaluate_corruptions(
            defences.eval(),
            sets,
            views=defences.views,
            seed=options.seed,
            rounding=options.rounding,  # type: ignore[arg-type]
            progress=lambda sets, _: job.report("evaluating", done + sets, done + SETS),
        )
        evaluated = time.perf_counter()
        defences.save(job.folder.path(_NETWORKS), options.settings)
        title = f"{options.model} on {test.name}, {options.points} points, seed {options.seed}"
        save_figure(draw_report(report, title), job.folder.path("robustness.png"))
        return job.finish(
            metrics=report.as_dict(),
            data={
                "name": test.name,
                "classes": list(train.classes),
                "train_clouds": len(train),
                "corruptions": "ModelNet-C-style, this seed"
                if options.released is None
                else "released ModelNet-C",
            },
            seconds={"training": trained - started, "evaluation": evaluated - trained},
        )


def _take(defences: Defences, given: Path, options: RobustnessOptions) -> None:
    """Fill the networks from those of an earlier run.

    Raises:
        InputError: If they are not there, or not all trained.
        StateMismatch: If they were trained under other options.
    """
    path = given / _NETWORKS if given.is_dir() else given
    finished = defences.load(path, options.settings)
    if finished != STAGES:
        raise InputError(
            f"--networks {path} holds networks that are not trained yet: finish that run first."
        )


def _train(
    job: Job,
    options: RobustnessOptions,
    make: Callable[[], nn.Module],
    train: PointClouds,
    defences: Defences,
) -> int:
    """Train the networks in place, those that are not trained yet; the number of epochs of all."""
    path = job.folder.state(_NETWORKS)
    finished = defences.load(path, options.settings) if path.exists() else ()
    total = (2 + len(defences.ensemble.networks)) * options.epochs

    def keep(stage: str, trained: Defences) -> None:
        nonlocal finished
        finished = (*finished, stage)
        trained.save(job.folder.state(_NETWORKS), options.settings, finished)

    train_defences(
        make,
        train,
        options.epochs,
        rounds=options.rounds,
        batch_size=options.batch_size,
        learning_rate=options.lr,
        seed=options.seed,
        start=defences,
        finished=finished,
        after_stage=keep,
        progress=lambda done, _: job.report("training", done, total + SETS),
    )
    return total
