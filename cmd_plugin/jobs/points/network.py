"""The network whose clouds ``points explain`` explains: ours, a known one, or a user's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from cmd_plugin.errors import InputError
from cmd_plugin.jobs.points.model import is_point_network, load_point_network, require_fitting
from cmd_plugin.jobs.points.options import ExplainOptions
from cmd_plugin.networks import load_weights, read_weights
from cmd_plugin.networks.imported import import_network
from cmd_plugin.networks.measuring import undisturbed
from cmd_plugin.pointcloud import build_network
from cmd_plugin.pointcloud._interception import scores_of

__all__ = ["Explained", "find_network"]

_PROBE_POINTS = 1024
_EXAMPLE = "'{\"classes\": 40}', for example"


class Explained(NamedTuple):
    """A network to explain.

    Attributes:
        network: Maps clouds [B, N, 3] to class scores [B, classes].
        classes: Name of each class.
        trained_on: Points in the clouds it was trained on; None if it does not say.
    """

    network: nn.Module
    classes: tuple[str, ...]
    trained_on: int | None


class _Adapted(nn.Module):
    """A user's network as ours are: clouds [B, N, 3] to class scores [B, classes].

    Args:
        network: Returns the scores, or several things of which they are the first tensor.
        turned: Whether it takes [B, 3, N].
    """

    def __init__(self, network: nn.Module, *, turned: bool) -> None:
        super().__init__()
        self.network, self.turned = network, turned

    @override
    def forward(self, points: Tensor) -> Tensor:
        output = self.network(points.transpose(1, 2).contiguous() if self.turned else points)
        scores = scores_of(output)
        return scores.unsqueeze(0) if len(points) == 1 and scores.ndim == 1 else scores


def find_network(options: ExplainOptions) -> Explained:
    """Build the network, in evaluation mode, and load its weights.

    Raises:
        InputError: If a file or module cannot be used, or the network takes no clouds.
        StateMismatch: If the weights do not fit the network.
    """
    weights = Path(options.weights)
    trained_on: int | None = None
    if options.network is not None:
        network, outputs = _own_network(options.network, options.network_args, weights)
        names = _numbered(outputs)
    elif options.model is None and weights.is_file() and is_point_network(weights):
        trained = load_point_network(weights)
        network, names, trained_on = trained.network, trained.classes, trained.points
    else:
        network, outputs = _known_network(weights, options.model, options.width)
        names = _numbered(outputs)
    if options.classes is not None:
        given = _read_names(Path(options.classes))
        if len(given) != len(names):
            raise InputError(
                f"{options.classes} has {len(given)} names, the network {len(names)} outputs."
            )
        names = given
    return Explained(network, names, trained_on)


def _numbered(outputs: int) -> tuple[str, ...]:
    return tuple(f"class {number}" for number in range(outputs))


def _own_network(place: str, arguments: str | None, weights: Path) -> tuple[nn.Module, int]:
    """A user's network with its weights, and the number of its outputs."""
    network = import_network(place, _arguments(arguments)).eval()
    load_weights(network, weights)
    failures = []
    for turned in (False, True):
        adapted = _Adapted(network, turned=turned).eval()
        try:
            return adapted, _outputs(adapted)
        except Exception as error:  # it is a stranger's code
            failures.append(" ".join(str(error).split())[:120].rstrip(".") or type(error).__name__)
    raise InputError(
        f"{place} gives no class scores [1, classes] for a cloud, neither as [1, N, 3] "
        f"({failures[0]}) nor as [1, 3, N] ({failures[1]}): name a network that classifies clouds."
    )


def _arguments(text: str | None) -> dict[str, object]:
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise InputError(f"--network-args is no JSON ({error}): write {_EXAMPLE}.") from error
    if not isinstance(found, dict):
        raise InputError(f"--network-args must be a JSON object: write {_EXAMPLE}.")
    return found


def _outputs(network: nn.Module) -> int:
    """Class scores that a network gives for a cloud of random points in the unit sphere."""
    points = torch.randn(1, _PROBE_POINTS, 3, generator=torch.Generator().manual_seed(0))
    points = points / points.norm(dim=2, keepdim=True).amax()
    with undisturbed(network):
        scores: Tensor = network(points)
    if scores.ndim != 2 or len(scores) != 1:
        raise InputError(f"it returns {tuple(scores.shape)}")
    return scores.shape[1]


def _known_network(weights: Path, model: str | None, width: float) -> tuple[nn.Module, int]:
    """A network around weights that do not say which it is, and the number of its outputs."""
    state = read_weights(weights)
    if model is None:
        raise InputError(
            f"{weights} does not say which network it belongs to: pass --model, or --network for "
            "one of your own."
        )
    # The last weight matrix of a classifier has one row for each class.
    outputs = [tensor.shape[0] for tensor in state.values() if tensor.ndim == 2][-1:]
    if not outputs:
        raise InputError(f"{weights} holds no linear layer: these are no weights of {model}.")
    require_fitting(weights, model, outputs[0], width, state)
    network = build_network(model, outputs[0], width)
    load_weights(network, weights)
    return network.eval(), outputs[0]


def _read_names(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        raise InputError(f"there is no file --classes {path}: check the path.")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--classes {path} cannot be read ({error}): give a text file.") from error
    return tuple(name for line in lines if (name := line.strip()))
