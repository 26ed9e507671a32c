"""Post-hoc modes of anyone's checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmd_plugin.errors import InputError
from cmd_plugin.runs.figures import figure_style, new_figure, save_figure
from cmd_plugin.runs.job import Job, make_job
from cmd_plugin.runs.options import JobOptions, argument, option
from cmd_plugin.runs.result import Result, finite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cmd_plugin.modes import Decomposition

__all__ = ["DecomposeOptions", "run"]

_MODES = "modes.safetensors"
_TENSORS = "Checkpoints and tensors"
_METHOD = "Modes"


@dataclass(frozen=True, kw_only=True)
class DecomposeOptions(JobOptions):
    """Cluster the weight trajectories of a finished training run into modes.

    Reads Lightning .ckpt, .pt, .pth, .bin and .safetensors files, also in shards, one at a time
    and in the order they were written. Writes modes.safetensors, result.json and
    decomposition.png, and with --export the reconstructed state_dict of an epoch.

    Examples:
      cmd-plugin decompose lightning_logs/version_0 --modes 5 --export 7
      cmd-plugin decompose run/checkpoint-* --out run/modes
    """

    inputs: tuple[Path, ...] = argument(
        "A run's folder, a folder of checkpoints, or checkpoint files.",
        panel=_TENSORS,
        positional=True,
    )
    include: tuple[str, ...] = option(
        (), "Glob: only tensors whose name it matches, as conv* (repeatable).", panel=_TENSORS
    )
    exclude: tuple[str, ...] = option(
        (), "Glob: no tensor whose name it matches (repeatable).", panel=_TENSORS
    )
    buffers: str = option(
        "model",
        "BatchNorm statistics: model, or keep (leave them out).",
        panel=_TENSORS,
        choices=("model", "keep"),
    )
    skip_unreadable: bool = option(
        False, "Leave damaged files out, with a warning.", panel=_TENSORS
    )
    storage: str = option(
        "delta-bf16",
        "delta-bf16 or fp32: snapshots in memory.",
        panel=_TENSORS,
        choices=("delta-bf16", "fp32"),
    )
    modes: int = option(
        10, "Largest number of modes, 1 to 256.", panel=_METHOD, at_least=1, at_most=256
    )
    samples: int = option(
        1000, "Weights whose trajectories are clustered.", panel=_METHOD, at_least=1
    )
    seed: int = option(0, "Seed of the draw of the samples.", panel=_METHOD, at_least=0)
    profile: str = option(
        "reference",
        "What a mode follows: its reference weight, or the mean of its samples.",
        panel=_METHOD,
        choices=("reference", "mean"),
    )
    shrink: bool = option(False, "Shrink scales by squared correlation.", panel=_METHOD)
    export: tuple[int, ...] = option(
        (),
        "Write the reconstructed state_dict of this epoch, or step where steps number the files "
        "(repeatable).",
        panel=_METHOD,
    )

    def check_together(self) -> None:
        """Refuse a call from Python with no input at all."""
        if not self.inputs:
            raise InputError("INPUTS must name at least one checkpoint or folder.")


@make_job("decompose")
def run(job: Job, options: DecomposeOptions) -> Result:
    """Decompose a training history, and measure on its files what the modes lose.

    Returns:
        Metrics: ``explained_variance`` (None if nothing moves), ``modes``, ``snapshots``,
        ``parameters``, ``epochs``, one entry a tensor in ``layers``, and as a codec
        ``compression_ratio``, ``relative_error``, ``weight_bytes``, ``checkpoint_bytes``,
        ``modes_bytes``. Data: ``checkpoints`` that were read, the ``unit`` that numbers them
        (epoch, step or snapshot), and ``left_out``, a sentence about each that cannot be read.

    Raises:
        InputError: If a file, the folder or an option cannot be used.
    """
    from cmd_plugin.modes import Decomposition
    from cmd_plugin.modes.codec import describe_layers
    from cmd_plugin.networks.checkpoints import find_checkpoints

    files = find_checkpoints(options.inputs)
    data = job.stage("modes", lambda: _find_modes(job, options, files))
    for problem in data["left_out"]:
        warnings.warn(f"left out: {problem}", stacklevel=2)
    decomposition = Decomposition.load(job.folder.path(_MODES))
    _export(job, decomposition, data["unit"], options.export)
    codec = job.stage("codec", lambda: _measure(job, decomposition, data["checkpoints"]))
    figure = _draw(decomposition, data["unit"])
    save_figure(figure, job.folder.path("decomposition.png"), options.as_dict())
    layers = [asdict(layer) for layer in describe_layers(decomposition)]
    metrics = {
        "explained_variance": finite(decomposition.explained_variance()),
        "modes": decomposition.number_of_modes,
        "snapshots": decomposition.snapshots,
        "parameters": decomposition.numel,
        **codec,
        "epochs": list(decomposition.epochs),
        "layers": [
            {**layer, "explained_variance": finite(layer["explained_variance"])}
            for layer in layers  # NaN: the tensor does not move
        ],
    }
    return job.finish(metrics=metrics, data=data)


def _find_modes(job: Job, options: DecomposeOptions, files: Sequence[Path]) -> dict[str, Any]:
    """Write the decomposition; what it was made from."""
    from cmd_plugin.modes import decompose
    from cmd_plugin.networks.checkpoints import readable_checkpoints

    problems: list[str] = []
    if options.skip_unreadable:
        files, problems = readable_checkpoints(files)
    decomposition = decompose(
        files,
        options.modes,
        options.samples,
        options.seed,
        storage=options.storage,
        buffers=options.buffers,
        include=options.include,
        exclude=options.exclude,
        profile=options.profile,
        shrink=options.shrink,
        progress=lambda done, total: job.report("reading checkpoints", done, 2 * total),
    )
    decomposition.save(job.folder.path(_MODES))
    return {
        "checkpoints": [str(file) for file in files],
        "unit": _unit(files, decomposition.epochs),
        "left_out": problems,
    }


def _unit(files: Sequence[Path], labels: Sequence[int]) -> str:
    """Return what the labels of the snapshots count."""
    from cmd_plugin.networks.checkpoints import moment_of

    moments = [moment_of(file) for file in files]
    for unit in ("epoch", "step"):
        if [getattr(moment, unit) for moment in moments] == list(labels):
            return unit
    return "snapshot"


def _measure(job: Job, decomposition: Decomposition, files: Sequence[str]) -> Mapping[str, Any]:
    """Return what the decomposition saves and loses as a codec."""
    from cmd_plugin.modes.codec import measure_codec

    codec = measure_codec(
        [Path(file) for file in files],
        decomposition,
        job.folder.path(_MODES),
        lambda done, total: job.report("measuring the error", total + done, 2 * total),
    )
    return {"compression_ratio": codec.compression_ratio, **asdict(codec)}


def _export(job: Job, decomposition: Decomposition, unit: str, labels: Sequence[int]) -> None:
    from cmd_plugin.networks.weights import save_weights

    snapshots = {label: decomposition.snapshot_of(label) for label in labels}  # all, or none
    for label, snapshot in snapshots.items():
        path = job.folder.path(f"{unit}={label:03d}.safetensors")
        save_weights(path, decomposition.state_dict_at(snapshot))


def _draw(decomposition: Decomposition, unit: str) -> Figure:
    from cmd_plugin.modes.plots import plot_explained, plot_mode_share, plot_profiles

    with figure_style():
        figure = new_figure(15.0, 5.5)
        profiles, shares, explained = figure.subplots(1, 3)
        plot_profiles(decomposition, profiles)
        profiles.set_xlabel(unit)
        plot_mode_share(decomposition, shares)
        plot_explained(decomposition, explained)
    return figure
