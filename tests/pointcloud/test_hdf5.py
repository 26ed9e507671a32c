"""Labelled clouds in HDF5: what cannot be clouds and labels is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmd_plugin.errors import InputError
from cmd_plugin.pointcloud.files import load_hdf5
from tests.helpers.sentences import assert_one_sentence

h5py = pytest.importorskip("h5py")
CLOUDS = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)


def write(folder: Path, data: Any, label: Any) -> Path:
    path = folder / "a.h5"
    with h5py.File(path, "w") as file:
        for name, content in (("data", data), ("label", label)):
            if isinstance(content, str):
                file.create_group(name)
            else:
                file[name] = content
    return path


@pytest.mark.parametrize(
    ("data", "label", "why"),
    [
        ("group", [0, 1], "data is no dataset"),
        (CLOUDS.tolist(), "group", "label is no dataset"),
        (h5py.Empty("f4"), [0, 1], "data is no dataset"),
        (CLOUDS.tolist(), h5py.Empty("i4"), "label is no dataset"),
        (np.zeros((0, 5, 3)), np.zeros(0, np.int64), "data is"),
        (CLOUDS.tolist(), ["chair", "bed"], "label is"),
        (CLOUDS.tolist(), [0, 1.7], "not a whole number"),
        (CLOUDS.tolist(), [0, float("nan")], "labels run from"),
        (CLOUDS.tolist(), [0, 10**9], "labels run from 0 to 1e+09"),
        (CLOUDS.tolist(), [0, -1], "labels run from -1"),
        (CLOUDS.tolist(), np.array([0, 2**64 - 1], np.uint64).tolist(), "labels run"),
        (CLOUDS.tolist(), [0, 1, 2], "for each of 2 clouds"),
        ((CLOUDS + 1j).tolist(), [0, 1], "not numbers"),
    ],
)
def test_what_is_no_set_of_clouds_is_refused(
    data: Any, label: Any, why: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        load_hdf5([write(tmp_path, data, label)])
    assert_one_sentence(caught.value, "a.h5", why)


def test_whole_labels_may_be_saved_as_floats(tmp_path: Path) -> None:
    assert load_hdf5([write(tmp_path, CLOUDS.tolist(), [1.0, 0.0])]).labels.tolist() == [1, 0]


def test_a_set_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["label"] = [0]
        file.create_dataset("data", shape=(10**5, 10**4, 3), dtype="f4", chunks=(1, 10, 3))
    with pytest.raises(InputError) as caught:
        load_hdf5([path])
    assert_one_sentence(caught.value, "data says more than the file holds")


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "shape_names.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError) as caught:
        load_hdf5([write(tmp_path, CLOUDS.tolist(), [0, 1])])
    assert_one_sentence(caught.value, "shape_names.txt")
