"""What importance scores cost: the timing part of :mod:`benchmarks.point_importance`.

Times are CPU times of the process, taken in turns, so that a busy machine counts as little as it
can. Others' methods are Captum's, with Captum's defaults unless the row says otherwise.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cmd_plugin.errors import require
from cmd_plugin.pointcloud import point_importance

__all__ = ["measure_others", "measure_overhead"]

_CHUNK = 8  # clouds in a forward pass, for all methods that ask the network more than once
_LIME_SAMPLES = (25, 1000)  # Captum's default, and about as many as there are points


def clock(*works: Callable[[], Any], repeats: int) -> list[list[float]]:
    """CPU seconds of each call of each function, in turns, so that drifts meet all alike."""
    for work in works:
        work()
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for work, times in zip(works, seconds, strict=True):
            started = time.process_time()
            work()
            times.append(time.process_time() - started)
    return seconds


def measure_overhead(
    networks: dict[str, nn.Module], cloud: Tensor, repeats: int
) -> list[dict[str, Any]]:
    """A forward pass, and the same with scores; ratios of neighbouring pairs."""
    rows = []
    for name, network in networks.items():
        for batch in (1, 8):
            clouds = cloud.expand(batch, -1, -1).contiguous()

            def forward(model: nn.Module = network, points: Tensor = clouds) -> None:
                with torch.no_grad():
                    model(points)

            def fbi(model: nn.Module = network, points: Tensor = clouds) -> None:
                point_importance(model, points)

            def counts(model: nn.Module = network, points: Tensor = clouds) -> None:
                point_importance(model, points, "critical++")

            plain, scored, counted = clock(forward, fbi, counts, repeats=repeats)
            rows.append(
                {
                    "network": name,
                    "batch": batch,
                    "forward_ms": 1e3 * statistics.median(plain),
                    "fbi_overhead_percent": 100.0 * (paired(scored, plain) - 1.0),
                    "count_overhead_percent": 100.0 * (paired(counted, plain) - 1.0),
                    # What others do to the machine only adds: the fastest calls of each.
                    "fbi_overhead_percent_of_minima": 100.0 * (min(scored) / min(plain) - 1.0),
                    "count_overhead_percent_of_minima": 100.0 * (min(counted) / min(plain) - 1.0),
                }
            )
    return rows


def paired(first: list[float], second: list[float]) -> float:
    """Median ratio of calls made one after the other."""
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def measure_others(network: nn.Module, cloud: Tensor, label: int, repeats: int) -> dict[str, Any]:
    """Seconds of Captum's methods on the same cloud and network, and how many FBIs they cost."""
    attr = require("captum.attr", "xai")
    occlusion, path, saliency, lime = (
        attr.Occlusion(network),
        attr.IntegratedGradients(network),
        attr.Saliency(network),
        attr.Lime(network),
    )
    # A feature of LIME is a point: all its coordinates are there, or at the origin.
    by_point = torch.arange(cloud.shape[1]).view(1, -1, 1).expand_as(cloud)
    works: dict[str, Callable[[], Any]] = {
        "occlusion, point by point": lambda: occlusion.attribute(
            cloud, sliding_window_shapes=(1, 3), target=label, perturbations_per_eval=_CHUNK
        ),
        "integrated gradients, 50 steps": lambda: path.attribute(
            cloud, target=label, n_steps=50, internal_batch_size=_CHUNK
        ),
        "saliency": lambda: saliency.attribute(cloud.clone().requires_grad_(), target=label),
    }
    for samples in _LIME_SAMPLES:
        works[f"LIME, {samples:,} samples"] = lambda n=samples: lime.attribute(  # type: ignore[misc]
            cloud,
            target=label,
            feature_mask=by_point,
            n_samples=n,
            perturbations_per_eval=_CHUNK,
        )

    def forward() -> None:
        with torch.no_grad():
            network(cloud)

    result = {}
    for name, work in works.items():
        slow, own, plain = clock(
            work, lambda: point_importance(network, cloud), forward, repeats=repeats
        )
        extra = max(statistics.median(a - b for a, b in zip(own, plain, strict=True)), 1e-9)
        result[name] = {
            "seconds": statistics.median(slow),
            "fbi_seconds": statistics.median(own),
            "times_slower_than_fbi": statistics.median(slow) / statistics.median(own),
            "times_slower_than_what_fbi_adds": statistics.median(slow) / extra,
        }
    return result
