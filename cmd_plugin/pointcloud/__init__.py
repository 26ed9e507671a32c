"""What point-cloud networks look at, and how that makes them robust."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cmd_plugin._face import lazy_face

if TYPE_CHECKING:
    from cmd_plugin.pointcloud._interception import channels_first as channels_first
    from cmd_plugin.pointcloud.adversarial import Attack as Attack
    from cmd_plugin.pointcloud.adversarial import SubsetDefence as SubsetDefence
    from cmd_plugin.pointcloud.adversarial import gradient_attack as gradient_attack
    from cmd_plugin.pointcloud.adversarial import query_attack as query_attack
    from cmd_plugin.pointcloud.adversarial import strongest_attack as strongest_attack
    from cmd_plugin.pointcloud.clouds import PointClouds as PointClouds
    from cmd_plugin.pointcloud.clouds import unit_sphere as unit_sphere
    from cmd_plugin.pointcloud.corruption_error import CorruptionError as CorruptionError
    from cmd_plugin.pointcloud.corruption_error import CorruptionErrors as CorruptionErrors
    from cmd_plugin.pointcloud.corruption_error import (
        mean_corruption_error as mean_corruption_error,
    )
    from cmd_plugin.pointcloud.corruptions import CORRUPTIONS as CORRUPTIONS
    from cmd_plugin.pointcloud.corruptions import corrupt as corrupt
    from cmd_plugin.pointcloud.corruptions import shuffle_points as shuffle_points
    from cmd_plugin.pointcloud.defences import Defences as Defences
    from cmd_plugin.pointcloud.defences import train_defences as train_defences
    from cmd_plugin.pointcloud.diversity import Diversity as Diversity
    from cmd_plugin.pointcloud.diversity import EnsembleDiversity as EnsembleDiversity
    from cmd_plugin.pointcloud.drop_curves import DropCurve as DropCurve
    from cmd_plugin.pointcloud.drop_curves import perturbed_logits as perturbed_logits
    from cmd_plugin.pointcloud.drop_curves import random_scores as random_scores
    from cmd_plugin.pointcloud.drop_curves import roughness as roughness
    from cmd_plugin.pointcloud.epic import EPiC as EPiC
    from cmd_plugin.pointcloud.epic import Votes as Votes
    from cmd_plugin.pointcloud.focus import FocusReference as FocusReference
    from cmd_plugin.pointcloud.focus import gini as gini
    from cmd_plugin.pointcloud.focus import unusual_scores as unusual_scores
    from cmd_plugin.pointcloud.importance import ImportanceHead as ImportanceHead
    from cmd_plugin.pointcloud.importance import PointImportance as PointImportance
    from cmd_plugin.pointcloud.importance import point_importance as point_importance
    from cmd_plugin.pointcloud.networks import build_network as build_network
    from cmd_plugin.pointcloud.outliers import remove_outliers as remove_outliers
    from cmd_plugin.pointcloud.outliers import statistical_outliers as statistical_outliers
    from cmd_plugin.pointcloud.outliers import statistical_scores as statistical_scores
    from cmd_plugin.pointcloud.partials import partial_clouds as partial_clouds
    from cmd_plugin.pointcloud.refocusing import Refocused as Refocused
    from cmd_plugin.pointcloud.refocusing import importance_order as importance_order
    from cmd_plugin.pointcloud.refocusing import kept_count as kept_count
    from cmd_plugin.pointcloud.refocusing import kept_mask as kept_mask
    from cmd_plugin.pointcloud.refocusing import refocus as refocus
    from cmd_plugin.pointcloud.refocusing import uncritical_subset as uncritical_subset
    from cmd_plugin.pointcloud.robustness import RobustnessReport as RobustnessReport
    from cmd_plugin.pointcloud.robustness import corrupted_sets as corrupted_sets
    from cmd_plugin.pointcloud.robustness import evaluate_corruptions as evaluate_corruptions
    from cmd_plugin.pointcloud.robustness import released_sets as released_sets
    from cmd_plugin.pointcloud.score_metrics import outlier_metrics as outlier_metrics
    from cmd_plugin.pointcloud.score_metrics import separation as separation
    from cmd_plugin.pointcloud.shapes import SHAPE_CLASSES as SHAPE_CLASSES
    from cmd_plugin.pointcloud.shapes import shape_clouds as shape_clouds
    from cmd_plugin.pointcloud.view_training import EPiCTraining as EPiCTraining
    from cmd_plugin.pointcloud.view_training import ViewTraining as ViewTraining

_MODULES = {
    "Attack": "adversarial",
    "CORRUPTIONS": "corruptions",
    "CorruptionError": "corruption_error",
    "CorruptionErrors": "corruption_error",
    "Defences": "defences",
    "Diversity": "diversity",
    "DropCurve": "drop_curves",
    "EPiC": "epic",
    "EPiCTraining": "view_training",
    "EnsembleDiversity": "diversity",
    "FocusReference": "focus",
    "ImportanceHead": "importance",
    "PointClouds": "clouds",
    "PointImportance": "importance",
    "Refocused": "refocusing",
    "RobustnessReport": "robustness",
    "SHAPE_CLASSES": "shapes",
    "SubsetDefence": "adversarial",
    "ViewTraining": "view_training",
    "Votes": "epic",
    "build_network": "networks",
    "channels_first": "_interception",
    "corrupt": "corruptions",
    "corrupted_sets": "robustness",
    "evaluate_corruptions": "robustness",
    "gini": "focus",
    "gradient_attack": "adversarial",
    "importance_order": "refocusing",
    "kept_count": "refocusing",
    "kept_mask": "refocusing",
    "mean_corruption_error": "corruption_error",
    "outlier_metrics": "score_metrics",
    "partial_clouds": "partials",
    "perturbed_logits": "drop_curves",
    "point_importance": "importance",
    "query_attack": "adversarial",
    "random_scores": "drop_curves",
    "refocus": "refocusing",
    "released_sets": "robustness",
    "remove_outliers": "outliers",
    "roughness": "drop_curves",
    "separation": "score_metrics",
    "shape_clouds": "shapes",
    "shuffle_points": "corruptions",
    "statistical_outliers": "outliers",
    "statistical_scores": "outliers",
    "strongest_attack": "adversarial",
    "train_defences": "defences",
    "uncritical_subset": "refocusing",
    "unit_sphere": "clouds",
    "unusual_scores": "focus",
}

__all__ = list(_MODULES)

__getattr__, __dir__ = lazy_face(__name__, _MODULES)
