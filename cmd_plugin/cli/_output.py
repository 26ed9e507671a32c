"""What sub-commands share about their output."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer

from cmd_plugin.errors import InputError

if TYPE_CHECKING:
    from cmd_plugin.training import Progress

__all__ = ["epoch_bar", "own_warnings", "prepare_folder", "progress_line", "stdout_for_results"]


def prepare_folder(path: Path) -> None:
    """Make a folder and see that files can be written into it, before any long work.

    Raises:
        InputError: If that is not possible.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"--out {path} cannot be written to ({reason}): choose another folder."
        ) from error


@contextmanager
def progress_line(*, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Give a function that shows on stderr what is being done; off when not a terminal.

    Args:
        quiet: Show nothing.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda _: None
        return
    with console.status("") as status:
        yield status.update


@contextmanager
def stdout_for_results() -> Iterator[None]:
    """Send whatever a library prints to stderr; standard output is for results."""
    stdout: TextIO = sys.stdout
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        sys.stdout = stdout


@contextmanager
def own_warnings() -> Iterator[None]:
    """Show this package's warnings as one line each, other libraries' only when debugging."""

    def show(message: Warning | str, *_: Any) -> None:
        typer.echo(f"warning: {message}", err=True)

    if os.environ.get("CMD_PLUGIN_DEBUG"):
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module=r"cmd_plugin\.")
        warnings.showwarning = show  # type: ignore[assignment]
        yield


@contextmanager
def epoch_bar(*, shown: bool) -> Iterator[Callable[[Progress], None] | None]:
    """Show the epochs of a training as a bar on stderr, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if not shown or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Bar(*columns, TextColumn("{task.fields[scores]}"), console=console, transient=True) as bar:
        task = bar.add_task("loading", total=None, scores="")

        def update(progress: Progress) -> None:
            kind = "" if progress.training == "online" else f" {progress.training}"
            scores = "  ".join(f"{k} {s.accuracy:.3f}" for k, s in progress.scores.items())
            bar.update(
                task,
                completed=progress.epochs_done,
                total=progress.epochs,
                description=f"seed {progress.seed}{kind}, epoch {progress.epoch}",
                scores=scores,
            )

        yield update
