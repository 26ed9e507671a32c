"""`cmd-plugin points explain`: which points of a cloud a network looks at."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["explain"]


def explain(
    cloud: Annotated[
        Path,
        typer.Argument(
            help=".npy, .pcd, .ply, .off, .obj, .stl or .xyz; also .npy.gz voxel grids."
        ),
    ],
    weights: Annotated[
        Path,
        typer.Option(help="Weights: of `points train`, or any state_dict (.safetensors, .pt)."),
    ],
    measure: Annotated[str, typer.Option(help="fbi, critical, critical++ or entropy.")] = "fbi",
    out: Annotated[
        Path,
        typer.Option(
            help="The interactive page to write; picture and table are written beside it."
        ),
    ] = Path("view.html"),
    model: Annotated[
        str | None,
        typer.Option(help="Network, if the weights do not say: pointnet, dgcnn, pct, ..."),
    ] = None,
    classes: Annotated[
        Path | None, typer.Option(help="Text file with one class name a line, for the answer.")
    ] = None,
    width: Annotated[float, typer.Option(help="Width of the network, with --model.")] = 1.0,
    cloud_points: Annotated[
        int | None,
        typer.Option(
            "--points", help="Points to use; default: those it was trained on, else 1024."
        ),
    ] = None,
    item: Annotated[int, typer.Option(help="Which of several voxel grids.")] = 0,
    axes: Annotated[
        str, typer.Option(help="Order of the cloud's axes for the network, such as xzy.")
    ] = "xyz",
    up: Annotated[str, typer.Option(help="Axis that points up in the pictures.")] = "z",
    refocused: Annotated[
        bool,
        typer.Option("--refocus", help="Also answer without the points that dominate."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the choice of points.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON only.")] = False,
) -> None:
    """Show which points of a cloud a network looks at.

    Writes a self-contained interactive page (view.html), a picture (view.png) and the scores of
    every point (view.csv). The scores hold for the network's whole output, not for one class.
    Says so if the network is much surer of its answer with the cloud's axes in another order.

    \b
    Example:
      cmd-plugin points explain chair.ply --weights points/model.safetensors --measure fbi
    """  # noqa: D301
    from cmd_plugin.cli._output import own_warnings, prepare_folder, stdout_for_results

    with stdout_for_results(), own_warnings():
        from cmd_plugin.errors import InputError, require

        if out.suffix.lower() != ".html":
            raise InputError(f"--out {out} must end in .html.")
        order = _axis_order(axes)
        if up not in ("x", "y", "z"):
            raise InputError(f"--up must be x, y or z, got {up}.")
        require("plotly", "points")
        prepare_folder(out.parent)
        network, names, trained_on = _network(weights, model, classes, width)
        size = cloud_points or trained_on or 1024
        places = _cloud(cloud, item, size, seed, order)
        result = _explain(network, names, places, measure, refocused, "xyz".index(up), out)
        result["axes"] = _axes(network, places, order)
    result = {"cloud": str(cloud), "weights": str(weights), "points": len(places), **result}
    if as_json:
        typer.echo(json.dumps(result, indent=2, allow_nan=False))
        return
    answer, sure = result["answer"], 100 * result["probability"]
    typer.echo(f"answer: {answer} ({sure:.1f} %), pool: {result['pool']}")
    if result["entropy"] is not None:
        typer.echo(
            f"focus: H = {result['entropy']:.3f}, {result['critical_points']} critical points of "
            f"{len(places)}"
        )
    if refocused:
        again = result["refocused"]
        typer.echo(
            f"refocused on {again['kept']} points: {again['answer']} "
            f"({100 * again['probability']:.1f} %)"
        )
    if result["axes"]["better"] is not None:
        typer.echo(
            f"axes: with --axes {result['axes']['better']} the network is "
            f"{100 * result['axes']['better_confidence']:.1f} % sure of its answer, with "
            f"{result['axes']['given']} as here {100 * result['axes']['confidence']:.1f} %: was it "
            "trained with another axis up?"
        )
    for path in result["wrote"]:
        typer.echo(f"wrote {path}")


def _axis_order(text: str) -> list[int]:
    from cmd_plugin.errors import InputError

    if sorted(text) != ["x", "y", "z"]:
        raise InputError(f"--axes must hold x, y and z once each, got {text}.")
    return ["xyz".index(axis) for axis in text]


def _axes(network: nn.Module, places: Tensor, order: list[int]) -> dict[str, Any]:
    """Whether another order of the axes suits the network better; ``order`` is that of now."""
    from cmd_plugin.pointcloud.weights import axis_doubt, axis_orders

    orders = axis_orders(network, places.unsqueeze(0))
    given = next(o.confidence for o in orders if o.axes == (0, 1, 2))
    better = axis_doubt(orders)
    names = None if better is None else "".join("xyz"[order[axis]] for axis in better.axes)
    return {
        "given": "".join("xyz"[axis] for axis in order),
        "confidence": given,
        "better": names,
        "better_confidence": None if better is None else better.confidence,
    }


def _network(
    weights: Path, model: str | None, classes: Path | None, width: float
) -> tuple[nn.Module, tuple[str, ...], int | None]:
    """The network, its class names, and the number of points it was trained on, if known."""
    from cmd_plugin.errors import InputError
    from cmd_plugin.pointcloud.networks import build_network
    from cmd_plugin.pointcloud.weights import load_weights, read_weights
    from cmd_plugin.training.points import is_trained, load_trained

    names: tuple[str, ...] = ()
    if classes is not None:
        if not classes.is_file():
            raise InputError(f"there is no file --classes {classes}: check the path.")
        names = tuple(classes.read_text(encoding="utf-8").split("\n"))
        names = tuple(name.strip() for name in names if name.strip())
    if model is None and weights.is_file() and is_trained(weights):
        network, own, size = load_trained(weights)
        return network, names or own, size
    state = read_weights(weights)
    if model is None:
        raise InputError(f"{weights} does not say which network it belongs to: pass --model.")
    # The last weight matrix of a classifier has one row for each class.
    outputs = [tensor.shape[0] for tensor in state.values() if tensor.ndim == 2][-1:]
    if not outputs:
        raise InputError(f"{weights} holds no linear layer: these are no weights of {model}.")
    network = build_network(model, outputs[0], width)
    load_weights(network, weights)
    if names and len(names) != outputs[0]:
        raise InputError(f"{classes} has {len(names)} names, the network {outputs[0]} outputs.")
    return network.eval(), names or tuple(f"class {n}" for n in range(outputs[0])), None


def _cloud(path: Path, item: int, size: int, seed: int, order: list[int]) -> Tensor:
    """The cloud to explain, [N, 3], centred and in the unit sphere."""
    from cmd_plugin.errors import InputError
    from cmd_plugin.pointcloud import unit_sphere
    from cmd_plugin.pointcloud.files import load_cloud, load_voxels, voxel_clouds

    if path.name.endswith(".npy.gz"):
        grids = load_voxels(path)
        if not 0 <= item < len(grids):
            raise InputError(f"--item must be 0 to {len(grids) - 1}, got {item}.")
        return voxel_clouds(grids[item : item + 1], size, seed)[0][:, order]
    return unit_sphere(load_cloud(path, size, seed))[:, order]


def _explain(
    network: nn.Module,
    names: tuple[str, ...],
    places: Tensor,
    measure: str,
    refocused: bool,
    up: int,
    out: Path,
) -> dict[str, Any]:
    """Score, write the three files, and return what was found."""
    from cmd_plugin.pointcloud import point_importance, refocus
    from cmd_plugin.pointcloud.plots import plot_views, write_view

    batch = places.unsqueeze(0)
    seen = point_importance(network, batch, measure)  # type: ignore[arg-type]
    counted = seen if seen.wins is not None else point_importance(network, batch, "critical++")
    assert counted.wins is not None  # our networks end in a maximum
    assert counted.entropy is not None
    columns = {measure: seen.scores[0]}
    columns.setdefault("fbi", seen.norm[0])
    columns.setdefault("critical++", counted.wins[0].to(seen.norm.dtype))
    answer = _answer(seen.output[0], names)
    title = f"{answer['answer']} ({100 * answer['probability']:.1f} %)"
    write_view(out, places, columns, title, up=up)
    shares = {name: values / values.max().clamp_min(1e-9) for name, values in columns.items()}
    plot_views(places, shares, title, up=up).savefig(out.with_suffix(".png"), dpi=130)
    with out.with_suffix(".csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["point", "x", "y", "z", *columns])
        for number, place in enumerate(places.tolist()):
            values = [f"{float(column[number]):.9g}" for column in columns.values()]
            writer.writerow([number, *(f"{value:.9g}" for value in place), *values])
    result: dict[str, Any] = {
        **answer,
        "measure": measure,
        "pool": seen.pool,
        "entropy": float(counted.entropy[0]),
        "critical_points": int((counted.wins[0] > 0).sum()),
        "wrote": [str(out), str(out.with_suffix(".png")), str(out.with_suffix(".csv"))],
    }
    if refocused:
        again = refocus(network, batch)
        result["refocused"] = {
            **_answer(again.output[0], names),
            "kept": int(again.kept.sum()),
        }
    return result


def _answer(output: Tensor, names: tuple[str, ...]) -> dict[str, Any]:
    probability = output.softmax(dim=0)
    best = int(probability.argmax())
    return {"answer": names[best], "probability": float(probability[best])}
