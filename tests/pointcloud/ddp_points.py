"""Child process of test_parallel.py: one of two gloo ranks, each with clouds of its own."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from cmd_plugin.pointcloud import build_network, point_importance, refocus

if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    store = distributed.FileStore(str(folder / "store"), 2)
    distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    torch.manual_seed(0)
    network = build_network("pointnet", 4, width=0.25)
    wrapped = DistributedDataParallel(network)
    points = torch.randn(2 + rank, 30, 3, generator=torch.Generator().manual_seed(rank))
    # Different numbers of clouds: a collective inside would hang or fail.
    seen = point_importance(wrapped, points, "critical++")
    again = refocus(wrapped, points, keep=20) if rank == 0 else None
    wrapped(points).sum().backward()  # the wrapper still works
    gradient = next(network.parameters()).grad
    result = {"scores": seen.norm, "wins": seen.wins, "gradient": gradient}
    if again is not None:
        result["refocused"] = again.output
    torch.save(result, folder / f"{rank}.pt")
    distributed.destroy_process_group()
