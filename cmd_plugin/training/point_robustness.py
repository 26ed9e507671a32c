"""Train a network's defences on a data set and fill the robustness table, reproducibly."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from cmd_plugin import __version__
from cmd_plugin.pointcloud import PointClouds, build_network
from cmd_plugin.pointcloud.defences import Defences, initial_defences, train_defences
from cmd_plugin.pointcloud.names import Rounding
from cmd_plugin.pointcloud.networks import NETWORKS
from cmd_plugin.pointcloud.robustness import (
    CorruptedSet,
    RobustnessReport,
    corrupted_sets,
    evaluate_corruptions,
    released_sets,
)
from cmd_plugin.pointcloud.robustness_plots import draw_report
from cmd_plugin.training._environment import own_threads
from cmd_plugin.training._point_options import check_point_options
from cmd_plugin.training.folder import write_json
from cmd_plugin.training.point_data import load_point_data

__all__ = ["PointRobustnessConfig", "RobustnessRun", "run_robustness"]

Progress = Callable[[str, int, int], None]

# Options that say where things lie or how the trained networks are judged, not what they are.
_FREE = ("data_root", "threads", "test_clouds", "released", "rounding")


@dataclass(frozen=True)
class PointRobustnessConfig:
    """Options of a robustness run.

    Attributes:
        data: ``shapes``, ``chairs-monitors`` or ``hdf5``, see
            :func:`cmd_plugin.training.point_data.load_point_data`.
        data_root: Where it lies.
        released: Folder of the released ModelNet-C files, to evaluate on instead of held-out clouds
            corrupted here.
        points: Points in a clean cloud.
        train_clouds: Training clouds used; ``None`` for the default of the set.
        test_clouds: Held-out clouds used; ``None`` likewise.
        model: A name of :data:`cmd_plugin.pointcloud.networks.NETWORKS`.
        width: Multiplies every hidden width.
        epochs: Epochs of each of the five networks.
        rounds: Optimizer steps per batch, each with another view.
        batch_size: Clouds in a step.
        lr: Learning rate of AdamW, at the start of its cosine schedule.
        rounding: ``official`` or ``exact``.
        seed: Of data, initial weights, views and corruptions.
        threads: CPU threads; ``None`` leaves torch's choice.

    Raises:
        InputError: If an option is out of range.
    """

    data: str = "shapes"
    data_root: str | None = None
    released: str | None = None
    points: int = 256
    train_clouds: int | None = 240
    test_clouds: int | None = 60
    model: str = "pointnet"
    width: float = 0.25
    epochs: int = 15
    rounds: int = 2
    batch_size: int = 8
    lr: float = 3e-3
    rounding: Rounding = "official"
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        check_point_options(
            self,
            {"model": NETWORKS, "rounding": ("official", "exact")},
            ("points", "train_clouds", "test_clouds", "epochs", "rounds", "threads"),
        )

    def deciding(self) -> dict[str, Any]:
        """The options that decide what the trained networks are."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _FREE}


@dataclass(frozen=True)
class RobustnessRun:
    """A finished run.

    Attributes:
        report: The table.
        summary: The content of result.json.
        out: Where ``networks.safetensors``, ``result.json`` and ``robustness.png`` lie.
    """

    report: RobustnessReport
    summary: dict[str, Any]
    out: Path


def run_robustness(
    config: PointRobustnessConfig, out: Path, progress: Progress | None = None
) -> RobustnessRun:
    """Train the five networks, or take those of the same run in ``out``, and evaluate them.

    A run that was stopped goes on after the last stage it finished (plain network, ensemble,
    network on subsets), and ends as if it had not been stopped.

    Args:
        config: What to run.
        out: Folder for the results, made if needed. Networks that lie there already are used if
            they were trained under the same options.
        progress: Called with (what, done, total).

    Raises:
        InputError: If data are missing or unusable.
        StateMismatch: If the folder holds networks of other options.
        NonFiniteError: If a loss or a logit becomes NaN or infinite.
    """
    out.mkdir(parents=True, exist_ok=True)
    with own_threads(config.threads):
        train, test = load_point_data(
            config.data,
            config.data_root,
            config.points,
            config.train_clouds,
            config.test_clouds,
            config.seed,
        )
        started = time.perf_counter()
        defences, reused = _networks(config, train, out / "networks.safetensors", progress)
        trained = time.perf_counter()
        sets: Iterable[CorruptedSet] = corrupted_sets(test, seed=config.seed)
        if config.released is not None:
            sets = released_sets(config.released, classes=train.classes)
        report = evaluate_corruptions(
            defences,
            sets,
            views=defences.views,
            seed=config.seed,
            rounding=config.rounding,
            progress=None if progress is None else lambda a, b: progress("evaluating", a, b),
        )
        evaluated = time.perf_counter()
    summary = {
        "config": asdict(config),
        "data": {"name": test.name, "classes": list(train.classes), "train_clouds": len(train)},
        "corruptions": "released ModelNet-C" if config.released else "ModelNet-C-style, this seed",
        "networks_reused": reused,
        "seconds": {"training": trained - started, "evaluation": evaluated - trained},
        "version": __version__,
        **report.as_dict(),
    }
    write_json(out / "result.json", summary)
    title = f"{config.model} on {test.name}, {config.points} points, seed {config.seed}"
    draw_report(report, title).savefig(out / "robustness.png")
    return RobustnessRun(report, summary, out)


def _networks(
    config: PointRobustnessConfig, train: PointClouds, path: Path, progress: Progress | None
) -> tuple[Defences, list[str]]:
    """The trained networks, and which of them were there already."""

    def make() -> nn.Module:
        return build_network(config.model, len(train.classes), config.width)

    finished: tuple[str, ...] = ()
    defences = initial_defences(make, config.points, config.seed)
    if path.is_file():
        finished = defences.load(path, config.deciding())
    reused = finished

    def keep(stage: str, trained: Defences) -> None:
        nonlocal finished
        finished = (*finished, stage)
        trained.save(path, config.deciding(), finished)

    defences = train_defences(
        make,
        train,
        config.epochs,
        rounds=config.rounds,
        batch_size=config.batch_size,
        learning_rate=config.lr,
        seed=config.seed,
        start=defences,
        finished=finished,
        after_stage=keep,
        progress=None if progress is None else lambda a, b: progress("training", a, b),
    )
    return defences, list(reused)
