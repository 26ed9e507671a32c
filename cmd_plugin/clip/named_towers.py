"""Towers by name: from open_clip, timm or transformers, or a network of the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from cmd_plugin.clip.towers import Modality, Tower, image_tower, text_tower
from cmd_plugin.errors import InputError, require
from cmd_plugin.networks import load_weights, undisturbed
from cmd_plugin.networks.imported import import_network

__all__ = ["load_tower"]


def load_tower(
    name: str, modality: Modality = "image", *, weights: str | None = None, seed: int = 0
) -> Tower:
    """Build a tower by name.

    Args:
        name: ``open_clip:ViT-B-32``, ``timm:vit_base_patch16_clip_224.openai`` (images only),
            ``transformers:FOLDER`` (a saved model; a name of the hub is downloaded by the library),
            or ``module:Class`` for an own network with ``encode_image`` and ``encode_text``.
        modality: Which half.
        weights: A file of weights, or of open_clip a tag (``openai``) and of timm ``pretrained``,
            which the library downloads. Without it weights are random, from ``seed``: enough to try
            things out. Not for ``transformers:``, whose folder holds them.
        seed: Of random weights.

    Raises:
        InputError: If there is no such model, or the weights do not fit.
        MissingDependency: If the library is not installed.
    """
    engine, _, rest = name.partition(":")
    if not rest:
        raise InputError(
            f"{name!r} names no tower: write open_clip:NAME, timm:NAME, transformers:FOLDER or "
            "module:Class."
        )
    if modality not in ("image", "text"):
        raise InputError(f"modality must be image or text, it is {modality!r}.")
    with undisturbed():  # the random state is put back
        torch.manual_seed(seed)
        if engine == "open_clip":
            return _open_clip(rest, modality, weights, name)
        if engine == "timm":
            return _timm(rest, modality, weights, name)
        if engine == "transformers":
            return _transformers(rest, modality, weights, name)
        model = import_network(name)
    _load(model, weights)
    return _wrap(model, modality, name)


def _wrap(model: nn.Module, modality: Modality, name: str, tokenizer: Any = None) -> Tower:
    model.eval().requires_grad_(False)
    if modality == "image":
        return image_tower(model, name=name)
    return text_tower(model, name=name, tokenizer=tokenizer or getattr(model, "tokenizer", None))


def _load(model: nn.Module, weights: str | None) -> None:
    if weights is not None:
        load_weights(model, Path(weights))


def _open_clip(rest: str, modality: Modality, weights: str | None, name: str) -> Tower:
    library: Any = require("open_clip", "clip")
    if rest not in library.list_models():
        raise InputError(f"open_clip has no model {rest!r}: see open_clip.list_models().")
    tag = weights if weights is not None and not Path(weights).is_file() else None
    if tag is not None and tag not in library.list_pretrained_tags_by_model(rest):
        raise InputError(
            f"{weights} is neither a file nor a tag of {rest}: pass a file, or one of "
            f"{', '.join(library.list_pretrained_tags_by_model(rest)) or 'none'}."
        )
    model = library.create_model(rest, pretrained=tag)
    _load(model, None if tag is not None else weights)
    tokenizer = library.get_tokenizer(rest) if modality == "text" else None
    return _wrap(model, modality, name, tokenizer)


def _timm(rest: str, modality: Modality, weights: str | None, name: str) -> Tower:
    library: Any = require("timm", "clip")
    if modality == "text":
        raise InputError("timm has image towers only: take open_clip or transformers for texts.")
    if ":" in rest or not library.is_model(rest):
        raise InputError(f"timm has no model {rest!r}: see timm.list_models('*clip*').")
    model = library.create_model(rest, pretrained=weights == "pretrained")
    _load(model, None if weights == "pretrained" else weights)
    return _wrap(model, modality, name)


def _transformers(rest: str, modality: Modality, weights: str | None, name: str) -> Tower:
    library: Any = require("transformers", "clip")
    if weights is not None:
        raise InputError("transformers: reads its weights from the folder: leave weights out.")
    try:
        # Without the flag the library would ask, on the terminal, whether to run a folder's code.
        own = {"trust_remote_code": False}
        model = library.AutoModel.from_pretrained(rest, **own)
        tokenizer = None
        if modality == "text":
            tokenizer = library.AutoTokenizer.from_pretrained(rest, **own)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"transformers cannot load {rest} ({reason}): check the folder."
        ) from error
    return _wrap(model, modality, name, tokenizer)
