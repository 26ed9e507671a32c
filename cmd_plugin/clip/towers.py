"""One half of a CLIP-like model as a function: images or captions to raw projections.

Everything of this room works on what comes out of the projection, before it is divided by its
norm. The libraries hand it out under different names, and each has a way that is normalised.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from cmd_plugin.clip.preprocessing import Preprocessing, tokens
from cmd_plugin.errors import InputError, ShapeError
from cmd_plugin.networks import undisturbed

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Modality", "Tower", "image_tower", "looks_normalised", "text_tower"]

Modality = Literal["image", "text"]
_TOLERANCE = 1e-3


@dataclass
class Tower:
    """One half of a CLIP-like model, of any library.

    Made by :func:`image_tower` and :func:`text_tower`. The model is used in evaluation mode and
    found as it was afterwards.

    Attributes:
        model: The user's network.
        modality: ``image`` or ``text``.
        library: ``open_clip``, ``transformers`` or ``timm``; ``own`` for a way of the user's.
        name: What is written into files about the model.
        preprocessing: Of an image tower.
        tokenizer: Of a text tower, if known.
    """

    model: nn.Module
    modality: Modality
    library: str
    name: str
    _call: Callable[[Any], Any] = field(repr=False)
    preprocessing: Preprocessing | None = None
    tokenizer: Callable[..., Any] | None = None
    _warned: bool = field(repr=False, default=False)

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype that the encoder computes in; statistics and scores must share it."""
        own = getattr(self.model, "dtype", None)
        if isinstance(own, torch.dtype):
            return own
        weights = [p for p in self._part.parameters() if p.is_floating_point()]
        # Half-precision towers of open_clip keep their norms, all of one axis, in float32.
        wide = [p for p in weights if p.ndim > 1] or weights
        return wide[0].dtype if wide else torch.get_default_dtype()

    @property
    def device(self) -> torch.device:
        """Where the encoder computes."""
        return next((p.device for p in self._part.parameters()), torch.device("cpu"))

    @property
    def _part(self) -> nn.Module:
        names = ("visual", "vision_model") if self.modality == "image" else ("transformer", "text")
        parts = (getattr(self.model, name, None) for name in names)
        return next((part for part in parts if isinstance(part, nn.Module)), self.model)

    def encode(self, x: Any) -> Tensor:
        """Return raw projections of a batch that :meth:`prepare` made.

        Args:
            x: Pixels [B, 3, H, W], or token ids [B, T], or a dictionary of what the text tower
                takes.

        Returns:
            Shape [B, d], in the dtype and on the device of the encoder.

        Raises:
            ShapeError: If what comes back is no [B, d].
        """
        batch = self._moved(x)
        with undisturbed(self.model):
            found = self._call(batch)
        if not isinstance(found, Tensor) or found.ndim != 2:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ShapeError(f"{self.name} must return embeddings [B, d], it returned {shape}.")
        if not self._warned and looks_normalised(found):
            self._warned = True
            warnings.warn(
                f"the {self.modality} embeddings of {self.name} all have norm 1: they were divided "
                "by their norms, and whitening needs the raw projections.",
                stacklevel=2,
            )
        return found

    def prepare(self, inputs: Tensor | Sequence[Tensor | Image] | Sequence[str]) -> Any:
        """Return images or captions as :meth:`encode` takes them.

        Args:
            inputs: Images (see :class:`Preprocessing`), or captions.

        Raises:
            ShapeError: If an image has a wrong shape.
            InputError: If the tower knows no preprocessing or tokenizer.
        """
        if self.modality == "image":
            if self.preprocessing is None:
                raise InputError(f"{self.name} says no preprocessing: pass preprocessing=.")
            return self.preprocessing(inputs)  # type: ignore[arg-type]
        if self.tokenizer is None:
            raise InputError(f"{self.name} has no tokenizer: pass tokenizer=.")
        return tokens(self.tokenizer, inputs, _text_length(self.model))  # type: ignore[arg-type]

    def embed(self, inputs: Tensor | Sequence[Tensor | Image] | Sequence[str]) -> Tensor:
        """Return raw projections [B, d] of images or captions: prepared, then encoded."""
        return self.encode(self.prepare(inputs))

    def _moved(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.to(self.device, self.dtype if x.is_floating_point() else None)
        if isinstance(x, dict):
            return {name: self._moved(value) for name, value in x.items()}
        raise ShapeError(f"{self.name} takes a tensor or a dictionary of tensors, not {type(x)}.")


def looks_normalised(x: Tensor) -> bool:
    """Whether embeddings [N, d] were divided by their norms: all norms are 1 to 1e-3."""
    norms = x.detach().float().norm(dim=1)
    return len(norms) > 0 and bool(((norms - 1.0).abs() <= _TOLERANCE).all())


def image_tower(
    model: nn.Module,
    *,
    name: str | None = None,
    preprocessing: Preprocessing | None = None,
    encode: Callable[[Tensor], Tensor] | None = None,
) -> Tower:
    """Wrap the image half of a CLIP-like model; the model itself is not changed.

    Known are open_clip's models and what has their ``encode_image``, transformers' ``CLIPModel``,
    ``CLIPVisionModelWithProjection`` and ``SiglipModel`` (4.x and 5.x), and timm's CLIP towers
    (also any timm network without a classifier: its pooled features).

    Args:
        model: The network.
        name: Written into files; by default what the library calls it, or its class.
        preprocessing: What the model says if not given; of transformers, whose models do not say
            mean and standard deviation, the values CLIP (or SigLIP) was published with.
        encode: Own way from pixels [B, 3, H, W] to raw embeddings [B, d]; ``model`` then says what
            to protect, where to compute and in which dtype.

    Raises:
        InputError: If the model is of no known kind, or a classifier.
    """
    library, call = _image_call(model) if encode is None else ("own", encode)
    return Tower(
        model,
        "image",
        library,
        name or _name(model),
        call,
        preprocessing=preprocessing or _preprocessing(model, library),
    )


def text_tower(
    model: nn.Module,
    *,
    name: str | None = None,
    tokenizer: Callable[..., Any] | None = None,
    encode: Callable[[Any], Tensor] | None = None,
) -> Tower:
    """Wrap the text half of a CLIP-like model; the model itself is not changed.

    Known are open_clip's models and what has their ``encode_text``, and transformers'
    ``CLIPModel``, ``CLIPTextModelWithProjection`` and ``SiglipModel``.

    Args:
        model: The network.
        name: Written into files; by default its class.
        tokenizer: From ``open_clip.get_tokenizer`` or ``transformers.AutoTokenizer``; needed by
            :meth:`Tower.prepare`.
        encode: Own way from the batch to raw embeddings [B, d].

    Raises:
        InputError: If the model is of no known kind.
    """
    library, call = _text_call(model) if encode is None else ("own", encode)
    return Tower(
        model,
        "text",
        library,
        name or _name(model),
        call,
        tokenizer=tokenizer,
    )


def _image_call(model: Any) -> tuple[str, Callable[[Any], Any]]:
    if hasattr(model, "get_image_features"):
        return "transformers", lambda x: _pooled(model.get_image_features(pixel_values=x))
    if hasattr(model, "encode_image"):
        return "open_clip", _raw(model.encode_image)
    if hasattr(model, "visual_projection"):  # ...WithProjection, whose image_embeds are raw
        return "transformers", lambda x: model(pixel_values=x).image_embeds
    if hasattr(model, "forward_features") and hasattr(model, "num_classes"):
        _refuse_classifier(model)
        return "timm", model
    raise InputError(
        f"{type(model).__name__} is no image tower known here (open_clip, transformers with its "
        "projection, timm): pass encode=, a function from pixels to raw embeddings."
    )


def _text_call(model: Any) -> tuple[str, Callable[[Any], Any]]:
    if hasattr(model, "get_text_features"):
        return "transformers", lambda x: _pooled(model.get_text_features(**_named(x)))
    if hasattr(model, "encode_text"):
        raw = _raw(model.encode_text)
        return "open_clip", lambda x: raw(x["input_ids"] if isinstance(x, dict) else x)
    if hasattr(model, "text_projection") and hasattr(model, "text_model"):
        return "transformers", lambda x: model(**_named(x)).text_embeds
    raise InputError(
        f"{type(model).__name__} is no text tower known here (open_clip, transformers with its "
        "projection): pass encode=, a function from tokens to raw embeddings."
    )


def _raw(encode: Callable[..., Any]) -> Callable[[Any], Any]:
    """The method with normalising switched off where it can be switched."""
    if "normalize" in inspect.signature(encode).parameters:
        return lambda x: encode(x, normalize=False)
    return encode


def _pooled(found: Any) -> Any:
    """The projection: transformers 4 returns it, 5 puts it into ``pooler_output``."""
    return found if isinstance(found, Tensor) else found.pooler_output


def _named(x: Any) -> dict[str, Tensor]:
    return x if isinstance(x, dict) else {"input_ids": x}


def _refuse_classifier(model: Any) -> None:
    """Raise InputError if a timm network ends in a classifier, not in CLIP's projection."""
    if model.num_classes == 0:
        return  # pooled features: SigLIP's embeddings, or a network of any kind without its head
    config = getattr(model, "pretrained_cfg", None) or {}
    tag, kind = str(config.get("tag") or ""), str(config.get("architecture") or "")
    contrastive = "clip" in f"{kind}.{tag}" and not re.search(r"(^|_)ft_in\d+k", tag)
    if not contrastive or model.num_classes != config.get("num_classes"):
        raise InputError(
            f"{kind or type(model).__name__}{f'.{tag}' if tag else ''} of timm ends in "
            f"{model.num_classes} class scores: build it with a CLIP tag (such as .openai) for its "
            "projection, or with num_classes=0 for its pooled features."
        )


def _name(model: Any) -> str:
    config = getattr(model, "pretrained_cfg", None)
    if isinstance(config, dict) and config.get("architecture"):
        tag = config.get("tag")
        return f"{config['architecture']}.{tag}" if tag else str(config["architecture"])
    where = getattr(getattr(model, "config", None), "_name_or_path", None)
    return str(where) if where else type(model).__name__


def _text_length(model: Any) -> int | None:
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", config)
    length = getattr(config, "max_position_embeddings", None)
    return int(length) if length else None


def _preprocessing(model: Any, library: str) -> Preprocessing | None:
    if library == "timm":
        config = model.pretrained_cfg
        return Preprocessing(
            size=_square(getattr(getattr(model, "patch_embed", None), "img_size", None))
            or tuple(config["input_size"][1:]),
            mean=config["mean"],
            std=config["std"],
            interpolation=config["interpolation"],
            resize="squash" if config.get("crop_mode") == "squash" else "shortest",
            crop=config["crop_pct"],
        )
    if library == "transformers":
        config = getattr(model.config, "vision_config", model.config)
        if "siglip" in str(getattr(config, "model_type", "")):
            half = (0.5, 0.5, 0.5)
            return Preprocessing(
                _square(config.image_size) or (224, 224), half, half, resize="squash"
            )
        return Preprocessing(_square(config.image_size) or (224, 224))
    size = _square(getattr(getattr(model, "visual", None), "image_size", None))
    if size is None:
        return None
    said = dict(getattr(model.visual, "preprocess_cfg", None) or {})
    known = {k: said[k] for k in ("mean", "std", "interpolation") if said.get(k)}
    if said.get("resize_mode") in ("shortest", "squash"):
        known["resize"] = said["resize_mode"]
    elif said.get("resize_mode"):
        raise InputError(
            f"{_name(model)} resizes by {said['resize_mode']!r}, which is not known here: pass "
            "preprocessing=."
        )
    return Preprocessing(size, **known)


def _square(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))
