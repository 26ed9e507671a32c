"""What point-cloud networks look at, and how that makes them robust."""

from cmd_plugin.pointcloud._interception import channels_first
from cmd_plugin.pointcloud.adversarial import SubsetDefence, gradient_attack, query_attack
from cmd_plugin.pointcloud.clouds import PointClouds, unit_sphere
from cmd_plugin.pointcloud.focus import FocusReference
from cmd_plugin.pointcloud.importance import ImportanceHead, PointImportance, point_importance
from cmd_plugin.pointcloud.networks import build_network
from cmd_plugin.pointcloud.outliers import (
    remove_outliers,
    statistical_outliers,
    statistical_scores,
)
from cmd_plugin.pointcloud.refocus import (
    Refocused,
    importance_order,
    kept_count,
    kept_mask,
    refocus,
    uncritical_subset,
)
from cmd_plugin.pointcloud.shapes import SHAPE_CLASSES, shape_clouds

__all__ = [
    "SHAPE_CLASSES",
    "FocusReference",
    "ImportanceHead",
    "PointClouds",
    "PointImportance",
    "Refocused",
    "SubsetDefence",
    "build_network",
    "channels_first",
    "gradient_attack",
    "importance_order",
    "kept_count",
    "kept_mask",
    "point_importance",
    "query_attack",
    "refocus",
    "remove_outliers",
    "shape_clouds",
    "statistical_outliers",
    "statistical_scores",
    "uncritical_subset",
    "unit_sphere",
]
