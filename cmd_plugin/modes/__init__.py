"""Correlation Mode Decomposition: model every weight of a run by one of a few modes."""

from cmd_plugin.modes.decomposition import Decomposition
from cmd_plugin.modes.layout import Layout
from cmd_plugin.modes.online import OnlineModes
from cmd_plugin.modes.posthoc import decompose
from cmd_plugin.modes.settings import Embedding

__all__ = ["Decomposition", "Embedding", "Layout", "OnlineModes", "decompose"]
