"""Names that options list and methods look up; importing them loads no torch."""

from __future__ import annotations

__all__ = ["OBJECTIVE_NAMES", "PLANT_NAMES"]

OBJECTIVE_NAMES = ("dxai_distilled", "dxai", "distinction", "uniform")
"""Objectives of a decomposition, see :data:`cmd_plugin.distinction.objectives.OBJECTIVES`."""

PLANT_NAMES = ("cross", "noise", "tint")
"""What :func:`cmd_plugin.distinction.plant` can put into images."""
