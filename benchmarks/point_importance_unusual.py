"""Who tells corrupted, mistaken and turned clouds: a part of :mod:`benchmarks.point_importance`.

Scores of whole clouds compare at equal numbers of points only. A corruption that adds points is
thinned out to the number of before; for one that takes some away, clean clouds of as few points
are drawn from the same shapes. References are clean clouds of other shapes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cmd_plugin.pointcloud import (
    CORRUPTIONS,
    FocusReference,
    corrupt,
    point_importance,
    roughness,
    separation,
    unusual_scores,
)
from cmd_plugin.pointcloud.axes import axis_doubt, axis_orders
from cmd_plugin.pointcloud.files import resampled, voxel_clouds
from cmd_plugin.pointcloud.score_metrics import ScoreAUROC

__all__ = ["measure_axes", "measure_roughness", "measure_unusual"]

_CHUNK = 8  # clouds in a forward pass
_LEVEL = 4  # the strongest


def measure_unusual(
    network: nn.Module,
    grids: Mapping[str, Tensor],
    labels: Mapping[str, int],
    points: int,
    seed: int,
) -> list[dict[str, Any]]:
    """AUROC of each score, clean against each corruption, and right against wrong answers.

    Args:
        network: A classifier.
        grids: Voxel grids of each class: every other one is for the reference.
        labels: Number of each class.
        points: Points of a clean cloud.
        seed: Of clouds and corruptions.
    """
    truth = torch.cat([torch.full((len(g[1::2]),), labels[n]) for n, g in grids.items()])
    at_size: dict[int, tuple[FocusReference, dict[str, Tensor], Tensor]] = {}

    def drawn(rows: slice, size: int) -> Tensor:
        return torch.cat([voxel_clouds(g[rows], size, seed) for g in grids.values()])

    def clean_of(size: int) -> tuple[FocusReference, dict[str, Tensor], Tensor]:
        if size not in at_size:
            reference = FocusReference(size)
            for part in drawn(slice(0, None, 2), size).split(_CHUNK):
                seen = point_importance(network, part, "critical++")
                assert seen.entropy is not None
                reference.update(seen.entropy)
            scores, answers = _scored(network, drawn(slice(1, None, 2), size), reference)
            at_size[size] = reference, scores, answers
        return at_size[size]

    _, scores, answers = clean_of(points)
    everything, wrong = [scores], [answers != truth]
    rows = []
    for kind in CORRUPTIONS:
        bad = corrupt(drawn(slice(1, None, 2), points), kind, _LEVEL, seed=seed)
        if bad.shape[1] > points:
            bad = torch.stack([resampled(c, points, seed + n) for n, c in enumerate(bad)])
        reference, clean, _ = clean_of(bad.shape[1])
        scores, answers = _scored(network, bad, reference)
        found = separation(clean, scores)
        rows.append({"seed": seed, "against clean": kind, "points": bad.shape[1], **found})
        if bad.shape[1] == points:
            everything.append(scores)
            wrong.append(answers != truth)
    target = torch.cat(wrong).long()
    row: dict[str, Any] = {"seed": seed, "against clean": "wrong answers", "points": points}
    for name in scores:
        metric = ScoreAUROC()
        metric.update(torch.cat([part[name] for part in everything]), target)
        row[name] = float(metric.compute())
    return [*rows, row]


def _scored(
    network: nn.Module, clouds: Tensor, reference: FocusReference
) -> tuple[dict[str, Tensor], Tensor]:
    """Scores and answers of all clouds."""
    parts, answers = [], []
    for part in clouds.split(_CHUNK):
        seen = point_importance(network, part, "critical++")
        parts.append(unusual_scores(seen, reference))
        answers.append(seen.output.argmax(dim=1))
    return {n: torch.cat([part[n] for part in parts]) for n in parts[0]}, torch.cat(answers)


def measure_roughness(clouds: Tensor, scores: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean roughness of each kind of scores [B, N] on the same clouds."""
    return {name: float(roughness(clouds, score).mean()) for name, score in scores.items()}


def measure_axes(network: nn.Module, clouds: Tensor) -> dict[str, float]:
    """Share of single clouds at which the axis check raises an alarm, by the order they come in."""
    shares = {}
    for axes in itertools.permutations(range(3)):
        turned = clouds[..., list(axes)]
        doubts = [axis_doubt(axis_orders(network, cloud)) is not None for cloud in turned.split(1)]
        shares["".join("xyz"[axis] for axis in axes)] = sum(doubts) / len(doubts)
    return shares
