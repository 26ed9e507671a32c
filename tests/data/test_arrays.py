"""Images in array files: layouts, values, labels, and what is refused."""

from __future__ import annotations

import io
import pickle
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cmd_plugin.data import ReadLimits, read_images
from cmd_plugin.errors import InputError, NonFiniteError, ShapeError

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), dtype=np.uint8)


def everything(path: Path, **options: Any) -> Tensor:
    found = read_images(path, **options)
    return found.images.read(torch.arange(len(found.names)))


def save(path: Path, array: np.ndarray, **others: np.ndarray) -> Path:
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".npz":
        np.savez_compressed(path, images=array, **others)
    else:
        arrays = {"images": array, **others}
        save_file({k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in arrays.items()}, path)
    return path


@pytest.mark.parametrize("ending", ["npy", "npz", "safetensors"])
@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32", "float64"])
def test_each_layout_gives_the_same_images(tmp_path: Path, ending: str, dtype: str) -> None:
    scaled = PIXELS if dtype == "uint8" else (PIXELS / 255).astype(dtype)
    expected = torch.from_numpy(scaled.astype(np.float32) / (255 if dtype == "uint8" else 1))
    path = tmp_path / f"x.{ending}"
    for array, channels in (
        (scaled, 3),
        (scaled.transpose(0, 3, 1, 2), 3),
        (np.asfortranarray(scaled), 3),
        (scaled[..., 0], 1),
        (scaled[..., :1], 1),
        (scaled[:, None, :, :, 0], 1),
    ):
        found = read_images(save(path, array))
        assert (found.channels, found.size, found.skipped) == (channels, (6, 7), ())
        assert found.names == ("0", "1", "2", "3", "4")
        assert found.labels is None
        read = found.images.read(torch.tensor([3, 0]))
        assert read.dtype == torch.float32
        assert read.is_contiguous()
        wanted = expected[[3, 0]].permute(0, 3, 1, 2)[:, :channels]
        torch.testing.assert_close(read, wanted, rtol=0, atol=1e-7)


def test_the_other_byte_order(tmp_path: Path) -> None:
    values = (PIXELS / 255).astype(np.float32)
    path = save(tmp_path / "x.npy", values.astype(">f4"))
    assert torch.equal(everything(path), torch.from_numpy(values).permute(0, 3, 1, 2))
    with pytest.raises(InputError, match="of foreign byte order and too large"):
        read_images(path, limits=ReadLimits(memory_bytes=100))


def test_bfloat16_images(tmp_path: Path) -> None:
    values = torch.rand(3, 1, 4, 4).bfloat16()
    save_file({"images": values}, tmp_path / "x.safetensors")
    assert torch.equal(everything(tmp_path / "x.safetensors"), values.float())


def test_a_size_scales_and_crops_the_middle(tmp_path: Path) -> None:
    array = np.zeros((2, 8, 20), dtype=np.uint8)
    array[:, :, 6:14] = 200
    found = read_images(save(tmp_path / "x.npy", array), size=4)
    assert found.size == (4, 4)
    read = found.images.read(torch.tensor([1]))
    assert read.shape == (1, 1, 4, 4)
    # The middle square is bright everywhere; stretching would have shown its dark sides.
    torch.testing.assert_close(read, torch.full_like(read, 200 / 255))


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_labels_beside_the_images(tmp_path: Path, ending: str) -> None:
    labels = np.array([2, 0, 0, 3, 2], dtype=np.int32)
    path = save(tmp_path / f"x.{ending}", PIXELS, labels=labels)
    for labelled in (None, True):
        found = read_images(path, labelled=labelled)
        assert found.labels is not None
        assert found.labels.dtype == torch.int64
        assert found.labels.tolist() == [2, 0, 0, 3, 2]
        assert found.classes == ("0", "1", "2", "3")
    flat = read_images(path, labelled=False)
    assert flat.labels is None
    assert flat.classes == ()


def test_arrays_without_names_are_images_and_labels_in_this_order(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", PIXELS, np.arange(5))
    assert read_images(tmp_path / "x.npz").classes == ("0", "1", "2", "3", "4")
    np.savez(tmp_path / "x.npz", faces=PIXELS)
    assert read_images(tmp_path / "x.npz").labels is None


def test_required_labels_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"x\.npy holds no labels"):
        read_images(save(tmp_path / "x.npy", PIXELS), labelled=True)


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (np.zeros(4, dtype=np.int64), r"of shape \[4\]: give one integer for each of the 5"),
        (np.zeros((5, 1), dtype=np.int64), r"of shape \[5, 1\]"),
        (np.zeros(5), r"are torch\.float64 of shape"),
        (np.array([0, 1, -1, 0, 0]), "run from -1 to 1: number classes from 0"),
        (np.array([0, 1, 2**40, 0, 0]), "run from 0 to 1099511627776"),
    ],
)
def test_unusable_labels(tmp_path: Path, labels: np.ndarray, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        read_images(save(tmp_path / "x.npz", PIXELS, labels=labels))


@pytest.mark.parametrize("ending", ["npy", "npz", "safetensors"])
@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (np.zeros((4, 5), np.uint8), r"has shape \[4, 5\]: give \[N, H, W\]"),
        (np.zeros((0, 5, 5), np.uint8), r"has shape \[0, 5, 5\]"),
        (np.zeros((2, 3, 5, 3), np.uint8), r"may have its channels first or last"),
        (np.zeros((2, 4, 5, 4), np.uint8), r"has no axis of channels"),
        (np.zeros((32, 40, 3), np.uint8), r"which looks like a single image"),
        (np.zeros((2, 5, 5), np.int16), r"are int16: give uint8, or floats in \[0, 1\]"),
        (np.zeros((2, 5, 5), np.int64), r"are int64: give uint8"),
    ],
)
def test_other_shapes_and_types_are_refused(
    tmp_path: Path, ending: str, array: np.ndarray, sentence: str
) -> None:
    with pytest.raises(ShapeError, match=sentence):
        read_images(save(tmp_path / f"x.{ending}", array))


@pytest.mark.parametrize("dtype", [np.bool_, np.complex64, "U3"])
def test_values_that_are_no_numbers_are_refused(tmp_path: Path, dtype: Any) -> None:
    with pytest.raises(ShapeError, match="holds values of type"):
        read_images(save(tmp_path / "x.npy", np.zeros((2, 5, 5), dtype)))


def test_eight_bit_floats_are_refused(tmp_path: Path) -> None:
    save_file({"images": torch.zeros(2, 5, 5).to(torch.float8_e4m3fn)}, tmp_path / "x.safetensors")
    with pytest.raises(ShapeError, match="are float8_e4m3fn: give uint8"):
        read_images(tmp_path / "x.safetensors")


def test_floats_outside_zero_to_one_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cmd_plugin.data import arrays

    monkeypatch.setattr(arrays, "_CHUNK_BYTES", 4 * 6 * 7 * 2)  # two images at a time
    values = np.full((5, 6, 7), 0.5, dtype=np.float32)
    values[4, 5, 6] = 1.5
    with pytest.raises(InputError, match=r"have values from 0\.5 to 1\.5: scale floats"):
        read_images(save(tmp_path / "x.npy", values))
    values[4, 5, 6] = -0.25
    with pytest.raises(InputError, match=r"have values from -0\.25 to 0\.5"):
        read_images(save(tmp_path / "x.npy", values))
    values[4, 5, 6] = np.nan
    with pytest.raises(NonFiniteError, match="hold NaN"):
        read_images(save(tmp_path / "x.npy", values))


def test_several_arrays_without_the_expected_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", train=PIXELS, test=PIXELS)
    with pytest.raises(InputError, match="no array named 'images', but test, train: rename one"):
        read_images(tmp_path / "x.npz")


def test_arrays_stay_on_the_disk(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (400, 100, 100), dtype=np.uint8)
    path = save(tmp_path / "x.npy", array)
    read_images(path)
    tracemalloc.start()
    found = read_images(path, limits=ReadLimits(memory_bytes=1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000
    last = (found.images.read(torch.tensor([399]))[0, 0] * 255).round()
    assert np.array_equal(last.numpy(), array[399])


def test_a_packed_array_above_the_memory_bound_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "x.npz", np.zeros((3000, 100, 100), np.uint8))
    assert path.stat().st_size < 100_000
    tracemalloc.start()
    sentence = r"holds 30000128 bytes of images, more than the 1000000 allowed: .*memory_bytes"
    with pytest.raises(InputError, match=sentence):
        read_images(path, limits=ReadLimits(memory_bytes=1_000_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500_000


def test_a_header_that_promises_more_than_there_is(tmp_path: Path) -> None:
    stream = io.BytesIO()
    np.save(stream, np.zeros((2, 5, 5), np.uint8))
    lie = stream.getvalue().replace(b"(2, 5, 5), }        ", b"(2000000, 5, 50000), }")
    lie = lie.replace(b"(2, 5, 5)", b"(9, 9, 9)")
    (tmp_path / "x.npy").write_bytes(lie)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("images.npy", lie)
    for name in ("x.npy", "x.npz"):
        with pytest.raises(InputError, match=f"{name} is not a readable array file"):
            read_images(tmp_path / name)


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was loaded",))


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    objects = np.empty(2, dtype=object)
    objects[:] = [Trap(), Trap()]
    np.save(tmp_path / "x.npy", objects)
    np.savez(tmp_path / "x.npz", images=objects)
    (tmp_path / "y.npy").write_bytes(pickle.dumps(Trap()))
    for name in ("x.npy", "x.npz", "y.npy"):
        with pytest.raises(InputError, match="is not a readable array file"):
            read_images(tmp_path / name)
