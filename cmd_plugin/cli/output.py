"""What commands print while they run: a bar, warnings of ours, and nothing on standard output."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from cmd_plugin.runs.progress import Progress, ReportProgress

__all__ = ["DEBUG_VARIABLE", "own_warnings", "progress_bar", "say", "stdout_for_results"]

DEBUG_VARIABLE = "CMD_PLUGIN_DEBUG"


def say(text: object) -> None:
    """Print one line on standard error."""
    print(" ".join(str(text).split()), file=sys.stderr, flush=True)  # noqa: T201


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
    said: set[str] = set()  # Python forgets what it has shown whenever a library touches a filter

    def show(message: Warning | str, *_: object) -> None:
        if str(message) not in said:
            said.add(str(message))
            say(f"warning: {message}")

    if os.environ.get(DEBUG_VARIABLE):
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module=r"cmd_plugin\.")
        warnings.showwarning = show  # type: ignore[assignment]
        yield


@contextmanager
def progress_bar(*, shown: bool) -> Iterator[ReportProgress | None]:
    """Show a job's progress as a bar on stderr, if that is a terminal.

    Args:
        shown: Whether it is wanted at all.
    """
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if not shown or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Bar(*columns, TextColumn("{task.fields[note]}"), console=console, transient=True) as bar:
        task = bar.add_task("loading", total=None, note="")

        def update(event: Progress) -> None:
            bar.update(
                task,
                completed=event.done,
                total=event.total,
                description=event.stage,
                note=event.note,
            )

        yield update
