"""The encoder of a command: which network makes embeddings of images and of captions."""

from __future__ import annotations

import hashlib
import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from cmd_plugin.clip.named_towers import load_tower
from cmd_plugin.clip.preprocessing import Preprocessing
from cmd_plugin.clip.towers import Modality, Tower, image_tower, text_tower
from cmd_plugin.errors import InputError, require
from cmd_plugin.jobs.clip.options import EncoderOptions
from cmd_plugin.runs.process import pick_device

__all__ = ["describe_encoder", "find_tower"]

_OPEN_CLIP = "open_clip_config.json"
_PIECE = 16 * 1024**2


def find_tower(options: EncoderOptions, modality: Modality) -> Tower:
    """Build one half of the encoder, on its device; nothing is downloaded.

    Raises:
        InputError: If there is no such model, or its weights are not there or do not fit.
        MissingDependency: If its library is not installed.
    """
    device = pick_device(options.accelerator)
    with _alone(options.model or ""):
        tower = _build(options, modality)
    tower.model.to(device)
    if modality == "image":
        tower.preprocessing = _sized(tower, options.image_size)
    return tower


def _build(options: EncoderOptions, modality: Modality) -> Tower:
    name, weights = options.model or "", options.weights
    folder = Path(name.removeprefix("transformers:")).expanduser()
    if folder.is_dir():
        if weights is not None or options.untrained:
            raise InputError(
                f"the folder {folder} holds its own weights: leave out --weights and --untrained."
            )
        if (folder / _OPEN_CLIP).is_file():
            return _saved(folder, modality)
        return load_tower(f"transformers:{folder}", modality)
    if name.startswith("transformers:"):
        raise InputError(f"there is no folder {folder}: transformers models are saved in one.")
    if weights is None and not options.untrained:
        raise InputError(
            f"--model {name} is a network without weights: give a file of them by --weights, or "
            "--untrained to try the command with random ones."
        )
    if weights is not None and not Path(weights).is_file():
        raise InputError(f"there is no file --weights {weights}: check the path.")
    given = None if weights is None else str(weights)
    return load_tower(name, modality, weights=given, seed=options.seed)


@contextmanager
def _alone(name: str) -> Iterator[None]:
    """Let libraries build a model without the network, and without a word on random weights.

    Raises:
        InputError: If the model needs files that are not here.
    """
    level = logging.root.manager.disable
    hub: Any = None
    with suppress(ImportError):
        hub = importlib.import_module("huggingface_hub.constants")
    online = getattr(hub, "HF_HUB_OFFLINE", None)
    try:
        logging.disable(logging.WARNING)
        if hub is not None:
            hub.HF_HUB_OFFLINE = True
        yield
    except OSError as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise InputError(
            f"--model {name} cannot be built from what is on this machine ({reason}): download it "
            "beforehand, and give its folder."
        ) from error
    finally:
        logging.disable(level)
        if hub is not None:
            hub.HF_HUB_OFFLINE = online


def describe_encoder(options: EncoderOptions, tower: Tower) -> dict[str, str]:
    """Return what embeddings of an encoder have in common, text by name: others do not compare."""
    weights = "of its folder"
    if options.untrained:
        weights = f"random, seed {options.seed}"
    elif options.weights is not None:
        weights = f"sha256 {_digest(Path(options.weights))}"
    about = {
        "encoder": options.model or "",
        "weights": weights,
        "encoder_dtype": str(tower.dtype).removeprefix("torch."),
    }
    if tower.preprocessing is not None:
        about["preprocessing"] = str(tower.preprocessing)
    return about


def _saved(folder: Path, modality: Modality) -> Tower:
    """One half of a model that open_clip saved in a folder."""
    library: Any = require("open_clip", "clip")
    place = f"local-dir:{folder}"
    try:
        model = library.create_model(place)
        tokenizer = library.get_tokenizer(place) if modality == "text" else None
    except Exception as error:  # damaged folders end in almost any exception
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise InputError(f"open_clip cannot load {folder} ({reason}): check the folder.") from error
    model.eval().requires_grad_(False)
    name = folder.name
    if modality == "image":
        return image_tower(model, name=name)
    return text_tower(model, name=name, tokenizer=tokenizer)


def _sized(tower: Tower, size: int | None) -> Preprocessing:
    known = tower.preprocessing
    if size is None:
        if known is None:
            raise InputError(f"{tower.name} does not say how large its images are: --image-size.")
        return known
    return replace(known or Preprocessing(), size=(size, size))


def _digest(path: Path) -> str:
    """First digits of a file's checksum: enough to tell two sets of weights apart."""
    found = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(_PIECE):
            found.update(piece)
    return found.hexdigest()[:16]
