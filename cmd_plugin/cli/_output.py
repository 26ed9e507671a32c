"""What sub-commands share about their output."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cmd_plugin.errors import InputError

__all__ = ["prepare_folder", "progress_line"]


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
