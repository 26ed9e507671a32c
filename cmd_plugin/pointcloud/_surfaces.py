"""Surfaces that the procedural shapes are built from: an area, and points from uniform numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Surface", "box", "ellipsoid", "frustum", "sample", "tube"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Surface:
    """A piece of surface.

    Attributes:
        area: Its area (for the tube and the ellipsoid a close approximation).
        place: Maps uniform numbers [m, 3] in [0, 1) to points [m, 3] spread over it.
    """

    area: float
    place: Callable[[Array], Array]

    def at(self, x: float = 0.0, y: float = 0.0, z: float = 0.0) -> Surface:
        """The same surface, moved."""
        shift = np.array((x, y, z))
        return Surface(self.area, lambda u: self.place(u) + shift)

    def turned(self, axes: tuple[int, int, int]) -> Surface:
        """The same surface with its axes exchanged."""
        return Surface(self.area, lambda u: self.place(u)[:, list(axes)])


def sample(surfaces: Sequence[Surface], count: int, rng: np.random.Generator) -> Array:
    """Points [count, 3] spread over surfaces by area."""
    areas = np.array([surface.area for surface in surfaces])
    counts = rng.multinomial(count, areas / areas.sum())
    return np.concatenate(
        [s.place(rng.random((n, 3))) for s, n in zip(surfaces, counts.tolist(), strict=True)]
    )


def box(x: float, y: float, z: float) -> Surface:
    """A box of these side lengths around the origin."""
    sides = np.array((x, y, z))
    faces = np.array((y * z, x * z, x * y))

    def place(u: Array) -> Array:
        # The first number chooses the face, and what is left of it the side of that face.
        edges = np.cumsum(faces) / faces.sum()
        axis = np.minimum(np.searchsorted(edges, u[:, 0], side="right"), 2)
        start = np.concatenate(([0.0], edges[:-1]))[axis]
        within = (u[:, 0] - start) / (faces / faces.sum())[axis]
        points = np.empty_like(u)
        rows = np.arange(len(u))
        points[rows, (axis + 1) % 3] = u[:, 1] - 0.5
        points[rows, (axis + 2) % 3] = u[:, 2] - 0.5
        points[rows, axis] = np.where(within < 0.5, -0.5, 0.5)
        placed: Array = points * sides
        return placed

    return Surface(2.0 * float(faces.sum()), place)


def frustum(bottom: float, top: float, height: float, *, lid: bool = True) -> Surface:
    """A cylinder or cone around z with these radii, centred; open at the top without a lid."""
    slant = float(np.hypot(height, bottom - top))
    side = np.pi * (bottom + top) * slant
    areas = np.array((side, np.pi * bottom**2, np.pi * top**2 if lid else 0.0))

    def place(u: Array) -> Array:
        edges = np.cumsum(areas) / areas.sum()
        part = np.minimum(np.searchsorted(edges, u[:, 0], side="right"), 2)
        # Radius along the side: its density grows with the radius itself.
        across = np.sqrt(bottom**2 + u[:, 1] * (top**2 - bottom**2))
        along = u[:, 1] if abs(top - bottom) < 1e-9 else (across - bottom) / (top - bottom)
        disc = np.sqrt(u[:, 1])
        radius = np.choose(part, (across, bottom * disc, top * disc))
        z = np.choose(part, (along, np.zeros(len(u)), np.ones(len(u)))) * height - height / 2
        angle = 2.0 * np.pi * u[:, 2]
        return np.stack((radius * np.cos(angle), radius * np.sin(angle), z), axis=1)

    return Surface(float(areas.sum()), place)


def ellipsoid(x: float, y: float, z: float) -> Surface:
    """An ellipsoid of these half axes; uniform on the sphere it is stretched from."""
    mean = ((x * y) ** 1.6 + (x * z) ** 1.6 + (y * z) ** 1.6) / 3.0

    def place(u: Array) -> Array:
        height = 2.0 * u[:, 0] - 1.0
        ring = np.sqrt(np.maximum(1.0 - height**2, 0.0))
        angle = 2.0 * np.pi * u[:, 1]
        unit = np.stack((ring * np.cos(angle), ring * np.sin(angle), height), axis=1)
        stretched: Array = unit * np.array((x, y, z))
        return stretched

    return Surface(float(4.0 * np.pi * mean ** (1.0 / 1.6)), place)


def tube(radius: float, thickness: float, turns: float, rise: float) -> Surface:
    """A tube around a circle or helix about z.

    Args:
        radius: Of the circle.
        thickness: Radius of the tube.
        turns: Length of the path in turns; 1 with no rise is a torus.
        rise: Height gained over the whole path.
    """

    def place(u: Array) -> Array:
        path, angle = 2.0 * np.pi * turns * u[:, 0], 2.0 * np.pi * u[:, 1]
        # The outside of a bend is longer than the inside: choose the side by a third number.
        inner = u[:, 2] > (radius + thickness * np.cos(angle)) / (radius + thickness)
        angle = np.where(inner, np.pi - angle, angle)
        distance = radius + thickness * np.cos(angle)
        z = thickness * np.sin(angle) + rise * (u[:, 0] - 0.5)
        return np.stack((distance * np.cos(path), distance * np.sin(path), z), axis=1)

    length = float(np.hypot(2.0 * np.pi * turns * radius, rise))
    return Surface(length * 2.0 * np.pi * thickness, place)
