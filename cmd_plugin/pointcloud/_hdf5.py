"""Labelled clouds in one HDF5 file: datasets ``data`` and ``label``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmd_plugin.data.files import explain
from cmd_plugin.errors import InputError, require

__all__ = ["read_hdf5"]

Array = NDArray[Any]

_HIGHEST_LABEL = 99_999
# No filter of HDF5 packs tighter; a file that says more would be filled with values it lacks.
_DENSEST = 1_200


def read_hdf5(path: Path, points: int | None) -> tuple[Array, Array]:
    """Read clouds [S, N, 3] float32 and labels [S] int64.

    Args:
        path: The file.
        points: Take the first so many points of each cloud.

    Raises:
        InputError: If the file is missing, damaged, or does not hold clouds and their labels.
        MissingDependency: If h5py is not installed.
    """
    h5py = require("h5py", "points")
    try:
        with h5py.File(path, "r") as file:
            if not {"data", "label"} <= set(file):
                raise InputError(
                    f"{path} holds {', '.join(sorted(file)) or 'nothing'}, but the datasets data "
                    "and label are needed."
                )
            data, label = file["data"], file["label"]
            for name, entry in (("data", data), ("label", label)):
                if not isinstance(entry, h5py.Dataset) or entry.shape is None:
                    raise InputError(f"{path}: {name} is no dataset with values: make it again.")
                if math.prod(entry.shape) * entry.dtype.itemsize > _DENSEST * path.stat().st_size:
                    raise InputError(
                        f"{path}: {name} says more than the file holds: copy it again."
                    )
            if (
                data.ndim != 3
                or data.shape[2] < 3
                or 0 in data.shape
                or data.dtype.kind not in "fiu"
            ):
                raise InputError(
                    f"{path}: data is {data.shape} of {data.dtype}, not numbers [S, N, 3]."
                )
            with np.errstate(all="ignore"):  # what float32 cannot hold is refused as infinite
                clouds = np.asarray(data[:, :points, :3], dtype=np.float32)
            return clouds, _labels(path, np.asarray(label[()]), len(clouds))
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path} cannot be read ({explain(error)}): check the path.") from error
    except Exception as error:  # damaged files end in key, type, runtime and memory errors alike
        raise InputError(
            f"{path} cannot be read ({explain(error)}): make or copy it again."
        ) from error


def _labels(path: Path, values: Array, clouds: int) -> Array:
    if values.dtype.kind not in "fiu" or values.size != clouds:
        raise InputError(
            f"{path}: label is {values.shape} of {values.dtype}, not one whole number for each of "
            f"{clouds} clouds."
        )
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= _HIGHEST_LABEL):
        raise InputError(
            f"{path}: labels run from {low:g} to {high:g}: number classes from 0, to at most "
            f"{_HIGHEST_LABEL}."
        )
    whole: Array = values.astype(np.int64).reshape(-1)
    if (whole != values.reshape(-1)).any():
        raise InputError(f"{path}: a label is not a whole number: number classes from 0.")
    return whole
