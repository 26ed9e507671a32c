"""The model a folder holds, and images as that model sees them."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmd_plugin.data import ImageSet, read_images
from cmd_plugin.diffusion import (
    LatentCodec,
    PixelCodec,
    ProbeSet,
    ScoreModel,
    TrainedDenoiser,
    codec_of,
    draw_samples,
)
from cmd_plugin.diffusion.codecs import Codec
from cmd_plugin.diffusion.diffusers_models import encode_prompts, read_diffusers
from cmd_plugin.errors import InputError
from cmd_plugin.runs.process import find_device

__all__ = [
    "MODEL",
    "PROBES",
    "Images",
    "LoadedModel",
    "kinds_of",
    "load_model",
    "read_captions",
    "read_for",
]

MODEL, PROBES = "model.safetensors", "probes.safetensors"


class LoadedModel(NamedTuple):
    """A model with what is to be known to show it images.

    Attributes:
        model: The model.
        codec: Turns images in [-1, 1] into what it sees.
        shape: (channels, height, width) of such images.
        probes: Images it was trained on and images it was not; None if the folder has none.
        encode: Turns prompts into conditions [N, tokens, width]; None if it takes no prompts.
    """

    model: ScoreModel
    codec: Codec
    shape: tuple[int, int, int]
    probes: ProbeSet | None
    encode: Callable[[Sequence[str]], Tensor] | None = None

    def sample(self, count: int, seed: int, **options: Any) -> Tensor:
        """Let the model make images: [N, C, H, W] in [-1, 1] on the CPU, of 256 levels.

        Args:
            count: How many.
            seed: Of the noise.
            **options: Further ones of :func:`.sampling.draw_samples`.
        """
        plain = isinstance(self.codec, PixelCodec)
        seen = draw_samples(self.model, count, clamp=plain, seed=seed, **options)
        images = self.codec.decode(seen).clamp(-1.0, 1.0).cpu()
        return ((images + 1.0) * 127.5).round() / 127.5 - 1.0


def load_model(folder: Path, accelerator: str = "cpu") -> LoadedModel:
    """Read a folder of ``diffusion train``, or of a pipeline of diffusers.

    Args:
        folder: The folder.
        accelerator: Where the model shall run: one of ``runs.process.ACCELERATORS``.

    Raises:
        InputError: If it is neither, or cannot be used, or the device is not there.
    """
    folder, device = Path(folder), find_device(accelerator)
    if (folder / "model_index.json").is_file():
        pipeline = read_diffusers(folder).to(device)
        model, codec = ScoreModel.from_diffusers(pipeline), codec_of(pipeline)
        channels, height, width = model.shape
        if isinstance(codec, LatentCodec):
            config = codec.autoencoder.config
            factor = 2 ** (len(config["block_out_channels"]) - 1)
            channels, height, width = int(config["in_channels"]), height * factor, width * factor
        # Its pipeline encodes the empty prompt, so it can encode others.
        encode = partial(encode_prompts, pipeline) if model.unconditional is not None else None
        return LoadedModel(model, codec, (channels, height, width), None, encode)
    if not (folder / MODEL).is_file():
        raise InputError(
            f"{folder} holds no model (neither {MODEL} nor model_index.json): give the folder that "
            "`diffusion train` or save_pretrained of a pipeline wrote."
        )
    trained = TrainedDenoiser.load(folder / MODEL)
    probes = ProbeSet.load(folder / PROBES) if (folder / PROBES).is_file() else None
    if probes is not None and tuple(probes.members.shape[1:]) != trained.shape:
        raise InputError(f"{folder / PROBES} does not belong to the model beside it: train again.")
    channels, height, width = trained.shape
    trained.network.to(device)
    return LoadedModel(trained.model(), PixelCodec(), (channels, height, width), probes)


class Images(NamedTuple):
    """Images of one place, read as a model needs them.

    Attributes:
        found: What was read.
        shape: (channels, height, width) wanted.
    """

    found: ImageSet
    shape: tuple[int, int, int]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.found.names)

    def read(self, start: int, stop: int) -> Tensor:
        """Return images number ``start`` to ``stop``, [B, C, H, W] in [0, 1]."""
        images = self.found.images.read(torch.arange(start, stop))
        channels = self.shape[0]
        if images.shape[1] == channels:
            return images
        if channels == 1:
            weights = torch.tensor([0.299, 0.587, 0.114]).reshape(1, 3, 1, 1)
            return (images * weights).sum(1, keepdim=True)
        if images.shape[1] == 1:
            return images.expand(-1, channels, -1, -1)
        raise InputError(f"the model sees images of {channels} channels, which files have not.")

    def kinds(self) -> list[str]:
        """Return the endings of the files, which tell one kind of file from another."""
        return sorted({Path(name).suffix.lower() for name in self.found.names})

    def skipped(self) -> list[str]:
        """Return what was left out and why."""
        return [f"{item.name} {item.reason}" for item in self.found.skipped]


def read_for(loaded: LoadedModel, path: Path) -> Images:
    """Read images at the size a model wants; unreadable files are left out and listed.

    Raises:
        InputError: If there is nothing to read.
    """
    _, height, width = loaded.shape
    found = read_images(path, (height, width), labelled=False, skip_unreadable=True)
    return Images(found, loaded.shape)


def read_captions(path: Path, names: Sequence[str]) -> list[str]:
    """Read the caption of each image from a CSV file of name and caption.

    Names are those of the images' files, with their folder as it is written in scores.csv; a first
    row that says ``name`` is a heading.

    Raises:
        InputError: If the file cannot be read, a row is no such pair, or an image has no caption.
    """
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as stream:
            rows = [row for row in csv.reader(stream) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"captions {path} cannot be read ({error}): give a CSV file.") from error
    for number, row in enumerate(rows, 1):
        if len(row) != 2:
            raise InputError(
                f"row {number} of {path} has {len(row)} columns: each is an image's name and its "
                "caption, quoted if it has a comma."
            )
    captions = dict(rows[1:] if rows and rows[0][0] == "name" else rows)
    missing = [name for name in names if name not in captions]
    if missing:
        raise InputError(
            f"{path} has no caption of {len(missing)} images, first {missing[0]}: add them."
        )
    return [captions[name] for name in names]


def kinds_of(names: Sequence[str], real: str) -> dict[str, list[int]] | None:
    """Kind -> places of its images; None where they lie in no folders, or none is called real."""
    kinds: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        kinds.setdefault(name.split("/")[0] if "/" in name else "", []).append(place)
    return kinds if real in kinds and len(kinds) > 1 and "" not in kinds else None
