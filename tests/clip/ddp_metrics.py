"""Child process of test_metrics.py: one of two gloo ranks, with batches of its own."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, distributed

from cmd_plugin.clip import FeatureGaussian


def batch(seed: int) -> Tensor:
    return torch.randn(20, 5, generator=torch.Generator().manual_seed(seed)) + 3.0


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    store = distributed.FileStore(str(folder / "store"), 2)
    distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    metric = FeatureGaussian(5)
    for seed in (0, 1) if rank == 0 else (2,):
        metric.update(batch(seed))
    gaussian = metric.compute()
    squared = metric.whitening(shrinkage="none").squared_norm(batch(5))
    metric.update(batch(7))
    metric.sync_on_compute = False
    metric._to_sync = False
    result = {"rows": gaussian.rows, "mean": gaussian.mean, "covariance": gaussian.covariance}
    result |= {"squared": squared, "own": metric.compute().covariance}
    torch.save(result, folder / f"{rank}.pt")
    distributed.destroy_process_group()
