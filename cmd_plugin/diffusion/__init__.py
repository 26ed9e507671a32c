"""What a diffusion model has memorised, and whether an image was made by one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cmd_plugin._face import lazy_face

if TYPE_CHECKING:
    from cmd_plugin.diffusion.calibration import RealReference as RealReference
    from cmd_plugin.diffusion.codecs import LatentCodec as LatentCodec
    from cmd_plugin.diffusion.codecs import PixelCodec as PixelCodec
    from cmd_plugin.diffusion.codecs import clip_embedding as clip_embedding
    from cmd_plugin.diffusion.codecs import codec_of as codec_of
    from cmd_plugin.diffusion.delivery import redeliver as redeliver
    from cmd_plugin.diffusion.denoisers import TrainedDenoiser as TrainedDenoiser
    from cmd_plugin.diffusion.denoisers import build_denoiser as build_denoiser
    from cmd_plugin.diffusion.denoisers import denoiser_model as denoiser_model
    from cmd_plugin.diffusion.directions import sphere_directions as sphere_directions
    from cmd_plugin.diffusion.doses import parse_doses as parse_doses
    from cmd_plugin.diffusion.few_shot import FewShotDetector as FewShotDetector
    from cmd_plugin.diffusion.few_shot import manifold_features as manifold_features
    from cmd_plugin.diffusion.few_shot import reconstruction_error as reconstruction_error
    from cmd_plugin.diffusion.laplace import Flux as Flux
    from cmd_plugin.diffusion.laplace import p_laplace as p_laplace
    from cmd_plugin.diffusion.manifold_bias import ManifoldBias as ManifoldBias
    from cmd_plugin.diffusion.manifold_bias import ManifoldBiasDetector as ManifoldBiasDetector
    from cmd_plugin.diffusion.manifold_bias import verdicts as verdicts
    from cmd_plugin.diffusion.matching import content_statistics as content_statistics
    from cmd_plugin.diffusion.matching import match_histogram as match_histogram
    from cmd_plugin.diffusion.matching import match_levels as match_levels
    from cmd_plugin.diffusion.matching import nearest_distance as nearest_distance
    from cmd_plugin.diffusion.memorization import MemorizationReport as MemorizationReport
    from cmd_plugin.diffusion.memorization import MemorizationScore as MemorizationScore
    from cmd_plugin.diffusion.memorization import separate as separate
    from cmd_plugin.diffusion.memorization import separate_doses as separate_doses
    from cmd_plugin.diffusion.plots import plot_contact_sheet as plot_contact_sheet
    from cmd_plugin.diffusion.probes import ProbeSet as ProbeSet
    from cmd_plugin.diffusion.probes import plant_duplicates as plant_duplicates
    from cmd_plugin.diffusion.references import lid_flipd as lid_flipd
    from cmd_plugin.diffusion.references import p_laplace_exact as p_laplace_exact
    from cmd_plugin.diffusion.sampling import draw_samples as draw_samples
    from cmd_plugin.diffusion.schedules import NoiseSchedule as NoiseSchedule
    from cmd_plugin.diffusion.score_model import ScoreModel as ScoreModel
    from cmd_plugin.diffusion.suspects import SetTest as SetTest
    from cmd_plugin.diffusion.suspects import infer_membership as infer_membership
    from cmd_plugin.diffusion.suspects import membership_power as membership_power
    from cmd_plugin.diffusion.suspects import pixel_separation as pixel_separation
    from cmd_plugin.diffusion.suspects import refuse_unlike as refuse_unlike

_MODULES = {
    "FewShotDetector": "few_shot",
    "Flux": "laplace",
    "LatentCodec": "codecs",
    "ManifoldBias": "manifold_bias",
    "ManifoldBiasDetector": "manifold_bias",
    "MemorizationReport": "memorization",
    "MemorizationScore": "memorization",
    "NoiseSchedule": "schedules",
    "PixelCodec": "codecs",
    "ProbeSet": "probes",
    "RealReference": "calibration",
    "ScoreModel": "score_model",
    "SetTest": "suspects",
    "TrainedDenoiser": "denoisers",
    "build_denoiser": "denoisers",
    "clip_embedding": "codecs",
    "codec_of": "codecs",
    "content_statistics": "matching",
    "denoiser_model": "denoisers",
    "draw_samples": "sampling",
    "infer_membership": "suspects",
    "lid_flipd": "references",
    "manifold_features": "few_shot",
    "match_histogram": "matching",
    "match_levels": "matching",
    "membership_power": "suspects",
    "nearest_distance": "matching",
    "p_laplace": "laplace",
    "p_laplace_exact": "references",
    "parse_doses": "doses",
    "pixel_separation": "suspects",
    "plant_duplicates": "probes",
    "plot_contact_sheet": "plots",
    "reconstruction_error": "few_shot",
    "redeliver": "delivery",
    "refuse_unlike": "suspects",
    "separate": "memorization",
    "separate_doses": "memorization",
    "sphere_directions": "directions",
    "verdicts": "manifold_bias",
}

__all__ = list(_MODULES)

__getattr__, __dir__ = lazy_face(__name__, _MODULES)
