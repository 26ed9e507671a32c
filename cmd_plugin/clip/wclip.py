"""The whitening matrices that the authors of Whitened CLIP published."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor

from cmd_plugin.clip.whitening import Whitening
from cmd_plugin.errors import InputError

__all__ = ["import_wclip"]


def import_wclip(mean_path: str | Path, matrix_path: str | Path) -> Whitening:
    """Read a published mean and matrix, ``mean_*.pt`` and ``w_mat_*.pt``; nothing is executed.

    Rows are whitened as y = (x - mean) @ matrix, whose columns are eigenvectors divided by standard
    deviations. Some columns of the published text matrix are equal (they were conjugate pairs of an
    eigensolver for general matrices), so that its rank is below the number of features: it scores
    rows as published, and :meth:`Whitening.inverse` refuses. The rows of the fit are unknown, so
    that there are no leave-one-out scores; :meth:`Whitening.calibrate` takes rows held out.

    Args:
        mean_path: File with the mean, d numbers.
        matrix_path: File with the matrix, [d, d].

    Raises:
        InputError: If a file is missing, holds something else, or the two do not fit.
    """
    mean, matrix = _read(mean_path).reshape(-1), _read(matrix_path)
    dim = len(mean)
    if matrix.shape != (dim, dim):
        raise InputError(
            f"{matrix_path} holds {tuple(matrix.shape)} numbers and {mean_path} {dim}: they are "
            "not of one whitening."
        )
    length = torch.linalg.vector_norm(matrix, dim=0)
    if bool((length == 0).any()):
        raise InputError(f"{matrix_path} has a column of zeros: it is no whitening matrix.")
    order = length.argsort()
    vectors, variances = (matrix / length)[:, order], length[order].pow(-2)
    # Of the directions, not of the matrix: their lengths differ by four orders of magnitude. The
    # numbers are float32's.
    spread = torch.linalg.svdvals(vectors)
    told_apart = spread > dim * torch.finfo(torch.float32).eps * spread[0]
    return Whitening(
        mean=mean,
        vectors=vectors,
        variances=variances,
        eigenvalues=variances.clone(),
        rank=int(told_apart.sum()),
    )


def _read(path: str | Path) -> Tensor:
    if not Path(path).is_file():
        raise InputError(f"there is no file {path}: check the path.")
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise InputError(f"{path} is not a file of one tensor ({error}).") from error
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() == 0:
        raise InputError(f"{path} does not hold a floating-point tensor.")
    if not bool(value.isfinite().all()):
        raise InputError(f"{path} holds NaN or infinite values.")
    return value.detach().double()
