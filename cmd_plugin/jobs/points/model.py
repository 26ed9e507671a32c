"""The file in which ``points train`` keeps its network, for ``points explain`` and others."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cmd_plugin.errors import InputError, StateMismatch
from cmd_plugin.networks import load_weights
from cmd_plugin.pointcloud.names import NETWORK_NAMES
from cmd_plugin.pointcloud.networks import build_network
from cmd_plugin.runs.tensors import Schema, read_schema

__all__ = [
    "PointNetwork",
    "is_point_network",
    "load_point_network",
    "require_fitting",
    "save_point_network",
]

_SCHEMA = Schema("point-network", 1, "a network of `points train`")
_MOST_POINTS = 10_000_000


class PointNetwork(NamedTuple):
    """A network, and what is to be known about it.

    Attributes:
        network: Maps clouds [B, N, 3] to class scores [B, classes].
        model: Its name, one of :data:`cmd_plugin.pointcloud.names.NETWORK_NAMES`.
        width: Multiplies every hidden width.
        points: Points N in the clouds it was trained on.
        classes: Name of each class.
    """

    network: nn.Module
    model: str
    width: float
    points: int
    classes: tuple[str, ...]


def save_point_network(path: str | Path, trained: PointNetwork) -> None:
    """Write weights as safetensors, with what is needed to build the network around them.

    Raises:
        InputError: If it cannot be written.
    """
    about = {
        "model": trained.model,
        "width": repr(trained.width),
        "points": str(trained.points),
        "classes": json.dumps(trained.classes),
    }
    _SCHEMA.save(path, trained.network.state_dict(), about)


def is_point_network(path: str | Path) -> bool:
    """Whether :func:`save_point_network` wrote the file, which then says what network it holds.

    Raises:
        InputError: If it is a damaged safetensors file.
    """
    return Path(path).suffix == ".safetensors" and read_schema(path) == _SCHEMA.identity


def load_point_network(path: str | Path) -> PointNetwork:
    """Read what :func:`save_point_network` wrote; the network is in evaluation mode.

    Raises:
        InputError: If the file is missing, damaged or something else.
        StateMismatch: If its weights are not those of the network that it says it holds.
    """
    tensors, about = _SCHEMA.load(path)
    try:
        model, width, points = about["model"], float(about["width"]), int(about["points"])
        names = json.loads(about["classes"])
        if not (isinstance(names, list) and names and all(isinstance(n, str) for n in names)):
            raise ValueError("no list of class names")
        if model not in NETWORK_NAMES or not (0 < width < math.inf):
            raise ValueError("no such network")
        if not 1 <= points <= _MOST_POINTS:
            raise ValueError(f"{points} points")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}): copy or train it again.") from error
    require_fitting(path, model, len(names), width, tensors)
    network = build_network(model, len(names), width)
    load_weights(network, path)
    return PointNetwork(network.eval(), model, width, points, tuple(names))


def require_fitting(
    path: str | Path, model: str, classes: int, width: float, tensors: Mapping[str, Tensor]
) -> None:
    """Refuse what would need more memory than the file has weights, before it is taken.

    Raises:
        StateMismatch: If the network has more weights than the file.
    """
    stored = sum(tensor.numel() for tensor in tensors.values())
    try:
        with torch.device("meta"):
            needed = sum(p.numel() for p in build_network(model, classes, width).parameters())
    except (RuntimeError, OverflowError, TypeError, ValueError):  # sizes beyond all integers
        needed = None
    if needed is None or needed > stored:
        raise StateMismatch(
            f"{path} has {stored} weights, too few for {model} of width {width:g} with {classes} "
            "classes: copy or train it again."
        )
