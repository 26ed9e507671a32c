"""`cmd-plugin federated`: federated learning that sends less, simulated on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmd_plugin.cli._output import own_warnings, stdout_for_results

if TYPE_CHECKING:
    from rich.table import Table

    from cmd_plugin.federated import FederatedResult
    from cmd_plugin.federated.simulation import Round

__all__ = ["app"]

app = typer.Typer(name="federated", invoke_without_command=True, rich_markup_mode="rich")

_DATA = "Data and network"
_FEDERATION = "Federation"
_METHOD = "Method"
_OUTPUT = "Output"


@app.callback()
def _group(context: typer.Context) -> None:
    """Federated learning that sends less, on Flower."""
    if context.invoked_subcommand is None:
        shown = context.get_help()  # with rich, this prints and returns nothing
        if shown:
            typer.echo(shown)
        raise typer.Exit(2)


@app.command("simulate")
def simulate(
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
            help="Where data lies; default: environment variable CMD_PLUGIN_DATA. Nothing is "
            "downloaded.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            help="cnn (57k parameters), cnn:WIDTH, or any timm or torchvision name.",
            rich_help_panel=_DATA,
        ),
    ] = "cnn",
    image_size: Annotated[
        int | None,
        typer.Option(help="Resize images to this side length.", rich_help_panel=_DATA),
    ] = None,
    train_limit: Annotated[
        int | None,
        typer.Option(
            help="Use only so many training images, over all clients.", rich_help_panel=_DATA
        ),
    ] = None,
    test_limit: Annotated[
        int | None,
        typer.Option(help="Evaluate on only so many held-out images.", rich_help_panel=_DATA),
    ] = None,
    clients: Annotated[
        int, typer.Option(help="Number of clients.", rich_help_panel=_FEDERATION)
    ] = 10,
    partition: Annotated[
        str,
        typer.Option(
            help="iid, or dirichlet:ALPHA (the smaller ALPHA, the fewer classes a client has).",
            rich_help_panel=_FEDERATION,
        ),
    ] = "iid",
    rounds: Annotated[
        int, typer.Option(help="Rounds of training.", rich_help_panel=_FEDERATION)
    ] = 30,
    local_epochs: Annotated[
        int, typer.Option(help="Epochs of a client in a round.", rich_help_panel=_FEDERATION)
    ] = 1,
    fraction: Annotated[
        float,
        typer.Option(
            help="Share of the clients in a round, above 0 to 1.", rich_help_panel=_FEDERATION
        ),
    ] = 1.0,
    batch_size: Annotated[
        int, typer.Option(help="Images in a step.", rich_help_panel=_FEDERATION)
    ] = 32,
    lr: Annotated[
        float, typer.Option(help="Learning rate of the clients' SGD.", rich_help_panel=_FEDERATION)
    ] = 0.05,
    momentum: Annotated[
        float,
        typer.Option(help="Its momentum, from zero each round.", rich_help_panel=_FEDERATION),
    ] = 0.0,
    weight_decay: Annotated[
        float, typer.Option(help="Its weight decay.", rich_help_panel=_FEDERATION)
    ] = 0.0,
    method: Annotated[
        str,
        typer.Option(help="fedavg, cmd, apf, a-apf, topk or fedpaq.", rich_help_panel=_METHOD),
    ] = "cmd",
    warmup: Annotated[
        int,
        typer.Option(
            help="cmd: rounds that only watch; modes are fitted after the next one.",
            rich_help_panel=_METHOD,
        ),
    ] = 8,
    modes: Annotated[
        int, typer.Option(help="cmd: number of modes, 1 to 256.", rich_help_panel=_METHOD)
    ] = 250,
    samples: Annotated[
        int,
        typer.Option(
            help="cmd: weights whose trajectories are clustered.", rich_help_panel=_METHOD
        ),
    ] = 1000,
    embed_every: Annotated[
        int, typer.Option(help="cmd: rounds between embedding events.", rich_help_panel=_METHOD)
    ] = 1,
    embed_percent: Annotated[
        float,
        typer.Option(help="cmd: percentage embedded at an event.", rich_help_panel=_METHOD),
    ] = 25.0,
    relative: Annotated[
        bool,
        typer.Option(
            "--relative/--absolute",
            help="cmd: of the weights that are still sent, or of all.",
            rich_help_panel=_METHOD,
        ),
    ] = True,
    project: Annotated[
        str,
        typer.Option(
            help="cmd: embedded weights follow after the round (epoch), after every step (step), "
            "or train through their references (tie).",
            rich_help_panel=_METHOD,
        ),
    ] = "step",
    pool: Annotated[
        bool,
        typer.Option(
            "--pool/--no-pool",
            help="cmd: references move by what all weights on their curve did, in a round or, with "
            "--project step, in every step.",
            rich_help_panel=_METHOD,
        ),
    ] = True,
    bits: Annotated[
        int | None,
        typer.Option(
            help="cmd: 8 or 4 bits a value, both ways; fedpaq: on the way up (8).",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    topk: Annotated[
        float, typer.Option(help="topk: share of the weights sent.", rich_help_panel=_METHOD)
    ] = 0.1,
    apf_threshold: Annotated[
        float,
        typer.Option(
            help="apf, a-apf: effective perturbation of a settled weight.", rich_help_panel=_METHOD
        ),
    ] = 0.05,
    apf_decay: Annotated[
        float,
        typer.Option(
            help="apf, a-apf: decay of the moving averages per round.", rich_help_panel=_METHOD
        ),
    ] = 0.9,
    seed: Annotated[
        int,
        typer.Option(
            help="Of initial weights, partition, order of images and modes.",
            rich_help_panel=_OUTPUT,
        ),
    ] = 0,
    engine: Annotated[
        str,
        typer.Option(
            help="inprocess (one client after another), or ray (Flower's simulation engine, in "
            "parallel, some 30 s of start-up); same results.",
            rich_help_panel=_OUTPUT,
        ),
    ] = "inprocess",
    threads: Annotated[
        int, typer.Option(help="CPU threads of a client.", rich_help_panel=_OUTPUT)
    ] = 1,
    out: Annotated[
        Path, typer.Option(help="Folder for all results.", rich_help_panel=_OUTPUT)
    ] = Path("federated"),
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print result.json and nothing else.", rich_help_panel=_OUTPUT),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="No progress bar.", rich_help_panel=_OUTPUT)
    ] = False,
) -> None:
    """Train with several clients on this machine, and count what they would have sent.

    The clients and the server are the Flower apps that also deploy. Bytes are those of Flower's
    serialised messages, up and down, over all clients; FedAvg's are those of the same rounds with
    plain arrays. Method fedavg is Flower's own FedAvg.

    Writes metrics.csv, result.json, model.safetensors and report.png.

    \b
    Examples:
      cmd-plugin federated simulate --clients 4 --rounds 6 --warmup 2
      cmd-plugin federated simulate --method topk --topk 0.05 --partition dirichlet:0.3
      cmd-plugin federated simulate --data mnist --data-root DATA --rounds 60 --warmup 10 --bits 8
    """  # noqa: D301
    from cmd_plugin.federated import FederatedConfig

    config = FederatedConfig(
        data=data,
        data_root=data_root,
        image_size=image_size,
        train_limit=train_limit,
        test_limit=test_limit,
        model=model,
        clients=clients,
        partition=partition,
        rounds=rounds,
        local_epochs=local_epochs,
        fraction=fraction,
        batch_size=batch_size,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        method=method,
        warmup=warmup,
        modes=modes,
        samples=samples,
        embed_every=embed_every,
        embed_percent=embed_percent,
        relative=relative,
        project=project,
        pool=pool,
        bits=bits,
        topk=topk,
        apf_threshold=apf_threshold,
        apf_decay=apf_decay,
        seed=seed,
        threads=threads,
        engine=engine,
    )
    with stdout_for_results(), own_warnings():
        from cmd_plugin.federated import simulate as run

        try:
            with _progress_bar(rounds, shown=not (as_json or quiet)) as progress:
                result = run(config, out, progress=progress)
        except KeyboardInterrupt:
            typer.echo(f"interrupted: finished rounds are in {out / 'metrics.csv'}.", err=True)
            raise typer.Exit(130) from None
    if as_json:
        typer.echo(json.dumps(result.summary, indent=2, allow_nan=False))
    else:
        _print(result)


@contextmanager
def _progress_bar(rounds: int, *, shown: bool) -> Iterator[Callable[[Round], None] | None]:
    """A bar on stderr, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not shown or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(
        *columns, TextColumn("{task.fields[score]}"), console=console, transient=True
    ) as bar:
        task = bar.add_task("loading", total=rounds, score="")
        sent = 0

        def update(ended: Round) -> None:
            nonlocal sent
            sent += ended.bytes_up + ended.bytes_down
            bar.update(
                task,
                completed=ended.round,
                description=f"round {ended.round}",
                score=f"accuracy {ended.accuracy:.3f}  {sent / 1e6:.1f} MB",
            )

        yield update


def _print(result: FederatedResult) -> None:
    from rich.console import Console

    summary = result.summary
    console = Console(highlight=False)
    console.print(_table(summary))
    sent = summary["bytes_up"] + summary["bytes_down"]
    console.print(
        f"accuracy {summary['accuracy']:.4f} with {sent / 1e6:.2f} MB "
        f"({summary['bytes_up'] / 1e6:.2f} up, {summary['bytes_down'] / 1e6:.2f} down), "
        f"{summary['bytes_of_fedavg']:.1%} of FedAvg's {summary['fedavg_bytes'] / 1e6:.2f} MB"
    )
    if summary["refusals"]:
        console.print(f"{len(summary['refusals'])} updates were refused, see result.json")
    if result.out is not None:
        for name in ("result.json", "metrics.csv", "model.safetensors", "report.png"):
            console.print(f"wrote {result.out / name}", soft_wrap=True)


_ROWS = 12


def _table(summary: dict[str, Any]) -> Table:
    from rich.table import Table

    config, rounds = summary["config"], summary["rounds"]
    table = Table(
        title=f"{config['method']} with {config['clients']} clients on {summary['data']['name']}, "
        f"{config['partition']}",
        title_justify="left",
    )
    for name in ("round", "accuracy", "loss", "kB up", "kB down", "of FedAvg", "not sent"):
        table.add_column(name, justify="right")
    step = -(-(len(rounds) - 1) // _ROWS)
    for ended in rounds[1:]:
        if ended["round"] % step and ended["round"] != len(rounds) - 1:
            continue
        sent = ended["bytes_up"] + ended["bytes_down"]
        share = sent / ended["fedavg_bytes"] if ended["fedavg_bytes"] else float("nan")
        table.add_row(
            str(ended["round"]),
            f"{ended['accuracy']:.4f}",
            f"{ended['loss']:.4f}",
            f"{ended['bytes_up'] / 1e3:.1f}",
            f"{ended['bytes_down'] / 1e3:.1f}",
            f"{share:.1%}",
            f"{ended['embedded_fraction']:.1%}",
        )
    return table
