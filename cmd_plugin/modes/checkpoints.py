"""Read weights out of checkpoint files, safely and one at a time."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from cmd_plugin.errors import InputError
from cmd_plugin.modes.layout import by_clean_name

__all__ = ["SUFFIXES", "find_checkpoints", "read_checkpoint", "readable_checkpoints"]

SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")

# Where common trainers put the weights; raw ones first, because averaging callbacks of Lightning
# move them aside.
_KEYS = ("current_model_state", "state_dict", "model_state_dict", "model")


def _natural(path: Path) -> list[tuple[int, int | str]]:
    return [
        (0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", path.name)
    ]


def find_checkpoints(inputs: Sequence[str | Path]) -> list[Path]:
    """Return the checkpoint files among files and folders, a folder's in natural order of names.

    That is "epoch=9" before "epoch=10". A run's folder may hold them in ``checkpoints/``. ``last*``
    files are copies of another epoch and left out where others exist.

    Raises:
        InputError: If a path does not exist or a folder has no checkpoint.
    """
    found: list[Path] = []
    for item in map(Path, inputs):
        if item.is_file():
            found.append(item)
            continue
        if not item.is_dir():
            raise InputError(f"{item} does not exist: give checkpoint files or their folder.")
        for folder in (item, item / "checkpoints"):
            files = [f for f in folder.glob("*") if f.suffix in SUFFIXES and f.is_file()]
            if files:
                break
        else:
            raise InputError(
                f"{item} holds no checkpoint ({', '.join(SUFFIXES)}): give the folder your "
                "trainer writes them to."
            )
        numbered = [f for f in files if not f.stem.startswith("last")]
        found.extend(sorted(numbered or files, key=_natural))
    return found


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], int | None]:
    """Read the weights of one checkpoint.

    Nothing is unpickled but tensors and plain containers (``weights_only=True``).

    Returns:
        The state_dict with cleaned names, and the epoch if the file or its name tells it
        ("epoch=12").

    Raises:
        InputError: If the file cannot be read as a checkpoint; names it.
    """
    data: object
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, of files that then fail
            if path.suffix == ".safetensors":
                data = load_file(path)
            else:
                data = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist.") from None
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} is damaged, or holds Python objects besides tensors, which are never "
            "loaded: save the model's state_dict() alone."
        ) from error
    except Exception as error:  # a damaged pickle can fail in any way: struct, index, attribute ...
        raise InputError(
            f"{path} is truncated or not a checkpoint: copy it again or leave it out."
        ) from error
    epoch = _epoch(path, data)
    if isinstance(data, Mapping):
        for key in _KEYS:
            if isinstance(data.get(key), Mapping):
                data = data[key]
                break
    try:
        tensors = by_clean_name(data.items()) if isinstance(data, Mapping) else {}
    except InputError as error:
        raise InputError(f"{path} cannot be used: {error}") from None
    if not any(t.is_floating_point() for t in tensors.values()):
        raise InputError(f"{path} holds no weights: expected a state_dict or a checkpoint.")
    return tensors, epoch


def _epoch(path: Path, data: object) -> int | None:
    if isinstance(data, Mapping) and type(data.get("epoch")) is int:
        return int(data["epoch"])
    match = re.search(r"epoch\D?(\d+)", path.name)
    return int(match[1]) if match else None


def readable_checkpoints(files: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Return the files that can be read, and one sentence about each that cannot."""
    problems = {file: _problem(file) for file in files}
    good = [file for file, problem in problems.items() if problem is None]
    return good, [problem for problem in problems.values() if problem is not None]


def _problem(file: Path) -> str | None:
    try:
        read_checkpoint(file)
    except InputError as error:
        return str(error)
    return None
