"""Embeddings of CLIP and of other networks: whitening as a likelihood, ellipsoids as geometry."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cmd_plugin._face import lazy_face

if TYPE_CHECKING:
    from cmd_plugin.clip.align import Alignment as Alignment
    from cmd_plugin.clip.align import fit_alignment as fit_alignment
    from cmd_plugin.clip.alpha import ALPHAS as ALPHAS
    from cmd_plugin.clip.alpha import AlphaCurve as AlphaCurve
    from cmd_plugin.clip.alpha import alpha_curve as alpha_curve
    from cmd_plugin.clip.alpha import conformity_divergence as conformity_divergence
    from cmd_plugin.clip.alpha import nt_xent as nt_xent
    from cmd_plugin.clip.conditional import ConditionalWhitening as ConditionalWhitening
    from cmd_plugin.clip.conformities import ConformityEstimate as ConformityEstimate
    from cmd_plugin.clip.conformities import conformity as conformity
    from cmd_plugin.clip.conformities import conformity_to as conformity_to
    from cmd_plugin.clip.conformities import estimate_conformity as estimate_conformity
    from cmd_plugin.clip.conformities import unit_mean as unit_mean
    from cmd_plugin.clip.drift import DomainAUC as DomainAUC
    from cmd_plugin.clip.drift import MMDTest as MMDTest
    from cmd_plugin.clip.drift import domain_auc as domain_auc
    from cmd_plugin.clip.drift import mmd_test as mmd_test
    from cmd_plugin.clip.ellipsoid import Ellipsoid as Ellipsoid
    from cmd_plugin.clip.ellipsoid import fit_ellipsoid as fit_ellipsoid
    from cmd_plugin.clip.estimator import Whitener as Whitener
    from cmd_plugin.clip.gap import ModalityGap as ModalityGap
    from cmd_plugin.clip.gap import alignment as alignment
    from cmd_plugin.clip.gap import modality_gap as modality_gap
    from cmd_plugin.clip.gap import separability as separability
    from cmd_plugin.clip.gap import separating_accuracy as separating_accuracy
    from cmd_plugin.clip.gap import shift_along_gap as shift_along_gap
    from cmd_plugin.clip.gap import shift_to_origin as shift_to_origin
    from cmd_plugin.clip.gap import uniformity as uniformity
    from cmd_plugin.clip.layers import fit_layers as fit_layers
    from cmd_plugin.clip.layers import layer_features as layer_features
    from cmd_plugin.clip.layers import score_layers as score_layers
    from cmd_plugin.clip.metrics import FeatureGaussian as FeatureGaussian
    from cmd_plugin.clip.metrics import WhitenedLikelihood as WhitenedLikelihood
    from cmd_plugin.clip.named_towers import load_tower as load_tower
    from cmd_plugin.clip.normality_tests import Normality as Normality
    from cmd_plugin.clip.normality_tests import normality as normality
    from cmd_plugin.clip.normalization import NormalizationEffect as NormalizationEffect
    from cmd_plugin.clip.normalization import normalization_effect as normalization_effect
    from cmd_plugin.clip.paths import slerp as slerp
    from cmd_plugin.clip.paths import slerp_circle as slerp_circle
    from cmd_plugin.clip.paths import vslerp as vslerp
    from cmd_plugin.clip.preprocessing import Preprocessing as Preprocessing
    from cmd_plugin.clip.retrieval import ranks_of as ranks_of
    from cmd_plugin.clip.retrieval import recall_at as recall_at
    from cmd_plugin.clip.row_scores import SCORES as SCORES
    from cmd_plugin.clip.row_scores import score_rows as score_rows
    from cmd_plugin.clip.statistics import Gaussian as Gaussian
    from cmd_plugin.clip.statistics import GaussianStatistics as GaussianStatistics
    from cmd_plugin.clip.towers import Tower as Tower
    from cmd_plugin.clip.towers import image_tower as image_tower
    from cmd_plugin.clip.towers import looks_normalised as looks_normalised
    from cmd_plugin.clip.towers import text_tower as text_tower
    from cmd_plugin.clip.wclip import import_wclip as import_wclip
    from cmd_plugin.clip.whitening import Whitening as Whitening

_MODULES = {
    "ALPHAS": "alpha",
    "Alignment": "align",
    "AlphaCurve": "alpha",
    "ConditionalWhitening": "conditional",
    "ConformityEstimate": "conformities",
    "DomainAUC": "drift",
    "Ellipsoid": "ellipsoid",
    "FeatureGaussian": "metrics",
    "Gaussian": "statistics",
    "GaussianStatistics": "statistics",
    "MMDTest": "drift",
    "ModalityGap": "gap",
    "Normality": "normality_tests",
    "NormalizationEffect": "normalization",
    "Preprocessing": "preprocessing",
    "SCORES": "row_scores",
    "Tower": "towers",
    "WhitenedLikelihood": "metrics",
    "Whitener": "estimator",
    "Whitening": "whitening",
    "alignment": "gap",
    "alpha_curve": "alpha",
    "conformity": "conformities",
    "conformity_divergence": "alpha",
    "conformity_to": "conformities",
    "domain_auc": "drift",
    "estimate_conformity": "conformities",
    "fit_alignment": "align",
    "fit_ellipsoid": "ellipsoid",
    "fit_layers": "layers",
    "image_tower": "towers",
    "import_wclip": "wclip",
    "layer_features": "layers",
    "load_tower": "named_towers",
    "looks_normalised": "towers",
    "mmd_test": "drift",
    "modality_gap": "gap",
    "normality": "normality_tests",
    "normalization_effect": "normalization",
    "nt_xent": "alpha",
    "ranks_of": "retrieval",
    "recall_at": "retrieval",
    "score_layers": "layers",
    "score_rows": "row_scores",
    "separability": "gap",
    "separating_accuracy": "gap",
    "shift_along_gap": "gap",
    "shift_to_origin": "gap",
    "slerp": "paths",
    "slerp_circle": "paths",
    "text_tower": "towers",
    "uniformity": "gap",
    "unit_mean": "conformities",
    "vslerp": "paths",
}

__all__ = list(_MODULES)

__getattr__, __dir__ = lazy_face(__name__, _MODULES)
