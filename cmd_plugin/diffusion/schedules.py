r"""Noise levels: how much image and how much noise a noised image holds at a time t.

Everything in this room is said in *variance-preserving* coordinates,

.. math:: x_t = a\,x_0 + s\,e, \qquad a^2 + s^2 = 1, \quad e \sim N(0, I).

Networks trained in other coordinates, :math:`y = a'\,x_0 + s'\,e`, are put into these by dividing
by :math:`\sqrt{a'^2 + s'^2}`; the noise :math:`e` is the same in all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cmd_plugin.errors import InputError, ShapeError

__all__ = ["NoiseSchedule"]


@dataclass(frozen=True)
class NoiseSchedule:
    """What a time means.

    Attributes:
        kind: ``"steps"``: t is a training step, an index into ``alphas_cumprod``. ``"sigma"``: t is
            the standard deviation of noise added to an unscaled image (EDM, Karras). ``"flow"``: t
            in (0, 1) is the share of noise on the straight line from image to noise.
        alphas_cumprod: With ``"steps"``, [T] float64, :math:`a^2` of each step, falling in (0, 1).

    Raises:
        InputError: If the kind is unknown or the table is missing or impossible.
    """

    kind: Literal["steps", "sigma", "flow"] = "steps"
    alphas_cumprod: Tensor | None = None

    def __post_init__(self) -> None:
        """Check the table."""
        if self.kind not in ("steps", "sigma", "flow"):
            raise InputError(f"unknown schedule {self.kind!r}: choose steps, sigma or flow.")
        if (self.kind == "steps") != (self.alphas_cumprod is not None):
            raise InputError("alphas_cumprod belongs to a schedule of steps, and to no other.")
        if self.alphas_cumprod is None:
            return
        table = torch.as_tensor(self.alphas_cumprod).detach().cpu().double()
        if table.ndim != 1 or not len(table):
            raise ShapeError(f"alphas_cumprod must be [T], got {tuple(table.shape)}.")
        # A last step of exactly 0 (no image left) is allowed: it is refused when it is asked for.
        if not bool(((table >= 0) & (table < 1)).all()) or bool((table.diff() > 0).any()):
            raise InputError("alphas_cumprod must fall from below 1 to not below 0.")
        object.__setattr__(self, "alphas_cumprod", table)

    @classmethod
    def linear(cls, steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> NoiseSchedule:
        """Betas on a line, as in DDPM (Ho et al., 2020)."""
        return cls.from_betas(torch.linspace(start, end, steps, dtype=torch.float64))

    @classmethod
    def scaled_linear(
        cls, steps: int = 1000, start: float = 0.00085, end: float = 0.012
    ) -> NoiseSchedule:
        """Square roots of betas on a line, as in Stable Diffusion 1 and 2."""
        roots = torch.linspace(math.sqrt(start), math.sqrt(end), steps, dtype=torch.float64)
        return cls.from_betas(roots**2)

    @classmethod
    def from_betas(cls, betas: Tensor) -> NoiseSchedule:
        """Return the schedule of steps with these variances [T] of the noise each step adds."""
        return cls("steps", (1.0 - betas.double()).cumprod(0))

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the image's and the noise's factor in the network's own coordinates.

        Args:
            t: [N] times.

        Returns:
            ``(a', s')``, [N] float64 each, on the device of ``t``.
        """
        if self.alphas_cumprod is not None:
            kept = self.alphas_cumprod.to(t.device)[t.long()]
            return kept.sqrt(), (1.0 - kept).sqrt()
        wide = t.double()
        return (torch.ones_like(wide), wide) if self.kind == "sigma" else (1.0 - wide, wide)

    def level(self, t: float) -> tuple[float, float]:
        """Return :math:`(a, s)` of one time in variance-preserving coordinates.

        Raises:
            InputError: If the time is not one of this schedule, or leaves no image or no noise.
        """
        if self.alphas_cumprod is not None:
            known = len(self.alphas_cumprod)
            if t != int(t) or not 0 <= t < known:
                raise InputError(
                    f"time {t} is no training step: give a whole number 0 to {known - 1}."
                )
        elif not (math.isfinite(t) and t > 0) or (self.kind == "flow" and t >= 1):
            bounds = "in (0, 1)" if self.kind == "flow" else "above 0"
            raise InputError(f"time {t} must be {bounds} for a {self.kind} schedule.")
        signal, noise = (float(value) for value in self.levels(torch.tensor([t]).double()))
        size = math.hypot(signal, noise)
        if signal == 0.0 or noise == 0.0:
            raise InputError(f"time {t} leaves no image or no noise: choose another.")
        return signal / size, noise / size
