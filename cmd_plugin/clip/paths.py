"""Ways from one embedding to another, and on around the circle.

Sources: Betser, Levi, Gilboa, "Whitened CLIP" (ICML 2025), full-circle SLERP; Levi and Gilboa, "The
Double-Ellipsoid Geometry of CLIP" (ICML 2025), vertical SLERP.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cmd_plugin.errors import InputError, NonFiniteError, ShapeError

__all__ = ["slerp", "slerp_circle", "vslerp"]

_PARALLEL = 1e-6  # sine of an angle below which a circle is a line


def slerp(source: Tensor, target: Tensor, t: Tensor | float) -> Tensor:
    """Spherical interpolation; lengths are interpolated along, nothing is renormalised.

    Args:
        source: Shape [d], reached at t = 0.
        target: Shape [d], reached at t = 1.
        t: A number, or shape [T]; values outside [0, 1] go on around the circle.

    Returns:
        Shape [d], or [T, d]; float64.

    Raises:
        ShapeError: If shapes do not fit.
        InputError: If one is zero, or they point in opposite directions, where no way is the
            shortest.
        NonFiniteError: If a value is NaN or infinite.
    """
    start, end = _ends(source, target)
    times = torch.as_tensor(t, dtype=torch.float64, device=start.device)
    angle = _angle(start, end)
    return _combine(start, end, angle, times)


def slerp_circle(
    source: Tensor,
    target: Tensor,
    degrees: Tensor,
    mean: Tensor | None = None,
    whiten: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Walk a full circle through two embeddings about the mean, at angles as they are whitened.

    The result is mean + c1 (source - mean) + c2 (target - mean), with c1 and c2 from the angle
    between the whitened ends alone. So no whitening is undone, and a singular one will do. At 0
    degrees lies the source, at the ends' angle the target, and at 180 degrees 2 mean - source,
    whatever the target.

    Args:
        source: Raw embedding, shape [d].
        target: Raw embedding, shape [d].
        degrees: Angles from the source, shape [T]; the paper takes 0 to 360 in steps of 5.
        mean: Of the embeddings, shape [d]; zero if not given.
        whiten: Maps raw embeddings [2, d] to whitened ones [2, m], mean taken off, such as
            ``Whitening.transform``. Not given, angles are those of the centred embeddings.

    Returns:
        Raw embeddings, shape [T, d], float64.

    Raises:
        ShapeError: If shapes do not fit.
        InputError: If the ends are parallel or opposite as seen from the mean.
        NonFiniteError: If a value is NaN or infinite.
    """
    start, end = _ends(source, target)
    centre = torch.zeros_like(start) if mean is None else mean.detach().to(start)
    if centre.shape != start.shape:
        raise ShapeError(f"mean must be {tuple(start.shape)}, got {tuple(centre.shape)}.")
    both = torch.stack((start, end))
    seen = both - centre if whiten is None else whiten(both).double()
    angle = _angle(seen[0], seen[1])
    if math.sin(angle) < _PARALLEL:
        raise InputError("source and target are parallel: they span no circle.")
    times = degrees.to(start).deg2rad() / angle
    return centre + _combine(start - centre, end - centre, angle, times)


def vslerp(
    source: Tensor,
    target: Tensor,
    t: Tensor | float,
    alpha: float,
    mean: Tensor,
    *,
    legacy: bool = False,
) -> Tensor:
    """Vertical SLERP: both ends moved by -alpha * mean, interpolated, moved back.

    Args:
        source: Raw embedding, shape [d].
        target: Raw embedding, shape [d].
        t: Blend, a number or shape [T].
        alpha: Strength of the edit; the paper goes from -1 to 3. 0 is plain SLERP.
        mean: Of the image embeddings, shape [d].
        legacy: Repeat the released code, which forgets the sum of the dot product, so that every
            feature has an angle of its own, in half precision. Only to reproduce its figures.

    Returns:
        Shape [d], or [T, d]; float64.

    Raises:
        ShapeError: If shapes do not fit.
        InputError: If a moved end is zero, or they are opposite.
        NonFiniteError: If a value is NaN or infinite.
    """
    start, end = _ends(source, target)
    if mean.shape != start.shape:
        raise ShapeError(f"mean must be {tuple(start.shape)}, got {tuple(mean.shape)}.")
    offset = alpha * mean.detach().to(start)
    if not legacy:
        return slerp(start - offset, end - offset, t) + offset
    times = torch.as_tensor(t, dtype=torch.float64, device=start.device)[..., None].half()
    moved = [(end_ - offset).half() for end_ in (start, end)]
    angles = (moved[0] / moved[0].norm() * (moved[1] / moved[1].norm())).acos()
    parts = (((1.0 - times) * angles).sin() * moved[0] + (times * angles).sin() * moved[1]) / (
        angles.sin()
    )
    result: Tensor = parts.double() + offset
    return result


def _ends(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if source.ndim != 1 or source.shape != target.shape:
        raise ShapeError(
            f"source and target must be two embeddings [d], got {tuple(source.shape)} and "
            f"{tuple(target.shape)}."
        )
    start, end = source.detach().double(), target.detach().double().to(source.device)
    if not bool(start.isfinite().all() and end.isfinite().all()):
        raise NonFiniteError("source or target holds NaN or infinite values: give other ends.")
    return start, end


def _angle(start: Tensor, end: Tensor) -> float:
    """Angle in radians, exact for small and large ones alike, where an arc cosine is not."""
    lengths = start.norm(), end.norm()
    if lengths[0] == 0 or lengths[1] == 0:
        raise InputError("an end of the way is zero: it has no direction.")
    a, b = start / lengths[0], end / lengths[1]
    angle = 2.0 * math.atan2(float((a - b).norm()), float((a + b).norm()))
    if angle > math.pi / 2 and math.sin(angle) < _PARALLEL:
        raise InputError("source and target point in opposite directions: no way is the shortest.")
    return angle


def _combine(start: Tensor, end: Tensor, angle: float, times: Tensor) -> Tensor:
    t = times[..., None]
    sine = math.sin(angle)
    if sine < _PARALLEL:
        return (1.0 - t) * start + t * end
    return (((1.0 - t) * angle).sin() * start + (t * angle).sin() * end) / sine
