"""Networks of `points train` damaged at random: read, or refused with one sentence."""

from __future__ import annotations

from pathlib import Path

import torch

from cmd_plugin.jobs.points.model import (
    PointNetwork,
    is_point_network,
    load_point_network,
    save_point_network,
)
from cmd_plugin.pointcloud import build_network
from tests.helpers.damage import refuses_damaged


def test_a_damaged_network_is_read_or_refused(tmp_path: Path) -> None:
    def read(path: Path) -> None:
        if is_point_network(path):
            trained = load_point_network(path)
            with torch.no_grad():
                trained.network(torch.zeros(1, 40, 3))

    path = tmp_path / "m.safetensors"
    trained = PointNetwork(build_network("pct", 2, 0.0625), "pct", 0.0625, 40, ("a", "b"))
    save_point_network(path, trained)
    assert refuses_damaged(path, path.read_bytes(), read) > 20
