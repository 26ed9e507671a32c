"""What do EPiC's partial clouds cost? Ours against the straightforward full-distance-matrix way.

    python -m benchmarks.point_sampling            # B = 8, N = 1024; about a minute
    python -m benchmarks.point_sampling --points 512

The straightforward version makes, for every anchor and kind, all distances between all points and
sorts every row; a curve keeps a B x N x N mask of neighbours and picks from its rows. (Written here
from that description.) The two are measured in turn in this run, on this machine, one thread.
Results: ``results/point_sampling.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.machine import RESULTS, describe_machine
from cmd_plugin.kernels import curve_walk, farthest_point_sampling, knn
from cmd_plugin.pointcloud.partials import anchor_points, partial_positions

ANCHORS, SIZE, NEIGHBOURS = 4, 512, 20


def all_distances(points: Tensor) -> Tensor:
    """Return [B, N, N] squared distances by the expanded square."""
    norms = points.square().sum(dim=2)
    return norms[:, :, None] - 2 * points @ points.mT + norms[:, None, :]


def full_matrix_patch(points: Tensor, anchor: Tensor) -> Tensor:
    """All distances, every row sorted, one row used; [B, size]."""
    order = all_distances(points).sort(dim=2).indices
    return order[torch.arange(len(points)), anchor, :SIZE]


def full_matrix_curve(points: Tensor, anchor: Tensor) -> Tensor:
    """All distances, every row sorted, a mask of neighbours, one point a step; [B, size]."""
    batch, size, _ = points.shape
    order = all_distances(points).sort(dim=2).indices
    mask = torch.zeros(batch, size, size, dtype=torch.int64)
    mask.scatter_(2, order[:, :, 1:NEIGHBOURS], 1)
    here, path = anchor, anchor[:, None]
    rows = torch.arange(batch)
    for _ in range(SIZE - 1):
        near = mask[rows, here].nonzero()[:, 1].view(batch, NEIGHBOURS - 1)
        here = near[:, torch.randint(NEIGHBOURS - 1, ())]  # one rank for the whole batch
        path = torch.cat([path, here[:, None]], dim=1)
    return path


def clock(works: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return median wall milliseconds of every work, taken in turn, after a round not counted."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for number in range(repeats + 1):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if number:
                taken[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in taken.items()}


def measure(batch: int, size: int, repeats: int) -> dict[str, Any]:
    """Time both ways and the parts of ours; check that patches agree."""
    points = torch.randn(batch, size, 3, generator=torch.Generator().manual_seed(0))
    anchors = anchor_points(points, ANCHORS)
    table = knn(points, NEIGHBOURS - 1, exclude_self=True).positions

    def ours(view: Any) -> Tensor:
        return partial_positions(points, view, anchor_points(points, ANCHORS), SIZE)

    def theirs(one: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return torch.stack([one(points, anchor) for anchor in anchors.T], dim=1)

    slow = clock(
        {
            "patch, full matrix": lambda: theirs(full_matrix_patch),
            "curve, full matrix": lambda: theirs(full_matrix_curve),
            "patch, ours": lambda: ours("patch"),
            "curve, ours": lambda: ours("curve"),
        },
        repeats,
    )
    parts = clock(
        {
            "neighbour table, scipy": lambda: knn(points, NEIGHBOURS - 1, exclude_self=True),
            "neighbour table, torch": lambda: knn(
                points, NEIGHBOURS - 1, exclude_self=True, backend="torch"
            ),
            "neighbour table, cdist and topk": lambda: torch.cdist(points, points).topk(
                NEIGHBOURS, largest=False
            ),
            "walks": lambda: curve_walk(table, anchors, SIZE),
            "4 anchors, torch": lambda: farthest_point_sampling(points, 4, backend="torch"),
            "N / 2 farthest points, torch": lambda: farthest_point_sampling(
                points, size // 2, backend="torch"
            ),
            "N / 2 farthest points, fpsample": lambda: farthest_point_sampling(
                points, size // 2, backend="fpsample"
            ),
        },
        repeats,
    )
    same = ours("patch").sort(dim=2).values == theirs(full_matrix_patch).sort(dim=2).values
    return {
        "batch": batch,
        "points": size,
        "anchors": ANCHORS,
        "milliseconds": {**slow, **parts},
        "patch_ratio": slow["patch, full matrix"] / slow["patch, ours"],
        "curve_ratio": slow["curve, full matrix"] / slow["curve, ours"],
        "patches_that_agree": float(same.all(dim=2).double().mean()),
    }


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--points", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(arguments.batch, arguments.points, arguments.repeats)
    table = Table(title=f"Partial clouds, B = {arguments.batch}, N = {arguments.points}, CPU")
    table.add_column("what")
    table.add_column("ms", justify="right")
    for name, value in result["milliseconds"].items():
        table.add_row(name, f"{value:.1f}")
    console = Console()
    console.print(table)
    console.print(
        f"Patches {result['patch_ratio']:.0f} times and curves {result['curve_ratio']:.0f} times "
        f"as fast; {result['patches_that_agree']:.1%} of the patches hold the same points."
    )
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "point_sampling.json"
    path.write_text(json.dumps({"machine": describe_machine(), **result}, indent=2) + "\n")
    console.print(f"wrote {path}", highlight=False)


if __name__ == "__main__":
    main()
