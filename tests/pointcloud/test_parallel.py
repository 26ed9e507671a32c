"""Scores under data parallelism stay where they are made; scoring needs no memory of its own."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cmd_plugin.pointcloud import build_network, point_importance, refocus
from tests.helpers.processes import run_ranks


@pytest.mark.ddp
@pytest.mark.slow
def test_two_processes_score_their_own_clouds(tmp_path: Path) -> None:
    run_ranks(Path(__file__).with_name("ddp_points.py"), tmp_path)
    torch.manual_seed(0)
    network = build_network("pointnet", 4, width=0.25)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for rank in range(2):
        points = torch.randn(2 + rank, 30, 3, generator=torch.Generator().manual_seed(rank))
        alone = point_importance(network, points, "critical++")
        torch.testing.assert_close(found[rank]["scores"], alone.norm)
        assert torch.equal(found[rank]["wins"], alone.wins)  # type: ignore[arg-type]
        if rank == 0:
            expected = refocus(network, points, keep=20).output
            torch.testing.assert_close(found[rank]["refocused"], expected)
    assert torch.equal(found[0]["gradient"], found[1]["gradient"])  # averaged over both


class LiveBytes(TorchDispatchMode):
    """The largest number of bytes that tensors made inside held at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key in self.known:
            return
        self.known[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self.known.pop(key, 0)


@pytest.mark.parametrize("name", ["pointnet", "pointnet-aligned", "dgcnn", "pointnet2", "pct"])
def test_scoring_needs_at_most_a_tenth_more_memory_than_the_forward_pass(name: str) -> None:
    network, points = build_network(name, 4, width=0.5).eval(), torch.randn(2, 600, 3) / 2
    with torch.no_grad(), LiveBytes() as forward:
        network(points)
    with LiveBytes() as scored:
        point_importance(network, points)
    assert scored.peak <= 1.1 * forward.peak
