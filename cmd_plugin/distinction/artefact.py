"""The file of a trained decomposition, which belongs to one classifier and refuses any other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cmd_plugin.distinction.decomposition import Decomposer
from cmd_plugin.distinction.frozen import FrozenClassifier, PixelRange, hash_weights
from cmd_plugin.distinction.generator import BranchedGenerator
from cmd_plugin.errors import InputError, StateMismatch
from cmd_plugin.runs.tensors import Schema

__all__ = ["load_decomposer", "read_decomposer_about", "save_decomposer"]

_SCHEMA = Schema("distinction", 1, "a trained decomposition")
_PREFIX = "generator."


def save_decomposer(
    path: str | Path, decomposer: Decomposer, about: Mapping[str, Any] | None = None
) -> None:
    """Write a trained decomposition: the generator, the pixel range, and the classifier's hash.

    Args:
        path: The file, ``.safetensors``.
        decomposer: The trained one; the classifier itself is not written.
        about: JSON types to keep with it, such as class names.

    Raises:
        InputError: If it cannot be written.
    """
    frozen = decomposer.classifier
    tensors = {f"{_PREFIX}{n}": t for n, t in decomposer.generator.state_dict().items()}
    tensors |= {"low": decomposer.pixels.low, "high": decomposer.pixels.high}
    _SCHEMA.save(
        path,
        tensors,
        {
            "settings": json.dumps(decomposer.generator.settings),
            "classifier": "" if frozen is None else hash_weights(frozen.network),
            "about": json.dumps(dict(about or {}), sort_keys=True),
        },
    )


def read_decomposer_about(path: str | Path) -> dict[str, Any]:
    """Return what :func:`save_decomposer` was told about a decomposition.

    Raises:
        InputError: If the file is missing, damaged or something else.
    """
    _, metadata = _SCHEMA.load(path)
    return _json(path, metadata, "about")


def load_decomposer(path: str | Path, classifier: nn.Module | None = None) -> Decomposer:
    """Read a trained decomposition, and put it together with its classifier.

    Args:
        path: The file.
        classifier: The one it was trained for, with the same weights; None if it was trained for
            none.

    Raises:
        InputError: If the file is missing, damaged or something else, or a classifier is missing.
        StateMismatch: If the classifier is another one, or there was none.
    """
    tensors, metadata = _SCHEMA.load(path)
    settings, known = _json(path, metadata, "settings"), metadata.get("classifier", "")
    _require_classifier(path, known, classifier)
    state = {
        name.removeprefix(_PREFIX): tensor
        for name, tensor in tensors.items()
        if name.startswith(_PREFIX)
    }
    try:
        with torch.device("meta"):  # a damaged number must not fill the memory
            generator = BranchedGenerator(**settings)
        generator.load_state_dict(state, assign=True)
        pixels = PixelRange(tensors["low"].flatten().tolist(), tensors["high"].flatten().tolist())
        if pixels.low.numel() not in (1, generator.channels):
            raise ValueError("the pixel range is of other channels")
    except (InputError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is damaged ({type(error).__name__}: {' '.join(str(error).split())[:160]}): "
            "copy or train it again."
        ) from error
    frozen = None if classifier is None else FrozenClassifier(classifier)
    return Decomposer(generator.requires_grad_(False), pixels, frozen).eval()


def _require_classifier(path: str | Path, known: str, classifier: nn.Module | None) -> None:
    if not known and classifier is not None:
        raise StateMismatch(
            f"{path} was trained without a classifier, so it explains none: leave it out."
        )
    if known and classifier is None:
        raise InputError(f"{path} explains one classifier: give it, with the weights it had.")
    if classifier is not None and hash_weights(classifier) != known:
        raise StateMismatch(
            f"{path} was trained for another classifier (its weights have another hash): give the "
            "one it was trained for, or train a decomposition for this one."
        )


def _json(path: str | Path, metadata: Mapping[str, str], name: str) -> dict[str, Any]:
    try:
        found = json.loads(metadata[name])
    except (KeyError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged (no {name}): copy or train it again.") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is damaged (no {name}): copy or train it again.")
    return found
