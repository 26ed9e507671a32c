"""What point-cloud networks look at, and how that makes them robust."""

from cmd_plugin.pointcloud._interception import channels_first
from cmd_plugin.pointcloud.adversarial import SubsetDefence, gradient_attack, query_attack
from cmd_plugin.pointcloud.clouds import PointClouds, unit_sphere
from cmd_plugin.pointcloud.corruption_error import (
    CorruptionError,
    CorruptionErrors,
    mean_corruption_error,
)
from cmd_plugin.pointcloud.corruptions import CORRUPTIONS, corrupt, shuffle_points
from cmd_plugin.pointcloud.defences import Defences, train_defences
from cmd_plugin.pointcloud.diversity import Diversity, EnsembleDiversity
from cmd_plugin.pointcloud.drop_curves import (
    DropCurve,
    perturbed_logits,
    random_scores,
    roughness,
)
from cmd_plugin.pointcloud.epic import EPiC, Votes
from cmd_plugin.pointcloud.focus import FocusReference, gini, unusual_scores
from cmd_plugin.pointcloud.importance import ImportanceHead, PointImportance, point_importance
from cmd_plugin.pointcloud.networks import build_network
from cmd_plugin.pointcloud.outlier_metrics import cloud_bootstrap, outlier_metrics, separation
from cmd_plugin.pointcloud.outliers import (
    remove_outliers,
    statistical_outliers,
    statistical_scores,
)
from cmd_plugin.pointcloud.partial_clouds import partial_clouds
from cmd_plugin.pointcloud.refocus import (
    Refocused,
    importance_order,
    kept_count,
    kept_mask,
    refocus,
    uncritical_subset,
)
from cmd_plugin.pointcloud.robustness import (
    RobustnessReport,
    corrupted_sets,
    evaluate_corruptions,
    released_sets,
)
from cmd_plugin.pointcloud.shapes import SHAPE_CLASSES, shape_clouds
from cmd_plugin.pointcloud.view_training import EPiCTraining, ViewTraining

__all__ = [
    "CORRUPTIONS",
    "SHAPE_CLASSES",
    "CorruptionError",
    "CorruptionErrors",
    "Defences",
    "Diversity",
    "DropCurve",
    "EPiC",
    "EPiCTraining",
    "EnsembleDiversity",
    "FocusReference",
    "ImportanceHead",
    "PointClouds",
    "PointImportance",
    "Refocused",
    "RobustnessReport",
    "SubsetDefence",
    "ViewTraining",
    "Votes",
    "build_network",
    "channels_first",
    "cloud_bootstrap",
    "corrupt",
    "corrupted_sets",
    "evaluate_corruptions",
    "gini",
    "gradient_attack",
    "importance_order",
    "kept_count",
    "kept_mask",
    "mean_corruption_error",
    "outlier_metrics",
    "partial_clouds",
    "perturbed_logits",
    "point_importance",
    "query_attack",
    "random_scores",
    "refocus",
    "released_sets",
    "remove_outliers",
    "roughness",
    "separation",
    "shape_clouds",
    "shuffle_points",
    "statistical_outliers",
    "statistical_scores",
    "train_defences",
    "uncritical_subset",
    "unit_sphere",
    "unusual_scores",
]
