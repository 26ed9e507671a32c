"""A set of labelled clouds in memory, and the unit sphere that networks expect them in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cmd_plugin.errors import InputError, NonFiniteError, ShapeError

__all__ = ["PointClouds", "unit_sphere"]


@dataclass(frozen=True)
class PointClouds(Dataset[tuple[Tensor, Tensor]]):
    """Labelled clouds of equal size.

    Attributes:
        points: [S, N, 3] float32.
        labels: [S] int64, in 0..classes-1.
        classes: Name of each class.
        name: Where the clouds come from, for tables.

    Raises:
        ShapeError: If the shapes do not fit.
        NonFiniteError: If a coordinate is NaN or infinite.
        InputError: If a label is out of range.
    """

    points: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    name: str = "clouds"

    def __post_init__(self) -> None:
        if self.points.ndim != 3 or self.points.shape[2] != 3:
            raise ShapeError(
                f"{self.name}: clouds must be [S, N, 3], got {tuple(self.points.shape)}."
            )
        if self.labels.shape != self.points.shape[:1]:
            raise ShapeError(
                f"{self.name}: {len(self.points)} clouds need as many labels, got "
                f"{tuple(self.labels.shape)}."
            )
        wrong = int((~torch.isfinite(self.points)).sum())
        if wrong:
            raise NonFiniteError(
                f"{self.name}: {wrong} coordinates are NaN or infinite: remove those clouds."
            )
        if len(self.labels) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(
            self.classes
        ):
            raise InputError(
                f"{self.name}: labels must be 0 to {len(self.classes) - 1}, found "
                f"{int(self.labels.min())} to {int(self.labels.max())}."
            )

    def __len__(self) -> int:
        """Number of clouds S."""
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Points [N, 3] and label [] of one cloud."""
        return self.points[index], self.labels[index]

    def select(self, indices: Tensor) -> PointClouds:
        """The chosen clouds, copied, in the order of ``indices`` int64."""
        return PointClouds(self.points[indices], self.labels[indices], self.classes, self.name)


def unit_sphere(points: Tensor) -> Tensor:
    """Clouds [..., N, 3] centred on their mean and divided by their largest radius."""
    centred = points - points.mean(dim=-2, keepdim=True)
    radius = centred.norm(dim=-1, keepdim=True).amax(dim=-2, keepdim=True)
    unit: Tensor = centred / radius.clamp_min(1e-12)
    return unit
