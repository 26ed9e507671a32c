"""Real training runs in which raw weights, EMA, SWA and CMD are measured side by side."""

from cmd_plugin.training.averages import WeightAverages
from cmd_plugin.jobs.classifier import Classifier
from cmd_plugin.training.comparison import ComparisonResult, run_comparison
from cmd_plugin.training.config import TrainConfig
from cmd_plugin.training.evaluation import Score, evaluate
from cmd_plugin.training.models import SmallConvNet, build_model
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
