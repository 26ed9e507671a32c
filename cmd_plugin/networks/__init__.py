"""The ground floor of everything that wraps somebody's network.

Each name is imported when it is first used, so that reading weights loads no model zoo.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cmd_plugin._face import lazy_face

if TYPE_CHECKING:
    from cmd_plugin.networks.checkpoints import find_checkpoints as find_checkpoints
    from cmd_plugin.networks.evaluation import Score as Score
    from cmd_plugin.networks.evaluation import evaluate as evaluate
    from cmd_plugin.networks.measuring import kept_buffers as kept_buffers
    from cmd_plugin.networks.measuring import undisturbed as undisturbed
    from cmd_plugin.networks.named import SmallConvNet as SmallConvNet
    from cmd_plugin.networks.named import build_model as build_model
    from cmd_plugin.networks.recalibration import load_statistics as load_statistics
    from cmd_plugin.networks.recalibration import recalibrate as recalibrate
    from cmd_plugin.networks.recalibration import recalibrated as recalibrated
    from cmd_plugin.networks.recalibration import running_statistics as running_statistics
    from cmd_plugin.networks.weights import load_weights as load_weights
    from cmd_plugin.networks.weights import read_weights as read_weights

_MODULES = {
    "Score": "evaluation",
    "SmallConvNet": "named",
    "build_model": "named",
    "evaluate": "evaluation",
    "find_checkpoints": "checkpoints",
    "kept_buffers": "measuring",
    "load_statistics": "recalibration",
    "load_weights": "weights",
    "read_weights": "weights",
    "recalibrate": "recalibration",
    "recalibrated": "recalibration",
    "running_statistics": "recalibration",
    "undisturbed": "measuring",
}

__all__ = list(_MODULES)

__getattr__, __dir__ = lazy_face(__name__, _MODULES)
