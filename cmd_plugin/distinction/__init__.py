"""Class evidence in images: what speaks for a class, split from the rest by a trained generator.

Each name is imported when it is first used; only the explainer's training loads Lightning, and only
the attribution loads Captum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cmd_plugin._face import lazy_face

if TYPE_CHECKING:
    from cmd_plugin.distinction.artefact import load_decomposer as load_decomposer
    from cmd_plugin.distinction.artefact import save_decomposer as save_decomposer
    from cmd_plugin.distinction.attribution import (
        DecompositionAttribution as DecompositionAttribution,
    )
    from cmd_plugin.distinction.covariance import branch_covariance as branch_covariance
    from cmd_plugin.distinction.covariance import class_cosine as class_cosine
    from cmd_plugin.distinction.covariance import importance as importance
    from cmd_plugin.distinction.covariance import specialization as specialization
    from cmd_plugin.distinction.curves import Curve as Curve
    from cmd_plugin.distinction.curves import counterfactual_transition as counterfactual_transition
    from cmd_plugin.distinction.curves import deletion_curve as deletion_curve
    from cmd_plugin.distinction.curves import fill_grey as fill_grey
    from cmd_plugin.distinction.curves import fill_in as fill_in
    from cmd_plugin.distinction.curves import greedy_ranking as greedy_ranking
    from cmd_plugin.distinction.curves import heatmap_part as heatmap_part
    from cmd_plugin.distinction.curves import normalised_area as normalised_area
    from cmd_plugin.distinction.curves import removal_curve as removal_curve
    from cmd_plugin.distinction.decomposition import Decomposer as Decomposer
    from cmd_plugin.distinction.decomposition import Decomposition as Decomposition
    from cmd_plugin.distinction.decomposition import decompose as decompose
    from cmd_plugin.distinction.decomposition import (
        distinct_of_every_class as distinct_of_every_class,
    )
    from cmd_plugin.distinction.explainer import DecompositionExplainer as DecompositionExplainer
    from cmd_plugin.distinction.frozen import PixelRange as PixelRange
    from cmd_plugin.distinction.generator import BranchedGenerator as BranchedGenerator
    from cmd_plugin.distinction.masks import boxes_to_mask as boxes_to_mask
    from cmd_plugin.distinction.masks import mask_iou as mask_iou
    from cmd_plugin.distinction.masks import mass_inside as mass_inside
    from cmd_plugin.distinction.masks import pointing_game as pointing_game
    from cmd_plugin.distinction.objectives import OBJECTIVES as OBJECTIVES
    from cmd_plugin.distinction.objectives import LossWeights as LossWeights
    from cmd_plugin.distinction.plants import Recovery as Recovery
    from cmd_plugin.distinction.plants import plant as plant
    from cmd_plugin.distinction.plants import plant_recovery as plant_recovery
    from cmd_plugin.distinction.plants import plant_remainder as plant_remainder
    from cmd_plugin.distinction.plots import plot_decomposition as plot_decomposition
    from cmd_plugin.distinction.quality import SplitQuality as SplitQuality
    from cmd_plugin.distinction.quality import SplitReport as SplitReport
    from cmd_plugin.distinction.quality import measure_split as measure_split

_MODULES = {
    "BranchedGenerator": "generator",
    "Curve": "curves",
    "Decomposer": "decomposition",
    "Decomposition": "decomposition",
    "DecompositionAttribution": "attribution",
    "DecompositionExplainer": "explainer",
    "LossWeights": "objectives",
    "OBJECTIVES": "objectives",
    "PixelRange": "frozen",
    "Recovery": "plants",
    "SplitQuality": "quality",
    "SplitReport": "quality",
    "boxes_to_mask": "masks",
    "branch_covariance": "covariance",
    "class_cosine": "covariance",
    "counterfactual_transition": "curves",
    "decompose": "decomposition",
    "deletion_curve": "curves",
    "distinct_of_every_class": "decomposition",
    "fill_grey": "curves",
    "fill_in": "curves",
    "greedy_ranking": "curves",
    "heatmap_part": "curves",
    "importance": "covariance",
    "load_decomposer": "artefact",
    "mask_iou": "masks",
    "mass_inside": "masks",
    "measure_split": "quality",
    "normalised_area": "curves",
    "plant": "plants",
    "plant_recovery": "plants",
    "plant_remainder": "plants",
    "plot_decomposition": "plots",
    "pointing_game": "masks",
    "removal_curve": "curves",
    "save_decomposer": "artefact",
    "specialization": "covariance",
}

__all__ = list(_MODULES)

__getattr__, __dir__ = lazy_face(__name__, _MODULES)
