"""Memory-bound primitives: a folder each, with a reference, a fast CPU path and one function."""

if __name__ != "cmd_plugin.kernels":
    raise ImportError(
        f"this folder is the package 'cmd_plugin.kernels' but was imported as {__name__!r}: "
        "write 'from cmd_plugin.kernels import ...'."
    )

from cmd_plugin.kernels.assign_and_fit import AffineFit, assign_and_fit
from cmd_plugin.kernels.curve_walk import curve_walk
from cmd_plugin.kernels.farthest_point_sampling import farthest_point_sampling
from cmd_plugin.kernels.flat_view import FlatView
from cmd_plugin.kernels.knn import Neighbours, knn
from cmd_plugin.kernels.point_importance import (
    PointScores,
    entropy_parts,
    normalised_entropy,
    point_importance,
)
from cmd_plugin.kernels.reconstruct import reconstruct, reconstruct_into
from cmd_plugin.kernels.update_affine import update_affine

__all__ = [
    "AffineFit",
    "FlatView",
    "Neighbours",
    "PointScores",
    "assign_and_fit",
    "curve_walk",
    "entropy_parts",
    "farthest_point_sampling",
    "knn",
    "normalised_entropy",
    "point_importance",
    "reconstruct",
    "reconstruct_into",
    "update_affine",
]
