r"""The one kernel of this room: sphere directions pushed through a model's noise estimate.

Round a clean image :math:`x_0` at noise level :math:`(a, s)` it looks at :math:`x_j = a x_0 + \rho
s u_j`, with :math:`|u_j| = \sqrt d`, and takes a few inner products of :math:`\hat e_j = \hat
e(x_j, t)`. By the divergence theorem their mean is the p-Laplacian of the learned log density over
the ball,

.. math:: \Delta_p f = \nabla \cdot (|\nabla f|^{p-2} \nabla f), \qquad
          k_p = \frac1n \sum_j \Big(\frac{|\hat e_j|}{\sqrt d}\Big)^{p-1}
                \frac{\langle \hat e_j, u_j \rangle}{|\hat e_j| |u_j|},

reported with the *inward* flux positive: :math:`k_1 = 1` where every score in sight points at the
image. It tells how centred on a mode the image is, not how sharp the mode is.

Source: "Identifying Memorization of Diffusion Models through p-Laplace Analysis" (SSVM 2025).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cmd_plugin.diffusion.directions import sphere_directions
from cmd_plugin.diffusion.score_model import ScoreModel
from cmd_plugin.errors import InputError, NonFiniteError, ShapeError

__all__ = ["UNITS", "Flux", "check_images", "p_laplace"]

UNITS = ("cosine", "density", "ball", "total")

_NOTHING = 1e-18
"""Length, as a share of that of noise, below which an estimate has no direction."""


@dataclass(frozen=True)
class Flux:
    """What :func:`p_laplace` saw of B images at T times along n directions; float64 on the CPU.

    Attributes:
        times: The T times.
        powers: The P powers p.
        value: [B, T, P] the flux, inward positive, in the units asked for.
        standard_error: [B, T, P] of the mean over directions; NaN where one pair is all there was.
        cosine: [B, T, n] cosine of estimate and direction.
        size: [B, T, n] length of the estimate as a share of the length of noise.
        squared_error: [B, T, n] mean squared difference of estimate and noise put in.
        bias: [B, T, n] inner product of the estimate's direction with the clean image.
    """

    times: tuple[float, ...]
    powers: tuple[float, ...]
    value: Tensor
    standard_error: Tensor
    cosine: Tensor
    size: Tensor
    squared_error: Tensor
    bias: Tensor


def check_images(model: ScoreModel, images: Tensor, condition: Tensor | None = None) -> None:
    """Raise unless images can be looked at by a model.

    Raises:
        ShapeError: If they are not [B, ...] in floating point, or conditions do not fit.
        NonFiniteError: If they hold NaN or infinite values.
    """
    if tuple(images.shape[1:]) != model.shape or not images.is_floating_point() or not len(images):
        raise ShapeError(
            f"images must be [B, {', '.join(map(str, model.shape))}] in floating point, B at least "
            f"1, got {tuple(images.shape)} {images.dtype}: resize, convert or encode them first."
        )
    bad = [n for n, finite in enumerate(images.isfinite().flatten(1).all(1).tolist()) if not finite]
    if bad:
        raise NonFiniteError(f"images hold NaN or infinite values, first number {bad[0]}.")
    if condition is not None and len(condition) not in (1, len(images)):
        raise ShapeError(
            f"{len(condition)} conditions for {len(images)} images: give one, or one each."
        )


def p_laplace(
    model: ScoreModel,
    images: Tensor,
    t: float | Sequence[float],
    p: float | Sequence[float] = (1.0, 2.0),
    *,
    directions: int | Tensor = 16,
    kind: str = "antithetic",
    seed: int = 0,
    rho: float = 1.0,
    units: str = "cosine",
    condition: Tensor | None = None,
    batch_size: int = 256,
) -> Flux:
    r"""Return the flux of the learned score through a sphere round each image.

    All images and times share their directions: what differs between images is then the images.

    Args:
        model: The model.
        images: [B, ...] clean images as the model sees them, any floating dtype.
        t: Times, see :class:`.schedules.NoiseSchedule`.
        p: Powers; 1 is the headline, 2 the Laplacian.
        directions: How many, or the directions themselves, [n, ...] of length :math:`\sqrt d`.
        kind: How they are drawn, see :func:`.directions.sphere_directions`.
        seed: Of the directions.
        rho: Radius in units of :math:`s \sqrt d`, the distance noise has.
        units: ``"cosine"``: :math:`k_p`, without units. ``"density"``: inward flux of
            :math:`|\nabla f|^{p-2} \nabla f` per area. ``"ball"``: mean of :math:`\Delta_p f` over
            the ball, which has the opposite sign. ``"total"``: inward flux through the whole
            sphere; it leaves the floating point numbers in high dimension.
        condition: [1 or B, ...] what images are conditioned on.
        batch_size: Images per call of the network: this alone bounds the memory.

    Raises:
        InputError: If a time, a power, the directions or an option cannot be used.
        ShapeError: If images or directions have the wrong shape.
        NonFiniteError: If images, or what the network says of them, are not finite.
    """
    check_images(model, images, condition)
    times, powers = _numbers(t), _numbers(p)
    levels = [model.schedule.level(time) for time in times]
    if not times or not powers or not all(math.isfinite(power) for power in powers):
        raise InputError(f"give at least one time and one finite power, got {times} and {powers}.")
    if not (math.isfinite(rho) and rho > 0.0):
        raise InputError(f"rho must be above 0, got {rho}.")
    if units not in UNITS:
        raise InputError(f"unknown units {units!r}: choose one of {', '.join(UNITS)}.")
    paired = kind != "independent"
    if isinstance(directions, Tensor):
        if tuple(directions.shape[1:]) != model.shape or not len(directions):
            raise ShapeError(
                f"directions must be [n, *{model.shape}], got {tuple(directions.shape)}."
            )
        paired = paired and len(directions) % 2 == 0
        paired = paired and torch.equal(directions[::2], -directions[1::2])
    else:
        directions = sphere_directions(model.shape, directions, kind, seed)
    terms = _terms(model, images, times, levels, directions, rho, condition, batch_size)
    cosine, size = terms[0], terms[1]
    value, error = [], []
    for power in powers:
        scale = torch.tensor([_scale(model.dimension, s, rho, power, units) for _, s in levels])
        # 0 to a negative power would be infinite where an estimate of nothing has no flux.
        each = torch.where(cosine == 0, 0.0, size ** (power - 1.0) * cosine)
        mean, spread = _mean_and_error(each, paired)
        value.append(scale.double() * mean)
        error.append(scale.double().abs() * spread)
    return Flux(times, powers, torch.stack(value, -1), torch.stack(error, -1), *terms)


def _numbers(given: float | Sequence[float]) -> tuple[float, ...]:
    return tuple(given) if isinstance(given, Sequence) else (given,)


def _terms(
    model: ScoreModel,
    images: Tensor,
    times: tuple[float, ...],
    levels: list[tuple[float, float]],
    directions: Tensor,
    rho: float,
    condition: Tensor | None,
    batch_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return cosine, size, squared error and bias, [B, T, n] each."""
    device, d = model.device, model.dimension
    wide = torch.promote_types(images.dtype, torch.float32)
    clean = images.to(device, wide)
    moves = directions.to(device, wide)
    signal, noise = (
        torch.tensor(part, device=device, dtype=wide) for part in zip(*levels, strict=True)
    )
    clock = torch.tensor(times, device=device, dtype=torch.float64)
    length = moves.flatten(1).norm(dim=1)
    shape = (len(clean), len(times), len(moves))
    ones = [1] * len(model.shape)
    parts: list[Tensor] = []
    with model.measuring():
        for rows in batches(math.prod(shape), batch_size, device):
            one, time, move = _unravel(rows, shape)
            x0, u = clean[one], moves[move]
            x = signal[time].reshape(-1, *ones) * x0
            x += (rho * noise[time]).reshape(-1, *ones) * u
            given = (
                None
                if condition is None
                else condition.to(device).expand(len(clean), *condition.shape[1:])[one]
            )
            e = model.noise(x, clock[time], given).flatten(1)
            x0, u = x0.flatten(1), u.flatten(1)
            norm = torch.linalg.vector_norm(e, dim=1)
            dot = torch.einsum("nd,nd->n", e, u.to(e.dtype))
            along = torch.einsum("nd,nd->n", e, x0.to(e.dtype))
            wrong = (e - rho * u).square().mean(1)
            there = norm > _NOTHING * math.sqrt(d)
            safe = norm.clamp_min(_NOTHING)
            parts.append(
                torch.stack(
                    [
                        torch.where(there, dot / (safe * length[move]), 0.0),
                        norm / math.sqrt(d),
                        wrong,
                        torch.where(there, along / safe, 0.0),
                    ]
                ).double()
            )
    terms = torch.cat(parts, dim=1).cpu().reshape(4, *shape)
    lost = (~terms.isfinite()).flatten(2).any(2).any(0)
    if bool(lost.any()):
        first = int(lost.nonzero()[0])
        raise NonFiniteError(
            f"the model returned NaN or infinite values for {int(lost.sum())} of {len(lost)} "
            f"images, first number {first}: leave them out, or run the network in float32."
        )
    return terms[0], terms[1], terms[2], terms[3]


def batches(count: int, batch_size: int, device: torch.device) -> Iterator[Tensor]:
    """Yield the numbers below ``count`` in turn, at most ``batch_size`` at once.

    Raises:
        InputError: If ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}.")
    for start in range(0, count, batch_size):
        yield torch.arange(start, min(start + batch_size, count), device=device)


def _unravel(rows: Tensor, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    _, times, moves = shape
    return rows // (times * moves), rows // moves % times, rows % moves


def _mean_and_error(each: Tensor, paired: bool) -> tuple[Tensor, Tensor]:
    """Mean over directions and its standard error; of a pair the mean is one observation."""
    units = each.reshape(*each.shape[:2], -1, 2).mean(3) if paired else each
    count = units.shape[2]
    # One observation says nothing about the error.
    error = (
        units.std(2) / math.sqrt(count) if count > 1 else torch.full_like(units[..., 0], math.nan)
    )
    return units.mean(2), error


def _scale(d: int, s: float, rho: float, p: float, units: str) -> float:
    """What k_p is multiplied by for other units."""
    if units == "cosine":
        return 1.0
    density: float = (math.sqrt(d) / s) ** (p - 1.0)
    radius = rho * s * math.sqrt(d)
    if units == "density":
        return density
    if units == "ball":
        return -density * d / radius
    log_area = math.log(2.0) + 0.5 * d * math.log(math.pi) - math.lgamma(0.5 * d)
    log_total = log_area + (d - 1) * math.log(radius)
    return density * (math.exp(log_total) if log_total < 700.0 else math.inf)
