r"""What the kernel estimates, by other means: pointwise p-Laplacians and local dimensions.

They differentiate the network (one vector-Jacobian product per scalar of the image, or random
probes), so they are slow; tests and oracles use them. Differentiating backwards works with every
network of diffusers as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cmd_plugin.diffusion.laplace import batches, check_images
from cmd_plugin.diffusion.score_model import ScoreModel
from cmd_plugin.errors import InputError

__all__ = ["PointwiseLaplace", "lid_flipd", "p_laplace_exact", "vector_jacobian"]

_EXACT_UP_TO = 1024
Trace = Literal["auto", "full", "hutchinson"]


@dataclass(frozen=True)
class PointwiseLaplace:
    r"""The p-Laplacian of the log density at the centres, and what it is made of; float64.

    Attributes:
        value: [B] :math:`\Delta_p \log p = |g|^{p-2} (\mathrm{tr} H + (p-2)\, \hat g' H \hat g)`.
        trace: [B] :math:`\mathrm{tr} H`, H the Jacobian of the score g.
        along: [B] :math:`\hat g' H \hat g`.
        score_norm: [B] :math:`|g|`.
        antisymmetry: [B] :math:`|H - H'| / |H + H'|`, which is 0 of a true score; None where the
            trace was estimated.
    """

    value: Tensor
    trace: Tensor
    along: Tensor
    score_norm: Tensor
    antisymmetry: Tensor | None


def vector_jacobian(
    model: ScoreModel, x: Tensor, t: Tensor, vector: Tensor, condition: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the noise estimate and ``vector' J`` with its Jacobian J, [N, ...] each.

    Args:
        model: The model.
        x: [N, ...] noised images.
        t: [N] times.
        vector: [N, ...].
        condition: [N, ...] what each is conditioned on.
    """
    with model.measuring(gradients=True), torch.enable_grad():
        x = x.detach().requires_grad_()
        e = model.noise(x, t, condition)
        (product,) = torch.autograd.grad((e * vector.to(e)).sum(), x)
    return e.detach(), product


def p_laplace_exact(
    model: ScoreModel,
    images: Tensor,
    t: float,
    p: float = 1.0,
    *,
    trace: Trace = "auto",
    probes: int = 64,
    seed: int = 0,
    condition: Tensor | None = None,
    batch_size: int = 256,
) -> PointwiseLaplace:
    """Return the p-Laplacian of the learned log density at the noised centre of each image.

    :func:`.laplace.p_laplace` in units ``"ball"`` approaches it with the square of the radius.

    Args:
        model: The model.
        images: [B, ...] clean images; float64 for oracles.
        t: One time.
        p: One power.
        trace: ``"full"``: exact; ``"hutchinson"``: by random signs; ``"auto"``: exact up to 1024
            scalars an image.
        probes: Random sign vectors an image.
        seed: Of the signs.
        condition: [1 or B, ...].
        batch_size: Images per call of the network.

    Raises:
        InputError: If the time or an option cannot be used.
        ShapeError: If images have the wrong shape.
        NonFiniteError: If images are not finite.
    """
    centre, clock, given, s = _centre(model, images, t, condition)
    unit_e, along = [], []
    for rows in batches(len(centre), batch_size, model.device):
        x, time, some = centre[rows], clock[rows], None if given is None else given[rows]
        with model.measuring():
            e = model.noise(x, time, some)
        g = -e / s
        direction = g.flatten(1) / g.flatten(1).norm(dim=1, keepdim=True).clamp_min(1e-30)
        _, product = vector_jacobian(model, x, time, direction.reshape(g.shape), some)
        unit_e.append(g.flatten(1).norm(dim=1).double())
        along.append(-(product.flatten(1).double() * direction.double()).sum(1) / s)
    diagonal, antisymmetry = _trace(model, centre, clock, given, trace, probes, seed, batch_size)
    norm, curved, total = torch.cat(unit_e).cpu(), torch.cat(along).cpu(), -diagonal / s
    value = norm ** (p - 2.0) * (total + (p - 2.0) * curved)
    return PointwiseLaplace(value, total, curved, norm, antisymmetry)


def lid_flipd(
    model: ScoreModel,
    images: Tensor,
    t: float,
    *,
    trace: Trace = "auto",
    probes: int = 8,
    seed: int = 0,
    condition: Tensor | None = None,
    batch_size: int = 256,
) -> Tensor:
    r"""Return FLIPD's local intrinsic dimension of the learned density at each image, [B] float64.

    .. math:: d - s\,\mathrm{tr}\,\partial \hat e(c) + |\hat e(c)|^2, \qquad c = a x_0

    Source: Kamkari et al., "A Geometric View of Data Complexity" (2024). Arguments and errors are
    those of :func:`p_laplace_exact`.
    """
    centre, clock, given, s = _centre(model, images, t, condition)
    diagonal, _ = _trace(model, centre, clock, given, trace, probes, seed, batch_size)
    squares = []
    with model.measuring():
        for rows in batches(len(centre), batch_size, model.device):
            e = model.noise(centre[rows], clock[rows], None if given is None else given[rows])
            squares.append(e.flatten(1).double().square().sum(1))
    return model.dimension - s * diagonal + torch.cat(squares).cpu()


def _centre(
    model: ScoreModel, images: Tensor, t: float, condition: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, float]:
    check_images(model, images, condition)
    a, s = model.schedule.level(t)
    clean = images.to(model.device, torch.promote_types(images.dtype, torch.float32))
    clock = torch.full((len(clean),), float(t), device=model.device, dtype=torch.float64)
    given = condition
    if condition is not None:
        given = condition.to(model.device).expand(len(clean), *condition.shape[1:])
    return a * clean, clock, given, s


def _trace(
    model: ScoreModel,
    centre: Tensor,
    clock: Tensor,
    given: Tensor | None,
    trace: Trace,
    probes: int,
    seed: int,
    batch_size: int,
) -> tuple[Tensor, Tensor | None]:
    """Trace of the Jacobian of the noise estimate, [B], and its antisymmetry where it is known."""
    d = model.dimension
    if trace not in ("auto", "full", "hutchinson"):
        raise InputError(f"unknown trace {trace!r}: choose auto, full or hutchinson.")
    if probes < 1:
        raise InputError(f"probes must be at least 1, got {probes}.")
    full = trace == "full" or (trace == "auto" and d <= _EXACT_UP_TO)
    if full:
        vectors = torch.eye(d, dtype=torch.float64)
    else:
        signs = torch.randint(2, (probes, d), generator=torch.Generator().manual_seed(seed))
        vectors = signs.double() * 2.0 - 1.0
    vectors = vectors.to(centre).reshape(-1, *model.shape)
    count = len(vectors)
    traces, uneven = [], []
    # So many images at once that their products fill one batch; a Jacobian is kept no longer.
    for images in batches(len(centre), max(1, batch_size // count), model.device):
        products = []
        for rows in batches(len(images) * count, batch_size, model.device):
            image, vector = images[rows // count], vectors[rows % count]
            some = None if given is None else given[image]
            _, product = vector_jacobian(model, centre[image], clock[image], vector, some)
            if not full:  # one number of each is enough
                product = (product * vector).flatten(1).sum(1, keepdim=True)
            products.append(product.flatten(1).double())
        each = torch.cat(products).reshape(len(images), count, -1)
        if not full:
            traces.append(each.flatten(1).mean(1))
            continue
        traces.append(each.diagonal(dim1=1, dim2=2).sum(1))
        both = (each + each.mT).flatten(1).norm(dim=1).clamp_min(1e-300)
        uneven.append((each - each.mT).flatten(1).norm(dim=1) / both)
    return torch.cat(traces).cpu(), torch.cat(uneven).cpu() if full else None
