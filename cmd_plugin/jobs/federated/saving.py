"""A nested state on disk: one safetensors file, written in one step and checked when it is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, uint8

from cmd_plugin.errors import InputError
from cmd_plugin.runs.tensors import Schema

__all__ = ["load_state", "save_state"]

_STATE = Schema("federation", 1, "the state of a federated run")


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state.

    Tensors are named by their content, so that equal ones (the plan, which all clients hold) are
    stored once and damage is found; everything else is JSON in the metadata.

    Args:
        path: The file.
        state: Dicts with text keys, lists, numbers, texts, True, False, None and CPU tensors.

    Raises:
        InputError: If it cannot be written.
    """
    tensors: dict[str, Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = _digest(value)
            tensors[name] = value
            return ["tensor", name]
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        # A list says that it is one, so that no content can be taken for a tensor.
        return ["list", *map(plain, value)] if isinstance(value, (list, tuple)) else value

    text = json.dumps(plain(dict(state)))
    _STATE.save(path, tensors, {"state": text, "digest": _of_bytes(text.encode())})


def load_state(path: Path) -> dict[str, Any]:
    """Read what :func:`save_state` wrote; tuples have become lists.

    Raises:
        InputError: If it is missing, damaged or something else.
    """
    tensors, about = _STATE.load(path)
    text = about.get("state", "")
    if about.get("digest") != _of_bytes(text.encode()) or any(
        name != _digest(tensor) for name, tensor in tensors.items()
    ):
        raise InputError(f"{path} is damaged (its content is not what was written).")

    def full(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: full(item) for key, item in value.items()}
        if not isinstance(value, list):
            return value
        kind, *content = value
        return tensors[content[0]] if kind == "tensor" else [full(item) for item in content]

    state: dict[str, Any] = full(json.loads(text))
    return state


def _digest(tensor: Tensor) -> str:
    content = tensor.contiguous().reshape(-1).view(uint8).numpy().tobytes()
    return _of_bytes(f"{tensor.dtype} {list(tensor.shape)} ".encode() + content)


def _of_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
