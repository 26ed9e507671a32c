"""The options of ``cmd-plugin points train``, ``robustness`` and ``explain``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmd_plugin.errors import InputError
from cmd_plugin.pointcloud.names import MEASURES, NETWORK_NAMES, ROUNDINGS
from cmd_plugin.runs.options import JobOptions, argument, option
from cmd_plugin.runs.process import ACCELERATORS

__all__ = [
    "POINT_DATASETS",
    "ExplainOptions",
    "RobustnessOptions",
    "TrainOptions",
    "is_voxels",
    "name_of",
]

POINT_DATASETS = ("shapes", "chairs-monitors", "hdf5")

_DATA = "Data and network"
_TRAINING = "Training"
_EVALUATION = "Evaluation"
_CLOUD = "Cloud"
_NETWORK = "Network"
_SCORES = "Scores and pictures"
_MACHINE = "Machine"

_AXES = ("xyz", "xzy", "yxz", "yzx", "zxy", "zyx")
_VOXELS = ".npy.gz"
_HOW_EVALUATED = ("networks", "released", "rounding", "test_clouds")


@dataclass(frozen=True, kw_only=True)
class _TrainingOptions(JobOptions):
    """What every training on clouds is told."""

    data: str = option(
        "shapes",
        "shapes (twelve procedural classes, embedded), chairs-monitors (voxel grids of ModelNet10) "
        "or hdf5 (files named *train*.h5 and *test*.h5, as ModelNet40 comes).",
        panel=_DATA,
        choices=POINT_DATASETS,
    )
    data_root: str | None = option(
        None,
        "Where data lies. Default: environment variable CMD_PLUGIN_DATA. Nothing is downloaded.",
        panel=_DATA,
        free=True,
        only={"data": POINT_DATASETS[1:]},
    )
    model: str = option(
        "pointnet",
        "Architecture; pointnet-aligned has learned alignments, pct is a transformer.",
        panel=_DATA,
        choices=NETWORK_NAMES,
    )
    width: float = option(
        0.5, "Multiplies every hidden width; 1 is as published.", panel=_DATA, above=0
    )
    points: int = option(512, "Points in a cloud.", panel=_DATA, at_least=1)
    train_clouds: int | None = option(None, "Use so many training clouds.", panel=_DATA, at_least=1)
    test_clouds: int | None = option(None, "Use so many held-out clouds.", panel=_DATA, at_least=1)
    epochs: int = option(15, "Epochs.", panel=_TRAINING, at_least=1)
    batch_size: int = option(32, "Clouds in a step.", panel=_TRAINING, at_least=2)
    lr: float = option(2e-3, "Learning rate.", panel=_TRAINING, above=0)
    seed: int = option(
        0, "Of data, initial weights and all that is drawn later.", panel=_TRAINING, at_least=0
    )
    threads: int | None = option(
        None, "CPU threads; default: torch's choice.", panel=_MACHINE, at_least=1, free=True
    )


def _other_default(name: str, default: Any) -> Any:
    """Declare an option of :class:`_TrainingOptions` again, with another default."""
    metadata = _TrainingOptions.__dataclass_fields__[name].metadata
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class TrainOptions(_TrainingOptions):
    """Train a point-cloud network and evaluate it on held-out clouds after every epoch.

    Writes metrics.csv, result.json and model.safetensors, which `points explain` takes.

    Examples:
      cmd-plugin points train --epochs 15
      cmd-plugin points train --data chairs-monitors --data-root DATA --epochs 5 --out chairs
    """

    optimizer: str = option(
        "adamw",
        "sgd (momentum 0.9), adam or adamw.",
        panel=_TRAINING,
        choices=("sgd", "adam", "adamw"),
    )
    weight_decay: float = option(1e-4, "Weight decay.", panel=_TRAINING, at_least=0)
    schedule: str = option(
        "cosine",
        "constant, cosine (to 0), or step (a tenth at 1/2 and at 3/4 of the run).",
        panel=_TRAINING,
        choices=("constant", "cosine", "step"),
    )
    uncritical: bool = option(
        False,
        "Train on each batch's least important points (Critical Points++), so that the network "
        "bears missing and added ones.",
        panel=_TRAINING,
    )
    fewest: int = option(
        256,
        "Smallest subset with --uncritical.",
        panel=_TRAINING,
        at_least=1,
        only={"uncritical": (True,)},
    )
    accelerator: str = option(
        "cpu", "cpu, gpu, mps or auto.", panel=_MACHINE, choices=ACCELERATORS, free=True
    )


@dataclass(frozen=True, kw_only=True)
class RobustnessOptions(_TrainingOptions):
    """Train five small networks and compare six defences under seven corruptions at five levels.

    Rows: the plain network; refocused (its dominating points left out, no other training); the same
    after training on uncritical subsets; statistical outlier removal (SOR) first; EPiC, twelve
    votes on partial clouds; EPiC with a refocused thirteenth.

    Writes result.json, robustness.png and networks.safetensors. To evaluate the trained networks on
    other clouds or with another rounding, repeat the command with --networks and another --out.

    Examples:
      cmd-plugin points robustness
      cmd-plugin points robustness --model dgcnn --width 0.125 --epochs 8 --out dgcnn
      cmd-plugin points robustness --networks out/points-robustness --test-clouds 600 --out more
    """

    width: float = _other_default("width", 0.25)
    points: int = _other_default("points", 256)
    train_clouds: int | None = _other_default("train_clouds", 240)
    test_clouds: int | None = _other_default("test_clouds", 60)
    batch_size: int = _other_default("batch_size", 8)
    lr: float = _other_default("lr", 3e-3)
    rounds: int = option(2, "Steps per batch, each with another view.", panel=_TRAINING, at_least=1)
    networks: Path | None = option(
        None,
        "Evaluate the networks of an earlier run (its folder, or its networks.safetensors) instead "
        "of training; give the options they were trained with as well.",
        panel=_EVALUATION,
    )
    released: Path | None = option(
        None,
        "Folder of the released ModelNet-C files (clean.h5, scale_0.h5, ...) to evaluate on; "
        "default: held-out clouds, corrupted here.",
        panel=_EVALUATION,
    )
    rounding: str = option(
        "official",
        "official (three decimals at every stage, as published tables) or exact.",
        panel=_EVALUATION,
        choices=ROUNDINGS,
    )

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the trained networks, as JSON types: all but how they are evaluated."""
        return {name: v for name, v in self.deciding().items() if name not in _HOW_EVALUATED}


@dataclass(frozen=True, kw_only=True)
class ExplainOptions(JobOptions):
    """Show which points of a cloud a network looks at.

    Writes a self-contained interactive page (view.html), a picture (view.png), the cloud coloured
    by the measure (view.ply) and the scores of every point (view.csv); of several clouds in a
    folder for each. The measures hold for the network's whole output; --of-class scores points for
    one class. Says so if the network is much surer of its answer with the cloud's axes in another
    order.

    Examples:
      cmd-plugin points explain chair.ply --weights out/points-train/model.safetensors
      cmd-plugin points explain scan.pcd --weights dgcnn.pt --model dgcnn --measure critical++
      cmd-plugin points explain a.off b.off --weights best.pth --network mine:Net
    """

    clouds: tuple[Path, ...] = argument(
        "One or more files: .npy, .pcd, .ply, .off, .obj, .stl, .glb, .xyz, .txt, .csv or .pts; "
        "also .npy.gz voxel grids.",
        panel=_CLOUD,
        positional=True,
    )
    points: int | None = option(
        None,
        "Points to use; default: as many as the network was trained on, else 1024, or all if the "
        "cloud has fewer.",
        panel=_CLOUD,
        at_least=1,
    )
    item: int = option(0, "Which of several voxel grids.", panel=_CLOUD, at_least=0)
    axes: str = option(
        "xyz",
        "Order of the cloud's axes for the network, such as xzy.",
        panel=_CLOUD,
        choices=_AXES,
    )
    seed: int = option(0, "Of the choice of points.", panel=_CLOUD, at_least=0)
    weights: Path = argument(
        "Weights: of `points train`, or any state_dict (.safetensors, .pt).", panel=_NETWORK
    )
    model: str | None = option(
        None,
        "Architecture, if the weights do not say.",
        panel=_NETWORK,
        choices=NETWORK_NAMES,
    )
    network: str | None = option(
        None,
        "A network of your own, as module:Class; the module may lie in the current folder, and is "
        "run. It takes clouds [B, N, 3] or [B, 3, N].",
        panel=_NETWORK,
    )
    network_args: str | None = option(
        None, "What --network is built with, as a JSON object of arguments.", panel=_NETWORK
    )
    width: float = option(
        1.0,
        "Width of the network, with --model.",
        panel=_NETWORK,
        above=0,
        only={"model": NETWORK_NAMES},
    )
    classes: Path | None = option(
        None, "Text file with one class name a line, for the answer.", panel=_NETWORK
    )
    measure: str = option(
        "fbi",
        "fbi (points needed together), critical (whether a point wins a channel), critical++ (how "
        "many it wins: finds outliers) or entropy (its part in how they are spread).",
        panel=_SCORES,
        choices=MEASURES,
    )
    of_class: str | None = option(
        None,
        "Also score the points by what this class's own output loses without each of them (its "
        "name, or number from 0): as many passes as points.",
        panel=_SCORES,
    )
    refocus: bool = option(False, "Also answer without the points that dominate.", panel=_SCORES)
    up: str = option(
        "z", "Axis that points up in the pictures.", panel=_SCORES, choices=("x", "y", "z")
    )

    def check_together(self) -> None:
        """Refuse what has no effect, and clouds whose files would replace one another."""
        if not self.clouds:
            raise InputError("CLOUDS is empty: give at least one file.")
        for cloud in self.clouds:
            if self.item and not is_voxels(cloud):
                raise InputError(
                    f"--item chooses among the voxel grids of a {_VOXELS} file, and {cloud} is one "
                    "cloud: leave it out."
                )
        names = [name_of(cloud) for cloud in self.clouds]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise InputError(
                f"two clouds are called {twice}, as the folders of their results would be: rename "
                "one, or explain them one by one."
            )
        if self.network is not None and self.model is not None:
            raise InputError("--network and --model name two networks: leave one out.")
        if self.network_args is not None and self.network is None:
            raise InputError("--network-args has an effect only with --network: leave it out.")


def is_voxels(cloud: Path) -> bool:
    """Whether a file holds voxel grids instead of one cloud."""
    return Path(cloud).name.endswith(_VOXELS)


def name_of(cloud: Path) -> str:
    """A cloud's name: that of its file, without its ending."""
    return Path(cloud).name.removesuffix(".gz").rpartition(".")[0] or Path(cloud).name
