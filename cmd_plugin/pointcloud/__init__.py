"""What point-cloud networks look at, and how that makes them robust."""

from cmd_plugin.pointcloud.corruptions import CORRUPTIONS, corrupt

__all__ = ["CORRUPTIONS", "corrupt"]
