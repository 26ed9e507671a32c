"""The folder of ``distinction train``, as ``evaluate`` and ``explain`` open it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from cmd_plugin.distinction.artefact import load_decomposer, read_decomposer_about
from cmd_plugin.distinction.decomposition import Decomposer
from cmd_plugin.errors import InputError
from cmd_plugin.jobs.distinction.options import TrainOptions
from cmd_plugin.networks.named import build_model
from cmd_plugin.networks.weights import load_weights
from cmd_plugin.runs.result import RESULT, Result

__all__ = ["CLASSIFIER", "EXPLAINER", "JUDGE", "TrainedSplit", "open_model", "read_network"]

CLASSIFIER, JUDGE, EXPLAINER = (
    "classifier.safetensors",
    "judge.safetensors",
    "explainer.safetensors",
)


@dataclass(frozen=True)
class TrainedSplit:
    """What ``distinction train`` left.

    Attributes:
        decomposer: The trained decomposition, with its classifier unless it was trained for none.
        classifier: The classifier, in evaluation mode.
        judge: The judge, in evaluation mode.
        options: How it was trained.
        classes: Name of each class.
        channels: Of the images.
        size: Height and width of the images.
    """

    decomposer: Decomposer
    classifier: nn.Module
    judge: nn.Module
    options: TrainOptions
    classes: tuple[str, ...]
    channels: int
    size: tuple[int, int]

    def to(self, device: torch.device) -> Self:
        """Move the networks to a device."""
        for network in (self.decomposer, self.classifier, self.judge):
            network.to(device)
        return self

    def classify(self, network: nn.Module) -> UnitClassifier:
        """A network of this folder for images in [-1, 1]."""
        return UnitClassifier(network, self.decomposer.pixels).eval()


class UnitClassifier(nn.Module):
    """A classifier for images in [-1, 1], around one for the images of a data set.

    Args:
        network: The classifier.
        pixels: What black and white are for it.
    """

    def __init__(self, network: nn.Module, pixels: nn.Module) -> None:
        super().__init__()
        self.network, self.pixels = network, pixels

    def forward(self, images: Tensor) -> Tensor:
        """Class logits [B, k] of images [B, C, H, W] in [-1, 1]."""
        plain = self.pixels.from_unit(images)  # type: ignore[operator]
        logits: Tensor = self.network(plain)
        return logits


def open_model(folder: Path, classifier: Path | None = None) -> TrainedSplit:
    """Open the folder of a finished ``distinction train``.

    Args:
        folder: The folder.
        classifier: Weights of the classifier, if not the folder's own.

    Raises:
        InputError: If it is no such folder, or a file in it is damaged.
        StateMismatch: If the classifier is not the one it was trained for.
    """
    if not (folder / RESULT).is_file():
        raise InputError(f"{folder} holds no finished run: give the folder of `distinction train`.")
    result = Result.load(folder / RESULT)
    if result.job != "distinction train":
        raise InputError(
            f"{folder} holds a run of `{result.job}`: give the folder of `distinction train`."
        )
    about = read_decomposer_about(folder / EXPLAINER)
    try:
        given: dict[str, Any] = {
            n: tuple(v) if isinstance(v, list) else v for n, v in result.options.items()
        }
        options = TrainOptions(**given)
        classes = tuple(str(name) for name in about["classes"])
        channels, size = int(about["channels"]), (int(about["size"][0]), int(about["size"][1]))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError(f"{folder} is damaged ({error}): copy or train it again.") from error
    shape = {"channels": channels, "classes": len(classes), "size": size}
    network = read_network(options.model, classifier or folder / CLASSIFIER, shape)
    judge = read_network(options.judge, folder / JUDGE, shape)
    explained = None if options.objective == "distinction" else network
    decomposer = load_decomposer(folder / EXPLAINER, explained)
    return TrainedSplit(decomposer, network, judge, options, classes, channels, size)


def read_network(name: str, weights: Path, shape: Mapping[str, Any]) -> nn.Module:
    """Build a network by name and load its weights; in evaluation mode.

    Args:
        name: As :func:`cmd_plugin.networks.build_model` takes it.
        weights: The file.
        shape: ``channels``, ``classes`` and ``size``.

    Raises:
        InputError: If there is no such network, or the file cannot be used.
        StateMismatch: If the weights do not fit.
    """
    network = build_model(name, **shape)
    load_weights(network, weights)
    return network.eval()
