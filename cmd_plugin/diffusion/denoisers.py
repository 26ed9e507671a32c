"""Small denoisers to train where nobody brings one, and the file they are kept in."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cmd_plugin.diffusion.schedules import NoiseSchedule
from cmd_plugin.diffusion.score_model import ScoreModel
from cmd_plugin.errors import InputError, ShapeError, StateMismatch, require
from cmd_plugin.runs.tensors import Schema

__all__ = ["DENOISERS", "TrainedDenoiser", "build_denoiser", "denoiser_model"]

DENOISERS = ("mlp", "unet")

_SCHEMA = Schema("denoiser", 1, "a denoiser of `diffusion train`")
_FREQUENCIES = 16
_LARGEST = 1 << 26  # scalars of an image, and width: beyond, a file is damaged


class _Mlp(nn.Module):
    """Fully connected, with the image let past: without that its width would cap p1 below 1."""

    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        periods = 10_000.0 ** (-torch.arange(_FREQUENCIES, dtype=torch.float32) / _FREQUENCIES)
        self.register_buffer("periods", periods, persistent=False)
        self.inner = nn.Sequential(
            nn.Linear(d + 2 * _FREQUENCIES, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, d),
        )
        self.past = nn.Linear(d, d)

    def forward(self, y: Tensor, t: Tensor) -> Tensor:
        flat = y.flatten(1)
        phase = t.to(flat.dtype)[:, None] * self.periods  # type: ignore[operator]
        inside = self.inner(torch.cat([flat, phase.sin(), phase.cos()], dim=1))
        return (inside + self.past(flat)).reshape(y.shape)  # type: ignore[no-any-return]


class _Unet(nn.Module):
    """The UNet2DModel of diffusers, called as the others are."""

    def __init__(self, shape: Sequence[int], width: int) -> None:
        super().__init__()
        channels, height, side = shape
        levels = 2 if min(height, side) < 16 else 3
        widths = tuple(width * min(2**level, 2) for level in range(levels))
        plain = levels - 1
        self.unet = require("diffusers", "diffusion").UNet2DModel(
            sample_size=(height, side),
            in_channels=channels,
            out_channels=channels,
            block_out_channels=widths,
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=8,
            down_block_types=(*["DownBlock2D"] * plain, "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", *["UpBlock2D"] * plain),
        )

    def forward(self, y: Tensor, t: Tensor) -> Tensor:
        return self.unet(y, t, return_dict=False)[0]  # type: ignore[no-any-return]


def build_denoiser(name: str, shape: Sequence[int], width: int) -> nn.Module:
    """Return a network that maps noised images [N, ...] and times [N] to their noise.

    Args:
        name: ``"mlp"``, for images of a few hundred scalars, or ``"unet"`` (diffusers).
        shape: (channels, height, width) of an image.
        width: Hidden width of the MLP; channels at full size of the UNet, a multiple of 8.

    Raises:
        InputError: If name or width cannot be used.
        ShapeError: If the shape cannot be used.
        MissingDependency: If diffusers is not installed, for ``"unet"``.
    """
    if name not in DENOISERS:
        raise InputError(f"unknown denoiser {name!r}: choose one of {', '.join(DENOISERS)}.")
    if len(shape) != 3 or min(shape) < 1 or math.prod(shape) > _LARGEST:
        raise ShapeError(f"an image is (channels, height, width), got {tuple(shape)}.")
    if not 1 <= width <= _LARGEST or (name == "unet" and width % 8):
        raise InputError(f"width must be at least 1, of a unet a multiple of 8, got {width}.")
    if name == "mlp":
        return _Mlp(math.prod(shape), width)
    if shape[1] % 4 or shape[2] % 4:
        raise ShapeError(f"a unet needs sides that 4 divides, got {shape[1]} x {shape[2]}.")
    return _Unet(shape, width)


def denoiser_model(network: nn.Module, shape: Sequence[int], schedule: NoiseSchedule) -> ScoreModel:
    """Return a network of :func:`build_denoiser` as a score model."""
    return ScoreModel(lambda y, t, _: network(y, t.long()), schedule, shape, networks=[network])


@dataclass(frozen=True)
class TrainedDenoiser:
    """A denoiser with what is to be known about it.

    Attributes:
        network: From :func:`build_denoiser`.
        name: Its name there.
        shape: (channels, height, width) of an image, in [-1, 1].
        width: Its width.
        schedule: The schedule of steps it was trained with.
        data: Name of the data set.
    """

    network: nn.Module
    name: str
    shape: tuple[int, ...]
    width: int
    schedule: NoiseSchedule
    data: str

    def model(self) -> ScoreModel:
        """Return it as a score model."""
        return denoiser_model(self.network, self.shape, self.schedule)

    def save(self, path: str | Path) -> None:
        """Write weights and schedule as safetensors.

        Raises:
            InputError: If it cannot be written.
        """
        assert self.schedule.alphas_cumprod is not None
        about = {
            "denoiser": self.name,
            "shape": json.dumps(self.shape),
            "width": str(self.width),
            "data": self.data,
        }
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        _SCHEMA.save(path, {**tensors, "alphas_cumprod": self.schedule.alphas_cumprod}, about)

    @classmethod
    def load(cls, path: str | Path) -> TrainedDenoiser:
        """Read what :meth:`save` wrote; the network is in evaluation mode.

        Raises:
            InputError: If the file is missing, damaged or something else.
            StateMismatch: If its weights are not those of the network that it says it holds.
        """
        tensors, about = _SCHEMA.load(path)
        try:
            shape: Any = json.loads(about["shape"])
            name, width, data = about["denoiser"], int(about["width"]), about["data"]
            schedule = NoiseSchedule("steps", tensors.pop("alphas_cumprod"))
            if not (isinstance(shape, list) and all(isinstance(s, int) for s in shape)):
                raise ValueError("no shape of an image")
            stored = sum(tensor.numel() for tensor in tensors.values())
            # Before memory is taken: what the file says it holds must be what it holds.
            with torch.device("meta"):
                wanted = build_denoiser(name, shape, width).state_dict()
            needed = sum(tensor.numel() for tensor in wanted.values())
        except (KeyError, TypeError, ValueError, RuntimeError, RecursionError) as error:
            raise InputError(f"{path} is damaged ({error}): copy or train it again.") from error
        if needed != stored:
            raise StateMismatch(
                f"{path} has {stored} weights, and its {name} of width {width} has {needed}: copy "
                "or train it again."
            )
        network = build_denoiser(name, shape, width)
        weights = {key.removeprefix("network."): value for key, value in tensors.items()}
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            raise StateMismatch(
                f"the weights in {path} are not those of its {name}: copy or train it again."
            ) from error
        return cls(network.eval(), name, tuple(shape), width, schedule, data)
