"""Memory-bound primitives: a folder each, with a reference, a fast CPU path and one function."""

if __name__ != "cmd_plugin.kernels":
    raise ImportError(
        f"this folder is the package 'cmd_plugin.kernels' but was imported as {__name__!r}: "
        "write 'from cmd_plugin.kernels import ...'."
    )

from cmd_plugin.kernels.apply_embedding import apply_embedding
from cmd_plugin.kernels.assign_and_fit import AffineFit, assign_and_fit
from cmd_plugin.kernels.coefficient_drift import coefficient_drift
from cmd_plugin.kernels.flat_view import FlatView
from cmd_plugin.kernels.fold_gradients import fold_gradients
from cmd_plugin.kernels.reconstruct import reconstruct, reconstruct_into
from cmd_plugin.kernels.select_smallest import select_smallest
from cmd_plugin.kernels.update_affine import update_affine

__all__ = [
    "AffineFit",
    "FlatView",
    "apply_embedding",
    "assign_and_fit",
    "coefficient_drift",
    "fold_gradients",
    "reconstruct",
    "reconstruct_into",
    "select_smallest",
    "update_affine",
]
