"""`cmd-plugin points robustness`: what helps a point network against corrupted clouds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cmd_plugin.pointcloud.diversity import Diversity
    from cmd_plugin.pointcloud.robustness import RobustnessReport

__all__ = ["robustness"]

_DATA = "Data and network"
_TRAINING = "Training"
_OUTPUT = "Output"


def robustness(
    data: Annotated[
        str,
        typer.Option(
            help="shapes (procedural, embedded), chairs-monitors or hdf5, as for `points train`.",
            rich_help_panel=_DATA,
        ),
    ] = "shapes",
    data_root: Annotated[
        str | None,
        typer.Option(
            help="Where data lies. Default: environment variable CMD_PLUGIN_DATA.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    released: Annotated[
        str | None,
        typer.Option(
            help="Folder of the released ModelNet-C files (clean.h5, scale_0.h5, ...) to evaluate "
            "on; default: held-out clouds, corrupted here.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            help="pointnet, pointnet-aligned, pointnet2, dgcnn or pct.", rich_help_panel=_DATA
        ),
    ] = "pointnet",
    width: Annotated[
        float,
        typer.Option(
            help="Multiplies every hidden width; 1 is as published.", rich_help_panel=_DATA
        ),
    ] = 0.25,
    cloud_points: Annotated[
        int, typer.Option("--points", help="Points in a clean cloud.", rich_help_panel=_DATA)
    ] = 256,
    train_clouds: Annotated[
        int, typer.Option(help="Use so many training clouds.", rich_help_panel=_DATA)
    ] = 240,
    test_clouds: Annotated[
        int, typer.Option(help="Use so many held-out clouds.", rich_help_panel=_DATA)
    ] = 60,
    epochs: Annotated[
        int, typer.Option(help="Epochs of each of the five networks.", rich_help_panel=_TRAINING)
    ] = 15,
    rounds: Annotated[
        int,
        typer.Option(help="Steps per batch, each with another view.", rich_help_panel=_TRAINING),
    ] = 2,
    batch_size: Annotated[
        int, typer.Option(help="Clouds in a step.", rich_help_panel=_TRAINING)
    ] = 8,
    lr: Annotated[
        float, typer.Option(help="Learning rate of AdamW.", rich_help_panel=_TRAINING)
    ] = 3e-3,
    seed: Annotated[
        int,
        typer.Option(help="Of data, weights, views and corruptions.", rich_help_panel=_TRAINING),
    ] = 0,
    rounding: Annotated[
        str,
        typer.Option(
            help="official (three decimals at every stage, as published tables) or exact.",
            rich_help_panel=_OUTPUT,
        ),
    ] = "official",
    threads: Annotated[
        int | None,
        typer.Option(help="CPU threads; default: torch's choice.", rich_help_panel=_OUTPUT),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for all results; networks of an earlier run there are used again.",
            rich_help_panel=_OUTPUT,
        ),
    ] = Path("robustness"),
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print result.json and nothing else.", rich_help_panel=_OUTPUT),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="No progress bar.", rich_help_panel=_OUTPUT)
    ] = False,
) -> None:
    """Train five small networks and compare six defences under seven corruptions at five levels.

    Rows: the plain network; refocused (its dominating points left out, no other training); the same
    after training on uncritical subsets; statistical outlier removal (SOR) first; EPiC, twelve
    votes on partial clouds; EPiC with a refocused thirteenth. Writes result.json, robustness.png
    and networks.safetensors.

    \b
    Examples:
      cmd-plugin points robustness
      cmd-plugin points robustness --model dgcnn --width 0.125 --epochs 8 --out dgcnn
    """  # noqa: D301
    from cmd_plugin.cli._output import own_warnings, prepare_folder, stdout_for_results

    with stdout_for_results(), own_warnings():
        from cmd_plugin.training.point_robustness import PointRobustnessConfig, run_robustness

        config = PointRobustnessConfig(
            data=data,
            data_root=data_root,
            released=released,
            points=cloud_points,
            train_clouds=train_clouds,
            test_clouds=test_clouds,
            model=model,
            width=width,
            epochs=epochs,
            rounds=rounds,
            batch_size=batch_size,
            lr=lr,
            rounding=rounding,  # type: ignore[arg-type]
            seed=seed,
            threads=threads,
        )
        prepare_folder(out)
        try:
            with _progress(shown=not (as_json or quiet)) as progress:
                run = run_robustness(config, out, progress)
        except KeyboardInterrupt:
            message = f"interrupted: trained networks are kept in {out}; the same command goes on."
            typer.echo(message, err=True)
            raise typer.Exit(130) from None
    if as_json:
        typer.echo(json.dumps(run.summary, indent=2, allow_nan=False))
        return
    _print(run.report)
    if run.summary["networks_reused"]:
        typer.echo(f"networks were taken from {out / 'networks.safetensors'}")
    for name in ("result.json", "robustness.png", "networks.safetensors"):
        typer.echo(
            f"wrote {out / name}" if name != "networks.safetensors" else f"kept {out / name}"
        )


@contextmanager
def _progress(*, shown: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar on stderr for each stage, if that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress, TaskID

    console = Console(stderr=True)
    if not shown or not console.is_terminal:
        yield None
        return
    with Progress(console=console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield update


def _print(report: RobustnessReport) -> None:
    from rich.console import Console
    from rich.table import Table

    from cmd_plugin.pointcloud.corruptions import CORRUPTIONS

    console = Console()
    cells = Table(title=f"Accuracy on {report.clouds} clouds, level by level")
    for column in ("corruption", "row"):
        cells.add_column(column)
    for column in ("clean", "0", "1", "2", "3", "4", "mean", "CE"):
        cells.add_column(column, justify="right")
    for corruption in CORRUPTIONS:
        for name, accuracy in report.accuracy.items():
            first = name == next(iter(report.accuracy))
            found = report.summaries[name]
            cells.add_row(
                corruption if first else "",
                name,
                *(f"{value:.3f}" for value in (*accuracy["clean"], *accuracy[corruption])),
                f"{found.accuracy[corruption]:.3f}",
                f"{found.ce[corruption]:.3f}",
                end_section=name == list(report.accuracy)[-1],
            )
    console.print(cells)
    table = Table(title="Summary (mCE 1 is the published DGCNN on ModelNet-C; lower is better)")
    table.add_column("row")
    for column in ("clean", "mOA", "mCE", "RmCE", "mCE against plain"):
        table.add_column(column, justify="right")
    base = report.summaries["plain"].mce
    for name, found in report.summaries.items():
        table.add_row(
            name,
            f"{found.clean:.3f}",
            f"{found.moa:.3f}",
            f"{found.mce:.3f}",
            f"{found.rmce:.3f}",
            f"{found.mce / base - 1:+.1%}" if base else "",
        )
    console.print(table)
    console.print(_members(report.diversity["EPiC"]["all"]))


def _members(found: Diversity) -> str:
    """One sentence on EPiC's members."""
    accuracy = {
        view: [
            float(value)
            for value, name in zip(found.accuracy, found.views, strict=True)
            if name == view
        ]
        for view in dict.fromkeys(found.views)
    }
    parts = ", ".join(f"{view} {sum(row) / len(row):.3f}" for view, row in accuracy.items())
    return (
        f"EPiC's members on all sets: {parts}; their vote {found.ensemble_accuracy:.3f}, "
        f"{found.gap:+.3f} against the mean member; errors correlate by "
        f"{found.overall()['error_correlation']:.2f}."
    )
