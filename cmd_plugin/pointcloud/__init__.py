"""What point-cloud networks look at, and how that makes them robust.

What a name needs is imported when the name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from cmd_plugin.pointcloud.outliers import (
        remove_outliers,
        statistical_outliers,
        statistical_scores,
    )
    from cmd_plugin.pointcloud.partials import partial_clouds
    from cmd_plugin.pointcloud.refocusing import (
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
    from cmd_plugin.pointcloud.score_metrics import outlier_metrics, separation
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

_HOMES = {
    "_interception": ("channels_first",),
    "adversarial": ("SubsetDefence", "gradient_attack", "query_attack"),
    "clouds": ("PointClouds", "unit_sphere"),
    "corruption_error": ("CorruptionError", "CorruptionErrors", "mean_corruption_error"),
    "corruptions": ("CORRUPTIONS", "corrupt", "shuffle_points"),
    "defences": ("Defences", "train_defences"),
    "diversity": ("Diversity", "EnsembleDiversity"),
    "drop_curves": ("DropCurve", "perturbed_logits", "random_scores", "roughness"),
    "epic": ("EPiC", "Votes"),
    "focus": ("FocusReference", "gini", "unusual_scores"),
    "importance": ("ImportanceHead", "PointImportance", "point_importance"),
    "networks": ("build_network",),
    "outliers": ("remove_outliers", "statistical_outliers", "statistical_scores"),
    "partials": ("partial_clouds",),
    "refocusing": (
        "Refocused",
        "importance_order",
        "kept_count",
        "kept_mask",
        "refocus",
        "uncritical_subset",
    ),
    "robustness": ("RobustnessReport", "corrupted_sets", "evaluate_corruptions", "released_sets"),
    "score_metrics": ("outlier_metrics", "separation"),
    "shapes": ("SHAPE_CLASSES", "shape_clouds"),
    "view_training": ("EPiCTraining", "ViewTraining"),
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
