"""Real training runs in which raw weights, EMA, SWA and CMD are measured side by side."""

from cmd_plugin.networks import Score, SmallConvNet, build_model, evaluate
from cmd_plugin.training.averages import WeightAverages
from cmd_plugin.training.classifier import Classifier
from cmd_plugin.training.comparison import ComparisonResult, run_comparison
from cmd_plugin.training.config import TrainConfig
from cmd_plugin.training.recorder import Progress

__all__ = [
    "Classifier",
    "ComparisonResult",
    "Progress",
    "Score",
    "SmallConvNet",
    "TrainConfig",
    "WeightAverages",
    "build_model",
    "evaluate",
    "run_comparison",
]
