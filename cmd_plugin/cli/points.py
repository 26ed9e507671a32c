"""`cmd-plugin points`: its commands, and the training of point-cloud networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cmd_plugin.cli.points_explain import explain
from cmd_plugin.cli.points_robustness import robustness

__all__ = ["points"]

points = typer.Typer(
    name="points",
    no_args_is_help=True,
    help="Point clouds: train a network, and see what it looks at.",
)

_DATA = "Data and network"
_TRAINING = "Training"
_OUTPUT = "Output"


points.command("explain")(explain)
points.command("robustness")(robustness)


@points.command("train")
def train(
    data: Annotated[
        str,
        typer.Option(
            help="shapes (twelve procedural classes, embedded), chairs-monitors (voxel grids of "
            "ModelNet10) or hdf5 (files named *train*.h5 and *test*.h5, as ModelNet40 comes).",
            rich_help_panel=_DATA,
        ),
    ] = "shapes",
    data_root: Annotated[
        str | None,
        typer.Option(
            help="Where data lies. Default: environment variable CMD_PLUGIN_DATA. Nothing is "
            "downloaded.",
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
    ] = 0.5,
    cloud_points: Annotated[
        int, typer.Option("--points", help="Points in a cloud.", rich_help_panel=_DATA)
    ] = 512,
    train_clouds: Annotated[
        int | None,
        typer.Option(help="Use so many training clouds.", rich_help_panel=_DATA),
    ] = None,
    test_clouds: Annotated[
        int | None, typer.Option(help="Use so many held-out clouds.", rich_help_panel=_DATA)
    ] = None,
    epochs: Annotated[int, typer.Option(help="Epochs.", rich_help_panel=_TRAINING)] = 15,
    batch_size: Annotated[
        int, typer.Option(help="Clouds in a step.", rich_help_panel=_TRAINING)
    ] = 32,
    optimizer: Annotated[
        str, typer.Option(help="sgd (momentum 0.9), adam or adamw.", rich_help_panel=_TRAINING)
    ] = "adamw",
    lr: Annotated[float, typer.Option(help="Learning rate.", rich_help_panel=_TRAINING)] = 2e-3,
    weight_decay: Annotated[
        float, typer.Option(help="Weight decay.", rich_help_panel=_TRAINING)
    ] = 1e-4,
    schedule: Annotated[
        str, typer.Option(help="constant, cosine or step.", rich_help_panel=_TRAINING)
    ] = "cosine",
    uncritical: Annotated[
        bool,
        typer.Option(
            "--uncritical",
            help="Train on each batch's least important points (Critical Points++), so that the "
            "network bears missing and added ones.",
            rich_help_panel=_TRAINING,
        ),
    ] = False,
    fewest: Annotated[
        int,
        typer.Option(help="Smallest subset with --uncritical.", rich_help_panel=_TRAINING),
    ] = 256,
    seed: Annotated[
        int,
        typer.Option(help="Of data, initial weights and order.", rich_help_panel=_TRAINING),
    ] = 0,
    threads: Annotated[
        int | None,
        typer.Option(help="CPU threads; default: torch's choice.", rich_help_panel=_OUTPUT),
    ] = None,
    accelerator: Annotated[
        str, typer.Option(help="cpu, gpu, mps or auto.", rich_help_panel=_OUTPUT)
    ] = "cpu",
    out: Annotated[
        Path, typer.Option(help="Folder for all results.", rich_help_panel=_OUTPUT)
    ] = Path("points"),
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the interrupted run in --out; it ends as if never interrupted.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace an unfinished run in --out.", rich_help_panel=_OUTPUT
        ),
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print result.json and nothing else.", rich_help_panel=_OUTPUT),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="No progress bar.", rich_help_panel=_OUTPUT)
    ] = False,
) -> None:
    """Train a point-cloud network and evaluate it on held-out clouds after every epoch.

    Writes metrics.csv, result.json and model.safetensors, which `points explain` takes.

    \b
    Examples:
      cmd-plugin points train --epochs 15
      cmd-plugin points train --data chairs-monitors --data-root DATA --epochs 5 --out chairs
    """  # noqa: D301
    from cmd_plugin.cli._output import epoch_bar, own_warnings, stdout_for_results

    with stdout_for_results(), own_warnings():
        from cmd_plugin.training.points import PointTrainConfig, train_points

        config = PointTrainConfig(
            data=data,
            data_root=data_root,
            points=cloud_points,
            train_clouds=train_clouds,
            test_clouds=test_clouds,
            model=model,
            width=width,
            epochs=epochs,
            batch_size=batch_size,
            optimizer=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            schedule=schedule,
            uncritical=uncritical,
            fewest=fewest,
            seed=seed,
            threads=threads,
            accelerator=accelerator,
        )
        try:
            with epoch_bar(shown=not (as_json or quiet)) as progress:
                run = train_points(
                    config, out, resume=resume, overwrite=overwrite, progress=progress
                )
        except (KeyboardInterrupt, SystemExit) as stopped:
            message = f"interrupted: finished epochs are kept in {out}; add --resume to go on."
            typer.echo(message, err=True)
            raise typer.Exit(130 if isinstance(stopped, KeyboardInterrupt) else 143) from None
    if as_json:
        typer.echo(json.dumps(run.summary, indent=2, allow_nan=False))
        return
    found, described = run.summary, run.summary["data"]
    typer.echo(
        f"{model} on {described['name']}: {100 * found['accuracy']:.2f} % of "
        f"{described['held_out_clouds']} held-out clouds right, loss {found['loss']:.4f}, "
        f"{found['parameters']:,} weights, {found['seconds']['training']:.0f} s of training"
    )
    for name in ("metrics.csv", "result.json", "model.safetensors"):
        typer.echo(f"wrote {out / name}")
