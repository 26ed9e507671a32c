"""`cmd-plugin train`: raw weights, EMA, SWA and CMD in the same training runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cmd_plugin.cli._output import epoch_bar, own_warnings, stdout_for_results

__all__ = ["train"]

_DATA = "Data and network"
_TRAINING = "Training"
_METHODS = "Averages and modes"
_EMBEDDING = "Embedded training"
_OUTPUT = "Output"


def train(
    data: Annotated[
        str,
        typer.Option(
            help="digits (comes with scikit-learn), mnist, fashion-mnist, cifar10 or folder.",
            rich_help_panel=_DATA,
        ),
    ] = "digits",
    data_root: Annotated[
        str | None,
        typer.Option(
            help="Where data lies: torchvision's layout, or with --data folder a folder of "
            "train/CLASS/IMAGE and test/CLASS/IMAGE (or CLASS/IMAGE), or a tar archive of it. "
            "Default: environment variable CMD_PLUGIN_DATA. Nothing is downloaded.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            help="cnn (57k parameters), or any timm or torchvision name.", rich_help_panel=_DATA
        ),
    ] = "cnn",
    image_size: Annotated[
        int | None,
        typer.Option(help="Resize images to this side length.", rich_help_panel=_DATA),
    ] = None,
    label_noise: Annotated[
        float,
        typer.Option(
            help="Share of training labels replaced by a wrong one, 0 to below 1.",
            rich_help_panel=_DATA,
        ),
    ] = 0.0,
    train_limit: Annotated[
        int | None,
        typer.Option(help="Use only so many training images.", rich_help_panel=_DATA),
    ] = None,
    optimizer: Annotated[
        str, typer.Option(help="sgd (momentum 0.9), adam or adamw.", rich_help_panel=_TRAINING)
    ] = "sgd",
    lr: Annotated[
        float | None,
        typer.Option(
            help="Learning rate; default 0.05 for sgd, 0.001 for adam and adamw.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    schedule: Annotated[
        str,
        typer.Option(
            help="constant, cosine (to 0), or step (a tenth at 1/2 and at 3/4 of the run).",
            rich_help_panel=_TRAINING,
        ),
    ] = "constant",
    weight_decay: Annotated[
        float, typer.Option(help="Weight decay.", rich_help_panel=_TRAINING)
    ] = 0.0,
    batch_size: Annotated[
        int, typer.Option(help="Training images in a step.", rich_help_panel=_TRAINING)
    ] = 32,
    epochs: Annotated[
        int, typer.Option(help="Epochs of each seed.", rich_help_panel=_TRAINING)
    ] = 30,
    seeds: Annotated[
        int,
        typer.Option(
            help="Training runs; they differ in initial weights and order of the data.",
            rich_help_panel=_TRAINING,
        ),
    ] = 3,
    seed: Annotated[
        int,
        typer.Option(help="First seed; also of split and label noise.", rich_help_panel=_TRAINING),
    ] = 0,
    warmup: Annotated[
        int,
        typer.Option(
            help="Epochs CMD only watches; modes are fitted after the next one.",
            rich_help_panel=_METHODS,
        ),
    ] = 10,
    modes: Annotated[
        int, typer.Option(help="Number of modes, 1 to 256.", rich_help_panel=_METHODS)
    ] = 10,
    samples: Annotated[
        int,
        typer.Option(help="Weights whose trajectories are clustered.", rich_help_panel=_METHODS),
    ] = 1000,
    forgetting: Annotated[
        float,
        typer.Option(
            help="Weight of the past at each update, above 0 to 1.", rich_help_panel=_METHODS
        ),
    ] = 1.0,
    shrink: Annotated[
        bool,
        typer.Option(
            "--shrink/--no-shrink",
            help="Shrink each weight's movement by its squared correlation with its mode.",
            rich_help_panel=_METHODS,
        ),
    ] = False,
    profile: Annotated[
        str,
        typer.Option(
            help="What a mode follows: its reference weight, or the mean of its samples.",
            rich_help_panel=_METHODS,
        ),
    ] = "reference",
    buffers: Annotated[
        str,
        typer.Option(
            help="BatchNorm statistics of CMD's weights: recalibrate (on 8 training batches), "
            "model, or keep.",
            rich_help_panel=_METHODS,
        ),
    ] = "recalibrate",
    ema_decay: Annotated[
        float,
        typer.Option(
            help="Decay of the EMA at each step; it remembers about 1/(1-decay) steps, which "
            "should be far fewer than the run has.",
            rich_help_panel=_METHODS,
        ),
    ] = 0.99,
    mode: Annotated[
        str,
        typer.Option(
            help="online watches the training; embedded also trains each seed a second time, with "
            "more and more weights that follow their mode's reference.",
            rich_help_panel=_EMBEDDING,
        ),
    ] = "online",
    embed_every: Annotated[
        int,
        typer.Option(help="Epochs between two embedding events.", rich_help_panel=_EMBEDDING),
    ] = 5,
    embed_percent: Annotated[
        float,
        typer.Option(
            help="Percentage of the weights that an event chooses, above 0 to 100.",
            rich_help_panel=_EMBEDDING,
        ),
    ] = 10.0,
    embed_relative: Annotated[
        bool,
        typer.Option(
            "--embed-relative/--embed-absolute",
            help="Percentage of the weights still free, or of all.",
            rich_help_panel=_EMBEDDING,
        ),
    ] = False,
    embed_project: Annotated[
        str,
        typer.Option(
            help="When embedded weights are written: epoch (its end; the paper), step, or tie "
            "(each step, and references get their gradients).",
            rich_help_panel=_EMBEDDING,
        ),
    ] = "epoch",
    embed_slots: Annotated[
        str,
        typer.Option(
            help="leave or zero the optimizer's momenta of embedded weights.",
            rich_help_panel=_EMBEDDING,
        ),
    ] = "leave",
    threads: Annotated[
        int | None,
        typer.Option(help="CPU threads; default: torch's choice.", rich_help_panel=_OUTPUT),
    ] = None,
    accelerator: Annotated[
        str, typer.Option(help="cpu, gpu, mps or auto.", rich_help_panel=_OUTPUT)
    ] = "cpu",
    out: Annotated[
        Path, typer.Option(help="Folder for all results.", rich_help_panel=_OUTPUT)
    ] = Path("out"),
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
    """Train, and compare raw weights, EMA, SWA and CMD on the same held-out images.

    Each seed is one ordinary training run; EMA (every step), SWA (mean over the last quarter's
    epochs) and CMD (Correlation Mode Decomposition of the weights' trajectories) watch it without
    changing it, and all four are evaluated after every epoch. Overhead is the time CMD takes in
    percent of the pure training time, evaluation excluded.

    With --mode embedded each seed is trained a second time, from the same start on the same
    batches, with embedded weights; its files are in OUT/embedded.

    Writes metrics.csv, result.json, modes.safetensors and model_cmd.safetensors (first seed),
    report.png, and the first seed's weights after each epoch in checkpoints/.

    \b
    Examples:
      cmd-plugin train
      cmd-plugin train --label-noise 0.2 --shrink --seeds 5 --out noisy
      cmd-plugin train --mode embedded --embed-every 2 --seeds 1 --out embedded
      cmd-plugin train --data cifar10 --data-root DATA --model resnet18 --epochs 60 --warmup 20
    """  # noqa: D301
    from cmd_plugin.training.config import TrainConfig

    config = TrainConfig(
        data=data,
        data_root=data_root,
        image_size=image_size,
        label_noise=label_noise,
        train_limit=train_limit,
        model=model,
        optimizer=optimizer,
        lr=lr,
        weight_decay=weight_decay,
        schedule=schedule,
        batch_size=batch_size,
        epochs=epochs,
        warmup=warmup,
        modes=modes,
        samples=samples,
        seeds=seeds,
        seed=seed,
        ema_decay=ema_decay,
        forgetting=forgetting,
        shrink=shrink,
        profile=profile,
        buffers=buffers,
        mode=mode,
        embed_every=embed_every,
        embed_percent=embed_percent,
        embed_relative=embed_relative,
        embed_project=embed_project,
        embed_slots=embed_slots,
        threads=threads,
        accelerator=accelerator,
    )
    with stdout_for_results(), own_warnings():
        from cmd_plugin.training import run_comparison

        try:
            with epoch_bar(shown=not (as_json or quiet)) as progress:
                result = run_comparison(
                    config, out, resume=resume, overwrite=overwrite, progress=progress
                )
        except (KeyboardInterrupt, SystemExit) as stopped:
            message = f"interrupted: finished epochs are kept in {out}; add --resume to go on."
            typer.echo(message, err=True)
            # Ctrl-C, or the end of the program that Lightning makes of a SIGTERM
            raise typer.Exit(130 if isinstance(stopped, KeyboardInterrupt) else 143) from None
    if as_json:
        typer.echo(json.dumps(result.summary, indent=2, allow_nan=False))
    else:
        from cmd_plugin.cli._train_table import print_comparison

        print_comparison(result)
