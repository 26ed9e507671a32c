"""Names a user chooses from, for those who must not wait for torch to know them."""

from __future__ import annotations

from typing import Literal, get_args

__all__ = ["MEASURES", "NETWORK_NAMES", "ROUNDINGS", "Measure", "Rounding"]

NETWORK_NAMES = ("pointnet", "pointnet-aligned", "pointnet2", "dgcnn", "pct")
"""The keys of :data:`cmd_plugin.pointcloud.networks.NETWORKS`."""

Measure = Literal["fbi", "critical", "critical++", "entropy"]
MEASURES: tuple[str, ...] = get_args(Measure)
"""What a point can be scored by, see :func:`cmd_plugin.pointcloud.point_importance`."""

Rounding = Literal["official", "exact"]
ROUNDINGS: tuple[str, ...] = get_args(Rounding)
"""Where errors are rounded, see :func:`cmd_plugin.pointcloud.mean_corruption_error`."""
