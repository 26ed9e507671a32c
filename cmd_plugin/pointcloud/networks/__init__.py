"""Reference networks, small enough to read, in the layer names of the published weights."""

from __future__ import annotations

import difflib

from torch import nn

from cmd_plugin.errors import InputError
from cmd_plugin.pointcloud.networks.dgcnn import DGCNN
from cmd_plugin.pointcloud.networks.pct import PCT
from cmd_plugin.pointcloud.networks.pointnet import PointNet, PointNetAligned
from cmd_plugin.pointcloud.networks.pointnet2 import PointNet2

__all__ = [
    "DGCNN",
    "NETWORKS",
    "PCT",
    "PointNet",
    "PointNet2",
    "PointNetAligned",
    "build_network",
]

NETWORKS: dict[str, type[nn.Module]] = {
    "pointnet": PointNet,
    "pointnet-aligned": PointNetAligned,
    "pointnet2": PointNet2,
    "dgcnn": DGCNN,
    "pct": PCT,
}


def build_network(name: str, classes: int, width: float = 1.0) -> nn.Module:
    """Build an untrained network; initial weights come from torch's global random state.

    Args:
        name: ``pointnet``, ``pointnet-aligned``, ``pointnet2``, ``dgcnn`` or ``pct``.
        classes: Number of classes.
        width: Multiplies every hidden width.

    Raises:
        InputError: If there is no such network or the width is not above 0.
    """
    if name not in NETWORKS:
        near = difflib.get_close_matches(name, NETWORKS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(NETWORKS)}."
        raise InputError(f"unknown point network {name!r}: {hint}")
    return NETWORKS[name](classes, width=width)
