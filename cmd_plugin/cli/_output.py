"""What sub-commands share about their output folder."""

from __future__ import annotations

import tempfile
from pathlib import Path

from cmd_plugin.errors import InputError

__all__ = ["prepare_folder"]


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
