"""Weights from files, without pickles, and the check that a network and a cloud agree on axes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cmd_plugin.errors import InputError, ShapeError, StateMismatch
from cmd_plugin.pointcloud._interception import Forward, as_it_is
from cmd_plugin.pointcloud.refocus import run_on

__all__ = ["AxisOrder", "axis_doubt", "axis_orders", "load_weights", "read_weights"]

_NESTED = ("state_dict", "model_state_dict", "model", "net")
_PREFIXES = ("module.", "_orig_mod.", "model.")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state_dict from ``.safetensors``, or from what ``torch.save`` wrote, on the CPU.

    Files of torch are read with ``weights_only=True``: nothing in them is executed. Nested
    dictionaries (``state_dict``, ``model_state_dict``) are opened, and prefixes that wrappers put
    before every name are taken off.

    Raises:
        InputError: If the file is missing, damaged, or holds no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file {path}: check the path.")
    try:
        if path.suffix == ".safetensors":
            content: object = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}): copy it again.") from error
    except Exception as error:  # the unpickler meets damaged or unsafe bytes with any exception
        raise InputError(
            f"{path} holds no plain weights, or is damaged: only files that load with "
            "weights_only=True are read. Save the network's state_dict()."
        ) from error
    for name in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not any(isinstance(v, Tensor) for v in content.values()):
        raise InputError(f"{path} holds no weights: save the network's state_dict().")
    state = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load weights from a file into a network of the same layer names and shapes.

    Raises:
        InputError: As :func:`read_weights`.
        StateMismatch: If names or shapes differ; the message names the first of them.
    """
    state, own = read_weights(path), model.state_dict()
    missing = [name for name in own if name not in state]
    surplus = [name for name in state if name not in own]
    if missing or surplus:
        lacking = f"lacks {missing[0]!r}" if missing else f"has {surplus[0]!r} besides"
        raise StateMismatch(
            f"{path} {lacking} ({len(missing)} missing, {len(surplus)} surplus): these are weights "
            "of another network."
        )
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise StateMismatch(
                f"{path}: {name} is {tuple(tensor.shape)}, the network's is "
                f"{tuple(own[name].shape)}: check the number of classes and the width."
            )
    model.load_state_dict(state)


@dataclass(frozen=True)
class AxisOrder:
    """How well clouds suit a network with their axes in some order.

    Attributes:
        axes: Order of the axes: (0, 2, 1) exchanges the second and the third.
        accuracy: Share of right answers; None without labels.
        confidence: Mean probability of the answers given.
    """

    axes: tuple[int, int, int]
    accuracy: float | None
    confidence: float


@torch.no_grad()
def axis_orders(
    model: nn.Module,
    points: Tensor,
    labels: Tensor | None = None,
    forward: Forward = as_it_is,
) -> list[AxisOrder]:
    """Try all six orders of the axes and rank them: a network trained z up fails on clouds y up.

    That is the usual reason why a network "does not work on real scans". Ranked by accuracy if
    there are labels, else by confidence, which can mislead for single clouds: give many.

    Args:
        model: A classifier.
        points: [B, N, 3].
        labels: [B] int64, if known.
        forward: How to call the network.

    Returns:
        Best first; ties keep the order of the axes as given.

    Raises:
        ShapeError: If the points are not [B, N, 3].
    """
    if points.ndim != 3 or points.shape[2] != 3:
        raise ShapeError(f"points must be [B, N, 3], got {tuple(points.shape)}.")
    everything = torch.ones(points.shape[:2], dtype=torch.bool, device=points.device)
    orders = []
    for first, second, third in itertools.permutations(range(3)):
        axes = (first, second, third)
        output = run_on(model, points[..., list(axes)], everything, forward)
        confidence, answers = output.softmax(dim=1).max(dim=1)
        right = None if labels is None else float((answers == labels).double().mean())
        orders.append(AxisOrder(axes, right, float(confidence.double().mean())))
    return sorted(orders, key=lambda o: -(o.confidence if o.accuracy is None else o.accuracy))


def axis_doubt(orders: Sequence[AxisOrder], margin: float = 0.1) -> AxisOrder | None:
    """The order of axes that suits a network better than the one given; None if none surely does.

    With labels, by accuracy; without, by confidence. Of a single cloud in the wrong order a network
    can be sure as well, so silence is no proof: ``benchmarks/point_importance.py`` counts that.

    Args:
        orders: From :func:`axis_orders`.
        margin: By how much another order must be better, in (0, 1).

    Raises:
        InputError: If the order as given is not among them.
    """
    given = next((order for order in orders if order.axes == (0, 1, 2)), None)
    if given is None:
        raise InputError("orders lack (0, 1, 2), the axes as given: take all of axis_orders().")
    best = orders[0]
    if best.accuracy is None or given.accuracy is None:
        return best if best.confidence - given.confidence > margin else None
    return best if best.accuracy - given.accuracy > margin else None
