r"""Images that a diffusion model makes, from nothing but its estimate of the noise.

In variance-preserving coordinates one step from time t to an earlier time t' is, for every kind of
model and schedule,

.. math::

    \hat x_0 = (x - s \hat e) / a, \qquad
    x' = a' \hat x_0 + \sqrt{s'^2 - \sigma^2}\, \hat e + \sigma z, \qquad
    \sigma = \eta \frac{s'}{s} \sqrt{1 - a^2 / a'^2},

with :math:`\eta = 0` for DDIM, which draws no noise on the way, and 1 for DDPM (Song et al.,
"Denoising Diffusion Implicit Models", ICLR 2021, equations 12 and 16). The last step returns
:math:`\hat x_0`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cmd_plugin.diffusion.laplace import batches
from cmd_plugin.diffusion.schedules import NoiseSchedule
from cmd_plugin.diffusion.score_model import ScoreModel
from cmd_plugin.errors import InputError, NonFiniteError, ShapeError

__all__ = ["draw_samples"]

_MOST_NOISE, _LEAST_NOISE, _KARRAS = 80.0, 0.002, 7.0


def draw_samples(
    model: ScoreModel,
    count: int,
    *,
    steps: int = 50,
    eta: float = 0.0,
    clamp: bool = False,
    seed: int = 0,
    condition: Tensor | None = None,
    batch_size: int = 256,
) -> Tensor:
    """Let a model make images.

    Noise is drawn on the CPU, for all images at once, so that neither the device nor the batch size
    decides what is drawn.

    Args:
        model: The model, in the mode that is wanted.
        count: Number of images N.
        steps: Steps from noise to image: calls of the network for each image.
        eta: Share of the noise that DDPM draws on the way, in [0, 1].
        clamp: Hold the clean image estimated on the way in [-1, 1], where models of pixels belong;
            latents have no such bound.
        seed: Of the noise.
        condition: [1 or N, ...] what images are conditioned on; by default the model's own.
        batch_size: Images per call of the network.

    Returns:
        [N, ...] float32 on the CPU, as the model sees images.

    Raises:
        InputError: If a number is out of range.
        ShapeError: If conditions do not fit.
        NonFiniteError: If the model leaves the finite numbers.
    """
    if count < 1 or steps < 2 or not 0.0 <= eta <= 1.0:
        raise InputError(
            f"count must be at least 1, steps at least 2 and eta in [0, 1], got {count}, {steps} "
            f"and {eta}."
        )
    if condition is not None and len(condition) not in (1, count):
        raise ShapeError(f"{len(condition)} conditions for {count} images: give one, or one each.")
    times = _times(model.schedule, steps)
    levels = [model.schedule.level(t) for t in times]
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, *model.shape, generator=generator)
    device = model.device
    if condition is not None:
        condition = condition.to(device).expand(count, *condition.shape[1:])
    with model.measuring():
        for t, (a, s), following in zip(times, levels, [*levels[1:], None], strict=True):
            later = torch.randn(images.shape, generator=generator) if eta and following else None
            made = []
            for rows in batches(count, batch_size, device):
                x = images[rows.cpu()].to(device)
                clock = torch.full((len(rows),), float(t), device=device, dtype=torch.float64)
                e = model.noise(x, clock, None if condition is None else condition[rows])
                clean = (x - s * e) / a
                if clamp:
                    clean = clean.clamp(-1.0, 1.0)
                    e = (x - a * clean) / s  # what leads from the clamped image to x
                if following is None:
                    made.append(clean.cpu())
                    continue
                a_next, s_next = following
                sigma = eta * s_next / s * math.sqrt(max(1.0 - (a / a_next) ** 2, 0.0))
                x = a_next * clean + math.sqrt(s_next**2 - sigma**2) * e
                if later is not None:
                    x += sigma * later[rows.cpu()].to(device)
                made.append(x.cpu())
            images = torch.cat(made)
    if not bool(images.isfinite().all()):
        raise NonFiniteError("the model made NaN or infinite values: run the network in float32.")
    return images


def _times(schedule: NoiseSchedule, steps: int) -> list[float]:
    """Falling times from almost only noise to almost none."""
    share = torch.linspace(0.0, 1.0, steps, dtype=torch.float64)
    if schedule.alphas_cumprod is not None:
        last = int((schedule.alphas_cumprod > 0).sum()) - 1  # at 0 there is no way to the image
        times = (last * (1.0 - share)).round()
    elif schedule.kind == "sigma":  # Karras et al., 2022, equation 5
        ends = [value ** (1.0 / _KARRAS) for value in (_MOST_NOISE, _LEAST_NOISE)]
        times = (ends[0] + share * (ends[1] - ends[0])) ** _KARRAS
    else:
        times = 0.999 - 0.998 * share
    found: list[float] = times.tolist()
    # A schedule of fewer steps is walked step by step.
    return [t for t, before in zip(found, [math.inf, *found], strict=False) if t < before]
