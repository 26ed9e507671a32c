"""Files that are whole or not there: written beside their place, then put there in one step."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from cmd_plugin.errors import InputError

__all__ = ["read_json", "sweep", "write_atomically", "write_json"]

# How torch says that a disk is full; it has no exception of its own for it.
_TORCH_WRITE_ERRORS = ("PytorchStreamWriter", "inline_container")


@contextmanager
def unwritable(path: Path) -> Iterator[None]:
    """Turn the failure of a write, a full disk for one, into a sentence about ``path``.

    Raises:
        InputError: If the body fails because the disk, or a permission, does not let it write.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(
            word in str(error) for word in _TORCH_WRITE_ERRORS
        ):
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise InputError(
            f"{path} cannot be written ({reason}): free some space, or choose another folder; what "
            "was finished before is kept."
        ) from error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then put it in place in one step.

    The file gets the permissions of any new file (safetensors alone would make it private).

    Args:
        path: Where the file shall be; its folder exists.
        write: Is given the path of the temporary file.

    Raises:
        InputError: If it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with unwritable(path):
        try:
            temporary.touch()
            mode = temporary.stat().st_mode
            write(temporary)
            temporary.chmod(mode)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write strict JSON (no NaN) in one step.

    Raises:
        InputError: If it cannot be written.
    """
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: The file.
        advice: What to do if it is damaged; ends the sentence.

    Raises:
        InputError: If it cannot be read or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}): {advice}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged (no JSON object): {advice}.")
    return content


def sweep(folder: Path) -> None:
    """Remove what killed writes left below a folder."""
    for leftover in folder.rglob(".*.tmp"):
        leftover.unlink(missing_ok=True)
