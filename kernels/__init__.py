"""Memory-bound primitives: a folder each, with a reference, fast paths and one function."""

if __name__ != "cmd_plugin.kernels":
    raise ImportError(
        f"this folder is the package 'cmd_plugin.kernels' but was imported as {__name__!r}: "
        "write 'from cmd_plugin.kernels import ...'."
    )

from cmd_plugin.kernels._dispatch import last_backend
from cmd_plugin.kernels.apply_embedding import apply_embedding
from cmd_plugin.kernels.assign_and_fit import AffineFit, assign_and_fit
from cmd_plugin.kernels.coefficient_drift import coefficient_drift
from cmd_plugin.kernels.curve_walk import curve_walk
from cmd_plugin.kernels.farthest_point_sampling import farthest_point_sampling
from cmd_plugin.kernels.flat_view import FlatView
from cmd_plugin.kernels.fold_gradients import fold_gradients
from cmd_plugin.kernels.knn import Neighbours, knn
from cmd_plugin.kernels.mahalanobis import mahalanobis
from cmd_plugin.kernels.point_importance import (
    PointScores,
    entropy_parts,
    normalised_entropy,
    point_importance,
)
from cmd_plugin.kernels.reconstruct import reconstruct, reconstruct_into
from cmd_plugin.kernels.select_smallest import select_smallest
from cmd_plugin.kernels.snapshot_delta import snapshot_delta
from cmd_plugin.kernels.swap import swap_in, swap_out
from cmd_plugin.kernels.update_affine import update_affine

__all__ = [
    "AffineFit",
    "FlatView",
    "Neighbours",
    "PointScores",
    "apply_embedding",
    "assign_and_fit",
    "coefficient_drift",
    "curve_walk",
    "entropy_parts",
    "farthest_point_sampling",
    "fold_gradients",
    "knn",
    "last_backend",
    "mahalanobis",
    "normalised_entropy",
    "point_importance",
    "reconstruct",
    "reconstruct_into",
    "select_smallest",
    "snapshot_delta",
    "swap_in",
    "swap_out",
    "update_affine",
]
