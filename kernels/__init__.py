"""Memory-bound primitives: a folder each, with a reference, a fast CPU path and one function."""

if __name__ != "cmd_plugin.kernels":
    raise ImportError(
        f"this folder is the package 'cmd_plugin.kernels' but was imported as {__name__!r}: "
        "write 'from cmd_plugin.kernels import ...'."
    )

from cmd_plugin.kernels.assign_and_fit import AffineFit, assign_and_fit
from cmd_plugin.kernels.flat_view import FlatView
from cmd_plugin.kernels.point_importance import (
    PointScores,
    normalised_entropy,
    point_importance,
)
from cmd_plugin.kernels.reconstruct import reconstruct, reconstruct_into
from cmd_plugin.kernels.update_affine import update_affine

__all__ = [
    "AffineFit",
    "FlatView",
    "PointScores",
    "assign_and_fit",
    "normalised_entropy",
    "point_importance",
    "reconstruct",
    "reconstruct_into",
    "update_affine",
]
