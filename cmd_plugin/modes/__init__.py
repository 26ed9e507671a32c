"""Correlation Mode Decomposition: cluster weight trajectories into modes, model every weight by its mode, online or post hoc."""

from cmd_plugin.modes.decomposition import Decomposition
from cmd_plugin.modes.layout import Layout
from cmd_plugin.modes.online import OnlineModes
from cmd_plugin.modes.posthoc import decompose

__all__ = ["Decomposition", "Layout", "OnlineModes", "decompose"]
