"""What point-cloud networks look at, and how that makes them robust."""

from cmd_plugin.pointcloud._interception import channels_first
from cmd_plugin.pointcloud.clouds import PointClouds, unit_sphere
from cmd_plugin.pointcloud.importance import ImportanceHead, PointImportance, point_importance
from cmd_plugin.pointcloud.networks import build_network
from cmd_plugin.pointcloud.shapes import SHAPE_CLASSES, shape_clouds

__all__ = [
    "SHAPE_CLASSES",
    "ImportanceHead",
    "PointClouds",
    "PointImportance",
    "build_network",
    "channels_first",
    "point_importance",
    "shape_clouds",
    "unit_sphere",
]
