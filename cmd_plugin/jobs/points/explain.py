"""Which points of a cloud a network looks at: a page, a picture, a coloured cloud and a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from cmd_plugin.errors import InputError, MissingDependency
from cmd_plugin.jobs.points.network import Explained, find_network
from cmd_plugin.jobs.points.options import ExplainOptions, is_voxels, name_of
from cmd_plugin.pointcloud import point_importance, refocus, unit_sphere
from cmd_plugin.pointcloud.axes import axis_doubt, axis_orders
from cmd_plugin.pointcloud.class_evidence import class_evidence
from cmd_plugin.pointcloud.files import load_cloud, load_voxels, voxel_clouds
from cmd_plugin.pointcloud.outliers import outlier_ranking
from cmd_plugin.pointcloud.plots import plot_views, write_ply, write_view
from cmd_plugin.runs.figures import save_figure
from cmd_plugin.runs.job import Job, make_job
from cmd_plugin.runs.result import Result
from cmd_plugin.runs.table import Table

__all__ = ["run"]

_POINTS = 1024  # of a network that does not say what it was trained on
_STEPS = 3  # that are reported of each cloud


class _Scored(NamedTuple):
    """What was found about a cloud: each point's scores by name, and the rest as JSON types."""

    columns: dict[str, Tensor]
    found: dict[str, Any]
    left_out: dict[str, str]


@make_job("points explain")
def run(job: Job, options: ExplainOptions) -> Result:
    """Score the points of clouds, and write what a person wants to see.

    Written are view.html, view.png, view.ply and view.csv; of several clouds in a folder for each,
    called after it.

    Returns:
        The network's ``answer`` and its ``probability``; ``entropy`` and ``critical_points`` of the
        counts, None if the network has no maximum to count at; the answer ``refocused``, if asked
        for; what the ``scores_hold_for``, and the class of the column ``evidence``, if asked for;
        the ``axes``, and others that suit the network better; what was ``left_out`` and why. Of
        several clouds that by name, under ``clouds``.

    Raises:
        InputError: If a cloud, the weights or the folder cannot be used; all clouds are read first.
        StateMismatch: If the weights do not fit the network.
    """
    explained = find_network(options)
    if options.of_class is not None:
        _label(options.of_class, explained.classes)  # refused before anything is done
    size = options.points or explained.trained_on or _POINTS
    clouds = {name_of(path): _cloud(options, Path(path), size) for path in options.clouds}
    several = len(clouds) > 1
    found = {}
    for number, (name, places) in enumerate(clouds.items()):
        folder = job.folder.path(name if several else ".")
        folder.mkdir(exist_ok=True)
        found[name] = _explain(job, options, explained, places, folder, number, len(clouds))
    points = {name: len(places) for name, places in clouds.items()}
    paths = {name_of(path): str(path) for path in options.clouds}
    (first,) = list(clouds)[:1]
    return job.finish(
        metrics={"clouds": found} if several else found[first],
        data={
            **({"clouds": paths} if several else {"cloud": paths[first]}),
            "points": points if several else points[first],
            "trained_on": explained.trained_on,
            "classes": list(explained.classes),
        },
    )


def _explain(
    job: Job,
    options: ExplainOptions,
    explained: Explained,
    places: Tensor,
    folder: Path,
    number: int,
    clouds: int,
) -> dict[str, Any]:
    """Score one cloud and write its files; what was found as JSON types."""

    def report(what: str, step: int) -> None:
        job.report(what, _STEPS * number + step, _STEPS * clouds)

    network, classes, _ = explained
    columns, found, left_out = _score(options, network, classes, places)
    report("scores", 1)
    title, up = f"{found['answer']} ({100 * found['probability']:.1f} %)", "xyz".index(options.up)
    save_figure(plot_views(places, columns, title, up=up), folder / "view.png")
    write_ply(folder / "view.ply", places, columns[options.measure], options.measure)
    try:
        write_view(folder / "view.html", places, columns, title, up=up)
    except MissingDependency as error:
        left_out["view.html"] = str(error)
    report("pictures", 2)
    _write_table(folder / "view.csv", places, columns)
    axes = _axes(network, places, options.axes)
    report("table", 3)
    return {**found, "axes": axes, "left_out": left_out}


def _cloud(options: ExplainOptions, path: Path, size: int) -> Tensor:
    """The cloud to explain, [N, 3] float32, centred and in the unit sphere."""
    order = ["xyz".index(axis) for axis in options.axes]
    if is_voxels(path):
        grids = load_voxels(path)
        if options.item >= len(grids):
            raise InputError(f"--item must be 0 to {len(grids) - 1}, got {options.item}.")
        chosen = grids[options.item : options.item + 1]
        return voxel_clouds(chosen, size, options.seed)[0][:, order]
    cloud = load_cloud(path, size, options.seed, repeat=False)
    if options.points is not None and len(cloud) < options.points:
        raise InputError(
            f"{path} has {len(cloud)} points, fewer than --points {options.points}: ask for no "
            "more than it has."
        )
    if bool((cloud == cloud[0]).all()):
        raise InputError(
            f"{path} is a single place ({len(cloud)} points at it): give a cloud of points apart."
        )
    return unit_sphere(cloud)[:, order]


def _score(
    options: ExplainOptions, network: nn.Module, classes: tuple[str, ...], places: Tensor
) -> _Scored:
    batch = places.unsqueeze(0)
    seen = point_importance(network, batch, options.measure)  # type: ignore[arg-type]
    columns = {options.measure: seen.scores[0]}
    columns.setdefault("fbi", seen.norm[0])
    found: dict[str, Any] = {
        **_answer(seen.output[0], classes),
        "scores_hold_for": "the whole output",
        "pool": seen.pool,
        "entropy": None,
        "critical_points": None,
    }
    left_out = {}
    try:
        counted = seen if seen.wins is not None else point_importance(network, batch, "critical++")
    except InputError as error:  # a network of the user's, without a maximum
        left_out["critical++"] = str(error)
    else:
        assert counted.wins is not None
        assert counted.entropy is not None
        columns.setdefault("critical++", counted.wins[0].to(seen.norm.dtype))
        found["entropy"] = float(counted.entropy[0])
        found["critical_points"] = int((counted.wins[0] > 0).sum())
    if options.of_class is not None:
        label = _label(options.of_class, classes)
        columns["evidence"] = class_evidence(network, places, label)
        found["evidence_for"] = classes[label]
    if options.refocus:
        again = refocus(network, batch)
        # Whether counts find outliers differs between networks: measured on this one, for the
        # reader who is about to trust the answer without the points they name.
        ranking = outlier_ranking(network, batch, seed=options.seed)
        found["refocused"] = {
            **_answer(again.output[0], classes),
            "kept": int(again.kept.sum()),
            "outlier_auroc": ranking.counts,
            "counts_tell_outliers": ranking.counts_tell,
        }
    return _Scored(columns, found, left_out)


def _label(name: str, classes: tuple[str, ...]) -> int:
    """The number of a class that is given by its name or number.

    Raises:
        InputError: If there is none.
    """
    if name in classes:
        return classes.index(name)
    if name.isdecimal() and len(name) < 10 and int(name) < len(classes):
        return int(name)
    raise InputError(
        f"--of-class {name} is none of the {len(classes)} classes: give a name ({classes[0]}, ...) "
        "or a number from 0."
    )


def _answer(output: Tensor, classes: tuple[str, ...]) -> dict[str, Any]:
    probability = output.softmax(dim=0)
    best = int(probability.argmax())
    return {"answer": classes[best], "probability": float(probability[best])}


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
