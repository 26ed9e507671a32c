"""What point-cloud networks look at, and how that makes them robust."""

from cmd_plugin.pointcloud.clouds import PointClouds, unit_sphere
from cmd_plugin.pointcloud.networks import build_network
from cmd_plugin.pointcloud.shapes import SHAPE_CLASSES, shape_clouds

__all__ = ["SHAPE_CLASSES", "PointClouds", "build_network", "shape_clouds", "unit_sphere"]
