"""The door to images of any kind and size."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from cmd_plugin.data import ImageSet, ReadLimits, read_images
from cmd_plugin.errors import InputError
from tests.helpers.image_files import encoded, noise, tiff, to_folder, to_tar, to_zip, tree

NUMBERED = {f"{number}.png": encoded(number) for number in (1, 2, 3, 10, 11, 100)}
SIZES = {f"{n}.png": noise(n, size=size) for n, size in ((1, (5, 9)), (2, (12, 4)), (3, (7, 7)))}


def brightness(found: ImageSet) -> list[int]:
    pixels = [found.images.read(torch.tensor([i]))[0, 0, 0, 0] for i in range(len(found.images))]
    return [round(float(pixel) * 255) for pixel in pixels]


def place(root: Path, files: dict[str, bytes], kind: str) -> Path:
    """The files in reversed order, as a folder or as an archive."""
    backwards = dict(reversed(files.items()))
    if kind == "folder":
        return to_folder(root / "x", backwards)
    if kind == "zip":
        return to_zip(root / "x.zip", backwards)
    return to_tar(root / "x.tar", backwards, kind)


KINDS = ["folder", "zip", "w", "w:gz", "w:bz2", "w:xz"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_flat_set_is_in_natural_order(tmp_path: Path, kind: str) -> None:
    root = place(tmp_path, NUMBERED, kind)
    for path in (root, str(root)):
        found = read_images(path)
        assert found.names == tuple(NUMBERED)
        assert brightness(found) == [1, 2, 3, 10, 11, 100]
        assert found.labels is None
        assert (found.classes, found.skipped) == ((), ())
        assert (found.channels, found.size) == (1, (4, 6))
        assert found.images.read(torch.arange(6)).shape == (6, 1, 4, 6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("memory", [1, 10_000])
def test_images_of_any_sizes_are_read_one_at_a_time(tmp_path: Path, kind: str, memory: int) -> None:
    path = place(tmp_path, SIZES, kind)
    limits = ReadLimits(memory_bytes=memory)
    if ":" in kind and memory == 1:
        with pytest.raises(InputError, match=r"compressed archive too large .*memory_bytes is 1\)"):
            read_images(path, limits=limits)
        return
    found = read_images(path, limits=limits)
    assert found.size is None
    assert found.channels == 3
    shapes = [tuple(found.images.read(torch.tensor([i])).shape) for i in range(3)]
    assert shapes == [(1, 3, 9, 5), (1, 3, 4, 12), (1, 3, 7, 7)]
    assert found.images.select(torch.tensor([2])).read(torch.tensor([0])).shape == (1, 3, 7, 7)
    with pytest.raises(InputError, match="pass an image size"):
        found.images.read(torch.tensor([0, 1]))
    at_once = read_images(path, size=6, limits=limits)
    assert at_once.size == (6, 6)
    assert at_once.images.read(torch.arange(3)).shape == (3, 3, 6, 6)


@pytest.mark.parametrize("memory", [1, 10_000])
def test_pixels_are_those_in_the_files_whether_held_or_not(tmp_path: Path, memory: int) -> None:
    values = np.random.default_rng(0).integers(0, 256, (3, 5, 4), dtype=np.uint8)
    files = {f"{n}.tif": tiff(values[n].tobytes(), (4, 5), 8) for n in range(3)}
    found = read_images(to_folder(tmp_path, files), limits=ReadLimits(memory_bytes=memory))
    assert found.images.in_memory == (memory > 1)
    read = found.images.read(torch.tensor([2, 0]))
    assert np.array_equal((read[:, 0] * 255).round().numpy(), values[[2, 0]])


def test_class_folders_are_found_out(tmp_path: Path) -> None:
    files = {"dog/2.png": encoded(2), "dog/10.png": encoded(3), "cat/deep/1.png": encoded(1)}
    root = to_folder(tmp_path / "x", files)
    for labelled in (None, True):
        found = read_images(root, labelled=labelled)
        assert found.names == ("cat/deep/1.png", "dog/2.png", "dog/10.png")
        assert found.classes == ("cat", "dog")
        assert found.labels is not None
        assert found.labels.dtype == torch.int64
        assert found.labels.tolist() == [0, 1, 1]
    flat = read_images(root, labelled=False)
    assert flat.names == found.names
    assert flat.labels is None
    assert flat.classes == ()


@pytest.mark.parametrize(
    "files",
    [
        {**tree(cat=1, dog=1), "0.png": encoded(0)},
        tree(cat=3),
        {"train/0.png": encoded(0)},
    ],
    ids=["an image beside them", "one folder", "one folder called train"],
)
def test_what_is_no_set_of_classes_is_flat_unless_classes_are_required(
    tmp_path: Path, files: dict[str, bytes]
) -> None:
    root = to_folder(tmp_path, files)
    found = read_images(root)
    assert found.labels is None
    assert len(found.names) == len(files)
    if len(files) == 3 and "cat/0.png" in files and "0.png" not in files:
        assert read_images(root, labelled=True).classes == ("cat",)
    else:
        with pytest.raises(InputError, match=r"0\.png lies in no class folder"):
            read_images(root, labelled=True)


def test_a_class_without_images_is_refused_where_classes_are_required(tmp_path: Path) -> None:
    root = to_folder(tmp_path, {**tree(cat=1, dog=1), "cow/notes.txt": b""})
    assert read_images(root).classes == ("cat", "dog")
    with pytest.raises(InputError, match="cow holds no images"):
        read_images(root, labelled=True)


@pytest.mark.parametrize("labelled", [None, True])
def test_a_split_collection_is_not_taken_for_two_classes(
    tmp_path: Path, labelled: bool | None
) -> None:
    files = tree(train_cat=1, train_dog=1, val_cat=1)
    for root in (to_folder(tmp_path / "x", files), to_tar(tmp_path / "x.tar", files, "w")):
        with pytest.raises(InputError, match="is split into train and val: pass one of the two"):
            read_images(root, labelled=labelled)
        assert len(read_images(root, labelled=False).names) == 3
    assert read_images(tmp_path / "x" / "train").classes == ("cat", "dog")


def test_a_single_image(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(noise(0, "JPEG"))
    found = read_images(tmp_path / "x.jpg")
    assert found.names == ("x.jpg",)
    assert found.images.read(torch.tensor([0])).shape == (1, 3, 20, 24)


@pytest.mark.parametrize("kind", ["folder", "zip", "w", "w:gz"])
@pytest.mark.parametrize("memory", [1, 10_000])
def test_unreadable_files_are_refused_or_listed(tmp_path: Path, kind: str, memory: int) -> None:
    limits = ReadLimits(memory_bytes=10_000 if ":" in kind else memory)
    files = {
        "a/1.png": encoded(1),
        "a/2.png": encoded(2)[:-30],  # the header is whole
        "a/10.png": encoded(10),
        "b/1.png": b"no image",
        "b/2.png": encoded(20),
        "c/1.png": b"",
    }
    root = place(tmp_path, files, kind)
    with pytest.raises(InputError, match=r"[abc]/\d\.png is not a readable image"):
        read_images(root, limits=limits)
    found = read_images(root, skip_unreadable=True, limits=limits)
    assert found.names == ("a/1.png", "a/10.png", "b/2.png")
    assert brightness(found) == [1, 10, 20]
    assert found.classes == ("a", "b")
    assert found.labels is not None
    assert found.labels.tolist() == [0, 0, 1]
    skipped = dict(found.skipped)
    assert sorted(skipped) == ["a/2.png", "b/1.png", "c/1.png"]
    assert all(reason.startswith("is not a readable image (") for reason in skipped.values())


def test_damage_behind_a_whole_header_is_refused_when_it_is_read(tmp_path: Path) -> None:
    files = {"1.png": encoded(1), "2.png": encoded(2)[:-30]}
    found = read_images(to_folder(tmp_path, files), limits=ReadLimits(memory_bytes=1))
    assert found.images.read(torch.tensor([0])).shape == (1, 1, 4, 6)
    with pytest.raises(InputError, match=r"2\.png is not a readable image"):
        found.images.read(torch.tensor([1]))


def test_a_pipe_is_refused_or_listed_but_not_waited_for(tmp_path: Path) -> None:
    root = to_folder(tmp_path, NUMBERED)
    os.mkfifo(root / "0.png")
    with pytest.raises(InputError, match=r"0\.png is not a regular file"):
        read_images(root)
    found = read_images(root, skip_unreadable=True)
    assert found.names == tuple(NUMBERED)
    assert [item.name for item in found.skipped] == ["0.png"]


def test_what_is_left_out_on_purpose_is_listed_without_being_asked(tmp_path: Path) -> None:
    root = to_folder(tmp_path, {**NUMBERED, "photo.heic": b""})
    (root / "again").symlink_to(root)
    found = read_images(root)
    assert found.names == tuple(NUMBERED)
    assert sorted(item.name for item in found.skipped) == ["again", "photo.heic"]


def test_a_grey_image_among_coloured_ones_is_repeated(tmp_path: Path) -> None:
    files = {"1.png": encoded(7), "2.png": encoded(9, "RGB")}
    for memory in (1, 1000):
        found = read_images(to_folder(tmp_path, files), limits=ReadLimits(memory_bytes=memory))
        pixels = (found.images.read(torch.arange(2))[:, :, 0, 0] * 255).round()
        assert pixels.tolist() == [[7, 7, 7], [9, 0, 0]]


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere does not exist: pass a folder of images"):
        read_images(tmp_path / "nowhere")
    (tmp_path / "x").mkdir()
    with pytest.raises(InputError, match="x holds no images: pass another path"):
        read_images(tmp_path / "x")
    for name in ("1.png", "2.png"):
        (tmp_path / "x" / name).write_bytes(b"")
    sentence = r"holds no images beside 2 skipped \(1\.png is not a readable image .*\): pass"
    with pytest.raises(InputError, match=sentence):
        read_images(tmp_path / "x", skip_unreadable=True)
    (tmp_path / "x.txt").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.tar")
    for path in (tmp_path / "x.txt", tmp_path / "pipe.tar", Path("/dev/zero")):
        with pytest.raises(InputError, match="is neither a folder, a tar or zip archive, an image"):
            read_images(path)


@pytest.mark.parametrize("size", [0, (4, 0), -1])
def test_a_size_of_nothing(tmp_path: Path, size: int | tuple[int, int]) -> None:
    with pytest.raises(InputError, match="size must be at least 1 pixel"):
        read_images(to_folder(tmp_path, NUMBERED), size=size)


def test_the_home_folder_may_be_written_as_a_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    to_folder(tmp_path / "x", NUMBERED)
    assert read_images("~/x").names == tuple(NUMBERED)
