"""Fixed images to look at while a model trains, and duplicates planted among what it trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cmd_plugin.errors import InputError, NonFiniteError, ShapeError
from cmd_plugin.runs.tensors import Schema

__all__ = ["ProbeSet", "plant_duplicates"]

_SCHEMA = Schema("memorization-probes", 1, "a ProbeSet")


@dataclass(frozen=True)
class ProbeSet:
    """Images of the training set, how often each is in it, and images that are not.

    Attributes:
        members: [A, ...] images a model trains on, as it sees them.
        held_out: [H, ...] images it does not.
        doses: [A] int64 how often each member is in the training set; by default once.

    Raises:
        InputError: If a side is empty or a dose is below 1.
        ShapeError: If shapes do not fit.
        NonFiniteError: If an image is not finite.
    """

    members: Tensor
    held_out: Tensor
    doses: Tensor | None = None

    def __post_init__(self) -> None:
        """Check the images."""
        if not len(self.members) or not len(self.held_out):
            raise InputError(
                f"probes need members and held-out images, got {len(self.members)} and "
                f"{len(self.held_out)}."
            )
        for images in (self.members, self.held_out):
            if images.shape[1:] != self.members.shape[1:] or not images.is_floating_point():
                raise ShapeError(
                    "members and held-out images must be of one shape, in floating point; got "
                    f"{tuple(self.members.shape)} and {tuple(self.held_out.shape)}."
                )
            if not bool(images.isfinite().all()):
                raise NonFiniteError("probes hold NaN or infinite values.")
        doses = torch.ones(len(self.members)) if self.doses is None else self.doses
        if doses.shape != (len(self.members),) or bool((doses < 1).any()):
            raise InputError(f"doses must be {len(self.members)} whole numbers, at least 1.")
        object.__setattr__(self, "doses", doses.to("cpu", torch.int64))

    def each_dose(self) -> dict[int, Tensor]:
        """Return dose -> [k] places of its members, ascending."""
        doses = self.doses
        assert doses is not None
        return {dose: (doses == dose).nonzero().flatten() for dose in sorted(set(doses.tolist()))}

    def save(self, path: str | Path) -> None:
        """Write a safetensors file.

        Raises:
            InputError: If it cannot be written.
        """
        assert self.doses is not None
        tensors = {"members": self.members, "held_out": self.held_out, "doses": self.doses}
        _SCHEMA.save(path, tensors, {})

    @classmethod
    def load(cls, path: str | Path) -> ProbeSet:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: If the file is missing, damaged or something else.
        """
        tensors, _ = _SCHEMA.load(path)
        if tensors.keys() != {"members", "held_out", "doses"}:
            raise InputError(f"{path} is damaged: make the probes again.")
        try:
            return cls(**tensors)
        except InputError as error:
            raise InputError(f"{path} is damaged ({error}): make the probes again.") from error


def plant_duplicates(
    images: int, plan: dict[int, int], singles: int | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Choose which images of a training set come how often.

    Args:
        images: Number of images there are.
        plan: Dose -> number of images, see :func:`.doses.parse_doses`.
        singles: How many of the others to keep, once each; by default all.
        seed: Of the choice.

    Returns:
        [K] int64 the chosen images and [K] int64 their doses, planted ones first.

    Raises:
        InputError: If there are not as many images.
    """
    planted: Sequence[int] = [dose for dose, count in sorted(plan.items()) for _ in range(count)]
    left = images - len(planted)
    kept = left if singles is None else singles
    if kept < 0 or left < kept:
        raise InputError(
            f"{len(planted)} planted and {max(kept, 0)} single images do not go into {images}: "
            "plant fewer."
        )
    order = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
    doses = torch.tensor([*planted, *[1] * kept], dtype=torch.int64)
    return order[: len(doses)], doses
