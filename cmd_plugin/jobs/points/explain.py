"""Which points of a cloud a network looks at: a page, a picture and a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from cmd_plugin.errors import InputError, MissingDependency
from cmd_plugin.jobs.points.model import is_point_network, load_point_network
from cmd_plugin.jobs.points.options import ExplainOptions
from cmd_plugin.networks import load_weights, read_weights
from cmd_plugin.pointcloud import build_network, point_importance, refocus, unit_sphere
from cmd_plugin.pointcloud.axes import axis_doubt, axis_orders
from cmd_plugin.pointcloud.files import load_cloud, load_voxels, voxel_clouds
from cmd_plugin.pointcloud.plots import plot_views, write_view
from cmd_plugin.runs.figures import save_figure
from cmd_plugin.runs.job import Job
from cmd_plugin.runs.progress import ReportProgress
from cmd_plugin.runs.result import Result
from cmd_plugin.runs.table import Table

__all__ = ["run"]

_POINTS = 1024  # of a network that does not say what it was trained on


class _Scored(NamedTuple):
    """What was found about a cloud: each point's scores by name, and the rest as JSON types."""

    columns: dict[str, Tensor]
    found: dict[str, Any]


def run(
    options: ExplainOptions,
    out: str | Path | None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: ReportProgress | None = None,
) -> Result:
    """Score the points of a cloud, and write what a person wants to see.

    Args:
        options: The options.
        out: Folder for view.html, view.png, view.csv and result.json; None keeps nothing.
        resume: Go on with an unfinished run in ``out``, from its start.
        overwrite: Replace what lies in ``out``.
        progress: Called when the scores and each file are there.

    Returns:
        The network's ``answer`` and its ``probability``; ``entropy`` and ``critical_points`` of the
        counts; the answer ``refocused``, if asked for; the ``axes``, and others that suit the
        network better; what was ``left_out`` and why.

    Raises:
        InputError: If cloud, weights or folder cannot be used.
        StateMismatch: If the weights do not fit the network.
    """
    network, classes, trained_on = _network(options)
    places = _cloud(options, options.points or trained_on or _POINTS)
    with Job(
        "points explain", options, out, resume=resume, overwrite=overwrite, progress=progress
    ) as job:
        if job.result is not None:
            return job.result
        columns, found = _score(options, network, classes, places)
        job.report("scores", 1, 3)
        title = f"{found['answer']} ({100 * found['probability']:.1f} %)"
        left_out = _draw(job, places, columns, title, "xyz".index(options.up))
        job.report("pictures", 2, 3)
        _write_table(job.folder.path("view.csv"), places, columns)
        axes = _axes(network, places, options.axes)
        job.report("table", 3, 3)
        return job.finish(
            metrics={**found, "axes": axes, "left_out": left_out},
            data={"cloud": str(options.cloud), "points": len(places), "classes": list(classes)},
        )


def _network(options: ExplainOptions) -> tuple[nn.Module, tuple[str, ...], int | None]:
    """The network, its class names, and the number of points it was trained on, if known."""
    weights = Path(options.weights)
    trained_on: int | None = None
    if options.model is None and weights.is_file() and is_point_network(weights):
        trained = load_point_network(weights)
        network, names, trained_on = trained.network, trained.classes, trained.points
    else:
        network, outputs = _foreign_network(weights, options.model, options.width)
        names = tuple(f"class {number}" for number in range(outputs))
    if options.classes is not None:
        given = _read_names(Path(options.classes))
        if len(given) != len(names):
            raise InputError(
                f"{options.classes} has {len(given)} names, the network {len(names)} outputs."
            )
        names = given
    return network, names, trained_on


def _foreign_network(weights: Path, model: str | None, width: float) -> tuple[nn.Module, int]:
    """A network around weights that do not say which it is, and the number of its outputs."""
    state = read_weights(weights)
    if model is None:
        raise InputError(f"{weights} does not say which network it belongs to: pass --model.")
    # The last weight matrix of a classifier has one row for each class.
    outputs = [tensor.shape[0] for tensor in state.values() if tensor.ndim == 2][-1:]
    if not outputs:
        raise InputError(f"{weights} holds no linear layer: these are no weights of {model}.")
    network = build_network(model, outputs[0], width)
    load_weights(network, weights)
    return network.eval(), outputs[0]


def _read_names(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        raise InputError(f"there is no file --classes {path}: check the path.")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--classes {path} cannot be read ({error}): give a text file.") from error
    return tuple(name for line in lines if (name := line.strip()))


def _cloud(options: ExplainOptions, size: int) -> Tensor:
    """The cloud to explain, [N, 3] float32, centred and in the unit sphere."""
    path, order = Path(options.cloud), ["xyz".index(axis) for axis in options.axes]
    if not options.voxels:
        return unit_sphere(load_cloud(path, size, options.seed))[:, order]
    grids = load_voxels(path)
    if options.item >= len(grids):
        raise InputError(f"--item must be 0 to {len(grids) - 1}, got {options.item}.")
    chosen = grids[options.item : options.item + 1]
    return voxel_clouds(chosen, size, options.seed)[0][:, order]


def _score(
    options: ExplainOptions, network: nn.Module, classes: tuple[str, ...], places: Tensor
) -> _Scored:
    batch = places.unsqueeze(0)
    seen = point_importance(network, batch, options.measure)  # type: ignore[arg-type]
    counted = seen if seen.wins is not None else point_importance(network, batch, "critical++")
    assert counted.wins is not None  # our networks end in a maximum
    assert counted.entropy is not None
    columns = {options.measure: seen.scores[0]}
    columns.setdefault("fbi", seen.norm[0])
    columns.setdefault("critical++", counted.wins[0].to(seen.norm.dtype))
    found: dict[str, Any] = {
        **_answer(seen.output[0], classes),
        "pool": seen.pool,
        "entropy": float(counted.entropy[0]),
        "critical_points": int((counted.wins[0] > 0).sum()),
    }
    if options.refocus:
        again = refocus(network, batch)
        found["refocused"] = {**_answer(again.output[0], classes), "kept": int(again.kept.sum())}
    return _Scored(columns, found)


def _answer(output: Tensor, classes: tuple[str, ...]) -> dict[str, Any]:
    probability = output.softmax(dim=0)
    best = int(probability.argmax())
    return {"answer": classes[best], "probability": float(probability[best])}


def _draw(
    job: Job, places: Tensor, columns: Mapping[str, Tensor], title: str, up: int
) -> dict[str, str]:
    """Write picture and page; return what could not be written, and why."""
    shares = {name: values / values.max().clamp_min(1e-9) for name, values in columns.items()}
    save_figure(plot_views(places, shares, title, up=up), job.folder.path("view.png"))
    try:
        write_view(job.folder.path("view.html"), places, columns, title, up=up)
    except MissingDependency as error:
        return {"view.html": str(error)}
    return {}


def _write_table(path: Path, places: Tensor, columns: Mapping[str, Tensor]) -> None:
    """Write one row a point: its number, coordinates, and scores, to nine digits."""
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    rows = (
        (number, *(f"{value:.9g}" for value in (*place, *scores)))
        for number, (place, scores) in enumerate(zip(places.tolist(), values, strict=True))
    )
    names: dict[str, Any] = {"point": int, **dict.fromkeys(("x", "y", "z", *columns), float)}
    Table(path, names).replace(rows)


def _axes(network: nn.Module, places: Tensor, given: str) -> dict[str, Any]:
    """Whether another order of the axes suits the network better; ``given`` is that of now."""
    orders = axis_orders(network, places.unsqueeze(0))
    better = axis_doubt(orders)
    return {
        "given": given,
        "confidence": next(o.confidence for o in orders if o.axes == (0, 1, 2)),
        "better": None if better is None else "".join(given[axis] for axis in better.axes),
        "better_confidence": None if better is None else better.confidence,
    }
