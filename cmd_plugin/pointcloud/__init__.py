"""What point-cloud networks look at, and how that makes them robust."""

from cmd_plugin.pointcloud.clouds import PointClouds, unit_sphere
from cmd_plugin.pointcloud.corruption_error import (
    CorruptionError,
    CorruptionErrors,
    mean_corruption_error,
)
from cmd_plugin.pointcloud.corruptions import CORRUPTIONS, corrupt, shuffle_points
from cmd_plugin.pointcloud.diversity import Diversity, EnsembleDiversity
from cmd_plugin.pointcloud.drop_curves import DropCurve, perturbed_logits, random_scores
from cmd_plugin.pointcloud.epic import EPiC, Votes
from cmd_plugin.pointcloud.networks import build_network
from cmd_plugin.pointcloud.outlier_metrics import cloud_bootstrap, outlier_metrics
from cmd_plugin.pointcloud.shapes import SHAPE_CLASSES, shape_clouds
from cmd_plugin.pointcloud.view_training import EPiCTraining, ViewTraining

__all__ = [
    "CORRUPTIONS",
    "SHAPE_CLASSES",
    "CorruptionError",
    "CorruptionErrors",
    "Diversity",
    "DropCurve",
    "EPiC",
    "EPiCTraining",
    "EnsembleDiversity",
    "PointClouds",
    "ViewTraining",
    "Votes",
    "build_network",
    "cloud_bootstrap",
    "corrupt",
    "mean_corruption_error",
    "outlier_metrics",
    "perturbed_logits",
    "random_scores",
    "shape_clouds",
    "shuffle_points",
    "unit_sphere",
]
