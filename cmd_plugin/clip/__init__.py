"""Embeddings of CLIP and of other networks: whitening as a likelihood, ellipsoids as geometry."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cmd_plugin._face import lazy_face

if TYPE_CHECKING:
    from cmd_plugin.clip.conditional import ConditionalWhitening as ConditionalWhitening
    from cmd_plugin.clip.estimator import Whitener as Whitener
    from cmd_plugin.clip.layers import fit_layers as fit_layers
    from cmd_plugin.clip.layers import layer_features as layer_features
    from cmd_plugin.clip.layers import score_layers as score_layers
    from cmd_plugin.clip.metrics import FeatureGaussian as FeatureGaussian
    from cmd_plugin.clip.metrics import WhitenedLikelihood as WhitenedLikelihood
    from cmd_plugin.clip.statistics import Gaussian as Gaussian
    from cmd_plugin.clip.statistics import GaussianStatistics as GaussianStatistics
    from cmd_plugin.clip.wclip import import_wclip as import_wclip
    from cmd_plugin.clip.whitening import Whitening as Whitening

_MODULES = {
    "ConditionalWhitening": "conditional",
    "FeatureGaussian": "metrics",
    "Gaussian": "statistics",
    "GaussianStatistics": "statistics",
    "WhitenedLikelihood": "metrics",
    "Whitener": "estimator",
    "Whitening": "whitening",
    "fit_layers": "layers",
    "import_wclip": "wclip",
    "layer_features": "layers",
    "score_layers": "layers",
}

__all__ = list(_MODULES)

__getattr__, __dir__ = lazy_face(__name__, _MODULES)
