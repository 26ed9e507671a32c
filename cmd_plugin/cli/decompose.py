"""``cmd-plugin decompose``: post-hoc modes of anyone's checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from cmd_plugin.modes import Decomposition
    from cmd_plugin.modes.codec import CodecReport, LayerReport

__all__ = ["decompose"]


def decompose(
    inputs: Annotated[
        list[Path],
        typer.Argument(help="A run's folder, a folder of checkpoints, or checkpoint files."),
    ],
    modes: Annotated[int, typer.Option(help="Largest number of modes, 1 to 256.")] = 10,
    samples: Annotated[int, typer.Option(help="Weights whose trajectories are clustered.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the draw of the samples.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("decomposition"),
    export: Annotated[
        list[int] | None,
        typer.Option(help="Write the reconstructed state_dict of this epoch (repeatable)."),
    ] = None,
    storage: Annotated[
        str, typer.Option(help="delta-bf16 or fp32: snapshots in memory.")
    ] = "delta-bf16",
    buffers: Annotated[
        str, typer.Option(help="BatchNorm statistics: model, or keep (leave them out).")
    ] = "model",
    profile: Annotated[
        str, typer.Option(help="What a mode follows: reference or mean.")
    ] = "reference",
    shrink: Annotated[
        bool, typer.Option("--shrink/--no-shrink", help="Shrink scales by squared correlation.")
    ] = False,
    include: Annotated[
        list[str] | None, typer.Option(help="Only tensors whose name matches (repeatable).")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="No tensor whose name matches (repeatable).")
    ] = None,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Leave damaged files out, with a warning.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON only.")] = False,
) -> None:
    """Cluster the weight trajectories of a finished training run into modes.

    Reads Lightning .ckpt, .pt, .pth, .bin and .safetensors files, one at a time. Writes
    modes.safetensors, result.json and decomposition.png.

    Example: cmd-plugin decompose lightning_logs/version_0 --modes 5 --out modes
    """
    from cmd_plugin.cli._output import prepare_folder
    from cmd_plugin.modes import decompose as run
    from cmd_plugin.modes.checkpoints import find_checkpoints, readable_checkpoints
    from cmd_plugin.modes.choice import check_modes
    from cmd_plugin.modes.codec import describe_layers, measure_codec

    check_modes(modes)
    prepare_folder(out)
    files = find_checkpoints(inputs)
    if skip_unreadable:
        files, problems = readable_checkpoints(files)
        for problem in problems:
            typer.echo(f"warning: left out: {problem}", err=True)
    with _progress(quiet=as_json) as show:
        decomposition = run(
            files,
            modes,
            samples,
            seed,
            storage=storage,
            buffers=buffers,
            include=include or (),
            exclude=exclude or (),
            profile=profile,
            shrink=shrink,
            progress=show("reading checkpoints"),
        )
        saved = out / "modes.safetensors"
        decomposition.save(saved)
        codec = measure_codec(files, decomposition, saved, show("measuring the error"))
    layers = describe_layers(decomposition)
    result = _result(decomposition, codec, layers)
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    _draw(decomposition, out / "decomposition.png")
    exported = [_export(decomposition, epoch, out) for epoch in export or ()]
    if as_json:
        typer.echo(json.dumps(result))
    else:
        _print(decomposition, codec, layers, [saved, out / "decomposition.png", *exported])


def _result(
    decomposition: Decomposition, codec: CodecReport, layers: list[LayerReport]
) -> dict[str, Any]:
    def plain(layer: LayerReport) -> dict[str, Any]:
        values = asdict(layer)
        if isnan(layer.explained_variance):
            values["explained_variance"] = None  # JSON has no nan: the tensor does not move
        return values

    explained = decomposition.explained_variance()
    return {
        "explained_variance": None if isnan(explained) else explained,
        "modes": decomposition.number_of_modes,
        "snapshots": decomposition.snapshots,
        "parameters": decomposition.numel,
        "compression_ratio": codec.compression_ratio,
        "relative_error": codec.relative_error,
        "weight_bytes": codec.weight_bytes,
        "checkpoint_bytes": codec.checkpoint_bytes,
        "modes_bytes": codec.modes_bytes,
        "epochs": list(decomposition.epochs),
        "layers": [plain(layer) for layer in layers],
    }


def _export(decomposition: Decomposition, epoch: int, out: Path) -> Path:
    from safetensors.torch import save_file

    path = out / f"epoch={epoch:03d}.safetensors"
    state = decomposition.state_dict_at(decomposition.snapshot_of(epoch))
    save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, path)
    return path


def _draw(decomposition: Decomposition, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from cmd_plugin.modes.plots import plot_explained, plot_mode_share, plot_profiles

    figure = Figure(figsize=(15, 5.5), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    profiles, shares, explained = figure.subplots(1, 3)
    plot_profiles(decomposition, profiles)
    plot_mode_share(decomposition, shares)
    plot_explained(decomposition, explained)
    figure.savefig(path)


def _print(
    decomposition: Decomposition,
    codec: CodecReport,
    layers: list[LayerReport],
    written: list[Path],
) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title="Correlated modes by tensor")
    table.add_column("tensor", overflow="fold", min_width=24)
    for column in ("weights", "variance explained", "modes used", "main mode", "its share"):
        table.add_column(column, justify="right")
    for layer in layers:
        table.add_row(
            layer.name,
            f"{layer.weights:,}",
            "does not move"
            if isnan(layer.explained_variance)
            else f"{layer.explained_variance:.1%}",
            str(layer.modes_used),
            str(layer.main_mode),
            f"{layer.main_share:.0%}",
        )
    console.print(table)
    console.print(
        f"{decomposition.number_of_modes} modes explain {decomposition.explained_variance():.1%} "
        f"of the movement of {decomposition.numel:,} weights over {decomposition.snapshots} "
        "snapshots."
    )
    console.print(
        f"As a codec: {codec.modes_bytes:,} bytes for {codec.weight_bytes:,} bytes of weights, "
        f"{codec.compression_ratio:.1f} times smaller (the files hold {codec.checkpoint_bytes:,}); "
        f"relative error {codec.relative_error:.2e}."
    )
    for path in written:
        console.print(f"wrote {path}", highlight=False)


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Yield a maker of progress callbacks: bars on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=quiet or not console.is_terminal) as bars:

        def start(description: str) -> Callable[[int, int], None]:
            task = bars.add_task(description, total=None)
            return lambda done, total: bars.update(task, completed=done, total=total)

        yield start
