"""Attacks on point networks, and the defence that leaves the most important points out.

A defence that crops its input looks strong against attacks that do not know of it. So the same
gradient attack runs through the crop as well (:func:`gradient_attack` on a :class:`SubsetDefence`),
ranking the points anew at every step. Claim no more than survives that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from cmd_plugin.errors import InputError
from cmd_plugin.networks.measuring import undisturbed
from cmd_plugin.pointcloud._interception import Forward, as_it_is, call_network, class_scores
from cmd_plugin.pointcloud.importance import point_importance
from cmd_plugin.pointcloud.refocusing import importance_order

__all__ = [
    "Attack",
    "SubsetDefence",
    "estimate_normals",
    "gradient_attack",
    "perturbation_size",
    "query_attack",
    "strongest_attack",
]


class SubsetDefence(nn.Module):
    """A network that first drops the points that win most channels of its pool.

    Keeps a fixed number of points, as the published evaluation does. Gradients flow through the
    points that were kept, so an attack on this module knows the defence.

    Args:
        model: Any network with a global maximum.
        keep: Points kept; smaller clouds pass whole.
        forward: How to call the network; of several outputs the first counts.
        pool: Which pool, if several feed the head.
    """

    def __init__(
        self,
        model: nn.Module,
        keep: int = 600,
        forward: Forward = as_it_is,
        pool: int | None = None,
    ) -> None:
        super().__init__()
        if keep < 1:
            raise InputError(f"keep must be at least 1, got {keep}.")
        self.model, self.keep, self.call, self.pool = model, keep, forward, pool

    @override
    def forward(self, points: Tensor) -> Tensor:
        """Class scores [B, classes] of clouds [B, N, C]."""
        seen = point_importance(
            self.model, points.detach(), "critical++", forward=self.call, pool=self.pool
        )
        chosen = importance_order(seen)[:, : self.keep].sort(dim=1).values
        kept = points.gather(1, chosen.unsqueeze(2).expand(-1, -1, points.shape[2]))
        return class_scores(call_network(self.call, self.model, kept), len(kept))


@dataclass(frozen=True)
class Attack:
    """What an attack achieved.

    Attributes:
        points: [B, N, 3] the attacked clouds.
        success: [B] bool, the answer is wrong now; includes ``wrong_before``.
        wrong_before: [B] bool, it was wrong without any attack.
        queries: [B] int64, forward passes of the target.
    """

    points: Tensor
    success: Tensor
    wrong_before: Tensor
    queries: Tensor

    @property
    def rate(self) -> float:
        """Share of clouds answered wrongly after the attack, as published."""
        return float(self.success.double().mean())

    @property
    def rate_of_right(self) -> float:
        """The same among the clouds that were answered rightly before; NaN if there are none."""
        right = ~self.wrong_before
        return float(self.success[right].double().mean()) if bool(right.any()) else math.nan


def estimate_normals(points: Tensor, k: int = 16) -> Tensor:
    """Unit normals [B, N, 3], without orientation: least variance of the k nearest points."""
    places = points[..., :3].double()
    distance = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")
    index = distance.topk(min(k, points.shape[1]), dim=2, largest=False).indices
    batch = torch.arange(len(points), device=points.device).view(-1, 1, 1)
    near = places[batch, index]
    centred = near - near.mean(dim=2, keepdim=True)
    normal: Tensor = torch.linalg.eigh(centred.transpose(2, 3) @ centred).eigenvectors[..., 0]
    return normal.to(points.dtype)


def _margin(scores: Tensor, labels: Tensor) -> Tensor:
    """Carlini and Wagner's margin [B]: the right class's score minus the best other one."""
    right = scores.gather(1, labels.unsqueeze(1)).squeeze(1)
    others = scores.scatter(1, labels.unsqueeze(1), -torch.inf)
    return right - others.amax(dim=1)


def _tangential(gradient: Tensor, normals: Tensor) -> Tensor:
    """The part of each point's gradient that lies in the surface."""
    return gradient - (gradient * normals).sum(dim=2, keepdim=True) * normals


def _gradient(network: Callable[[Tensor], Tensor], points: Tensor, labels: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = points.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(_margin(network(leaf), labels).sum(), leaf)
    return gradient


def _answers(network: nn.Module, forward: Forward) -> Callable[[Tensor], Tensor]:
    return lambda points: class_scores(call_network(forward, network, points), len(points))


def gradient_attack(
    network: nn.Module,
    points: Tensor,
    labels: Tensor,
    *,
    steps: int = 50,
    size: float = 0.02,
    limit: float = 0.16,
    samples: int = 1,
    noise: float = 0.0,
    seed: int = 0,
    tangential: bool = True,
    normalise: Literal["cloud", "point"] = "cloud",
    forward: Forward = as_it_is,
) -> Attack:
    """White-box attack: descend the margin, by steps of unit length in the surface.

    Steps of unit length for the whole cloud go far at few points and win where ``limit`` is large;
    steps of unit length for every point (``normalise="point"``, ``tangential=False``: projected
    gradient descent) win where it is small. Measure a defence with both, see
    :func:`strongest_attack`, and on a hundred clouds at least.

    Attacking the plain network and testing a defence on the result measures transfer; attacking the
    :class:`SubsetDefence` itself is the adaptive attack. With ``samples`` above 1 each step follows
    the mean gradient over jittered clouds, which smooths the crop's jumps.

    Args:
        network: Maps [B, N, 3] to scores; used in evaluation mode.
        points: [B, N, 3].
        labels: [B] int64, the right answers.
        steps: Number of steps.
        size: Root mean square movement of a point in one step; with ``normalise="point"`` the
            movement of each.
        limit: Largest distance a point may move from where it was.
        samples: Gradients averaged in a step.
        noise: Standard deviation of the jitter between them.
        seed: Of the jitter.
        tangential: Whether points move in the surface only.
        normalise: Whether the gradient is divided by its length over the cloud or at each point.
        forward: How to call the network; of several outputs the first counts.

    Returns:
        For each cloud the first attacked version that is answered wrongly, else the last one.

    Raises:
        InputError: If ``normalise`` is unknown.
        ShapeError: If the network does not answer with one row of class scores for each cloud.
    """
    if normalise not in ("cloud", "point"):
        raise InputError(f"unknown normalise {normalise!r}: choose cloud or point.")
    scores = _answers(network, forward)
    generator = torch.Generator().manual_seed(seed)
    normals = estimate_normals(points) if tangential else None
    with undisturbed(network, gradients=True):
        with torch.no_grad():
            wrong = scores(points).argmax(dim=1) != labels
        before, best, moved = wrong.clone(), points.clone(), points.clone()
        queries = torch.ones(len(points), dtype=torch.int64)
        for _ in range(steps):
            gradient = torch.zeros_like(points)
            for _ in range(samples):
                jitter = torch.randn(points.shape, generator=generator).to(points) * noise
                gradient += _gradient(scores, moved + jitter, labels)
            if normals is not None:
                gradient = _tangential(gradient, normals)
            length = gradient.square().sum(dim=2, keepdim=True)
            if normalise == "cloud":
                length = length.mean(dim=1, keepdim=True)
            offset = moved - size * gradient / length.sqrt().clamp_min(1e-12) - points
            distance = offset.norm(dim=2, keepdim=True).clamp_min(1e-12)
            moved = points + offset * (limit / distance).clamp_max(1.0)
            with torch.no_grad():
                fooled = scores(moved).argmax(dim=1) != labels
            queries += (~wrong.cpu()).long() * (samples + 1)
            best = torch.where(wrong.view(-1, 1, 1), best, moved)
            wrong = wrong | fooled
            if bool(wrong.all()):
                break
    return Attack(best, wrong, before, queries)


@torch.no_grad()
def query_attack(
    target: nn.Module,
    surrogate: nn.Module,
    points: Tensor,
    labels: Tensor,
    *,
    step: float = 0.32,
    limit: float | None = None,
    queries: int | None = None,
    forward: Forward = as_it_is,
) -> Attack:
    """Shape-invariant query attack: only the target's scores are seen.

    A surrogate's gradient in the surface ranks the points. One after the other is moved along its
    direction, then against it; what lowers the target's margin stays.

    Args:
        target: What is attacked, as a black box.
        surrogate: Gives the gradient.
        points: [B, N, 3].
        labels: [B] int64, the right answers.
        step: Length of a step; .32 is that of the published protocol, where each point moves once.
        limit: Largest distance a point may move, to which steps are cut; by default they are not.
            Cut to .16 the attack is much weaker than the published one.
        queries: Most forward passes of a cloud; by default until its points run out.
        forward: How to call both networks; of several outputs the first counts.

    Source: Huang et al., CVPR 2022 (SI-Adv), in the protocol of the Critical Points++ code.
    """
    length = step if limit is None else min(step, limit)
    scores, gradients = _answers(target, forward), _answers(surrogate, forward)
    with undisturbed(target, surrogate):
        rows = [
            _query_one(scores, gradients, points[[n]], labels[[n]], length, queries)
            for n in range(len(points))
        ]
    moved, success, before, count = zip(*rows, strict=True)
    return Attack(
        torch.cat(moved), torch.tensor(success), torch.tensor(before), torch.tensor(count)
    )


def _query_one(
    target: Callable[[Tensor], Tensor],
    surrogate: Callable[[Tensor], Tensor],
    cloud: Tensor,
    label: Tensor,
    step: float,
    queries: int | None,
) -> tuple[Tensor, bool, bool, int]:
    margin, used = float(_margin(target(cloud), label)), 1
    if margin < 0.0:
        return cloud, True, True, used
    gradient = _tangential(_gradient(surrogate, cloud, label), estimate_normals(cloud))
    strength = gradient[0].norm(dim=1)
    moved = cloud.clone()
    for point in strength.argsort(descending=True, stable=True).tolist():
        if float(strength[point]) == 0.0:
            break  # the surrogate does not look at this point, nor at those after it
        direction = gradient[0, point] / strength[point]
        for sign in (-1.0, 1.0):
            if queries is not None and used >= queries:
                return moved, False, False, used
            trial = moved.clone()
            trial[0, point] = cloud[0, point] + sign * step * direction
            now, used = float(_margin(target(trial), label)), used + 1
            if now < margin:
                moved, margin = trial, now
                break
        if margin < 0.0:
            return moved, True, False, used
    return moved, False, False, used


def strongest_attack(*attacks: Attack) -> Attack:
    """Several attacks on the same clouds as one: a cloud is fooled if one of them fools it.

    Args:
        attacks: At least one, all of the same clouds in the same order.

    Returns:
        Of each cloud the points of the first attack that succeeded, else of the first; queries add.

    Raises:
        InputError: If there is none, or they are of different clouds.
    """
    if not attacks or any(a.points.shape != attacks[0].points.shape for a in attacks):
        raise InputError("strongest_attack takes attacks on the same clouds, at least one.")
    success = torch.stack([attack.success for attack in attacks])
    first = success.to(torch.uint8).argmax(dim=0)
    cloud = torch.arange(len(first), device=first.device)
    return Attack(
        torch.stack([attack.points for attack in attacks])[first, cloud],
        success.any(dim=0),
        attacks[0].wrong_before,
        torch.stack([attack.queries for attack in attacks]).sum(dim=0),
    )


def perturbation_size(clean: Tensor, attacked: Tensor) -> dict[str, float]:
    """How far clouds were changed, means over clouds, in the unit of the points.

    Args:
        clean: [B, N, 3].
        attacked: [B, N, 3], in the same order.

    Returns:
        ``l2`` (square root of 3 N times the mean squared change of a coordinate), ``chamfer``
        (mean squared distance to the nearest, both ways), and ``hausdorff`` (largest distance from
        an attacked point to the nearest clean one).
    """
    l2 = (clean - attacked).square().sum(dim=(1, 2)).sqrt()
    distance = torch.cdist(attacked, clean, compute_mode="donot_use_mm_for_euclid_dist")
    there, back = distance.amin(dim=2), distance.amin(dim=1)
    chamfer = there.square().mean(dim=1) + back.square().mean(dim=1)
    return {
        "l2": float(l2.mean()),
        "chamfer": float(chamfer.mean()),
        "hausdorff": float(there.amax(dim=1).mean()),
    }
