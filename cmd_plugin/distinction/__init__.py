"""Class evidence in images: what speaks for a class, split from the rest by a trained generator.

Each name is imported when it is first used; only the explainer's training loads Lightning, and only
the attribution loads Captum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cmd_plugin._face import lazy_face

if TYPE_CHECKING:
    from cmd_plugin.distinction.covariance import branch_covariance as branch_covariance
    from cmd_plugin.distinction.covariance import importance as importance
    from cmd_plugin.distinction.covariance import specialization as specialization
    from cmd_plugin.distinction.decomposition import Decomposer as Decomposer
    from cmd_plugin.distinction.decomposition import Decomposition as Decomposition
    from cmd_plugin.distinction.decomposition import decompose as decompose
    from cmd_plugin.distinction.decomposition import (
        distinct_of_every_class as distinct_of_every_class,
    )
    from cmd_plugin.distinction.explainer import DecompositionExplainer as DecompositionExplainer
    from cmd_plugin.distinction.frozen import PixelRange as PixelRange
    from cmd_plugin.distinction.generator import BranchedGenerator as BranchedGenerator
    from cmd_plugin.distinction.objectives import OBJECTIVES as OBJECTIVES
    from cmd_plugin.distinction.objectives import LossWeights as LossWeights
    from cmd_plugin.distinction.quality import SplitQuality as SplitQuality
    from cmd_plugin.distinction.quality import SplitReport as SplitReport
    from cmd_plugin.distinction.quality import measure_split as measure_split

_MODULES = {
    "BranchedGenerator": "generator",
    "Decomposer": "decomposition",
    "Decomposition": "decomposition",
    "DecompositionExplainer": "explainer",
    "LossWeights": "objectives",
    "OBJECTIVES": "objectives",
    "PixelRange": "frozen",
    "SplitQuality": "quality",
    "SplitReport": "quality",
    "branch_covariance": "covariance",
    "decompose": "decomposition",
    "distinct_of_every_class": "decomposition",
    "importance": "covariance",
    "measure_split": "quality",
    "specialization": "covariance",
}

__all__ = list(_MODULES)

__getattr__, __dir__ = lazy_face(__name__, _MODULES)
