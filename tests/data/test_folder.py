"""Image folders and archives, whole and damaged."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cmd_plugin.data import LabelledImages, ReadLimits, load_dataset, make_loader
from cmd_plugin.data.folder import read_folder
from cmd_plugin.errors import InputError
from tests.helpers.image_files import encoded, to_folder, to_tar, tree

SPLIT = {"train_cat": 3, "train_dog": 2, "test_cat": 1, "test_dog": 2}


def brightness(data: LabelledImages) -> list[int]:
    pixels = data.store.read(torch.arange(len(data)))
    return (pixels[:, 0, 0, 0] * 255).round().int().tolist()


def check_split(root: Path) -> None:
    data = load_dataset("folder", data_root=root)
    assert data.classes == ("cat", "dog")
    assert (data.channels, data.size) == (1, (4, 6))
    assert isinstance(data.train, LabelledImages)
    assert isinstance(data.test, LabelledImages)
    assert brightness(data.train) == [0, 1, 2, 0, 1]
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert brightness(data.test) == [0, 0, 1]
    assert data.test.labels.tolist() == [0, 1, 1]


def test_folder_with_a_split(tmp_path: Path) -> None:
    check_split(to_folder(tmp_path, tree(**SPLIT)))


@pytest.mark.parametrize("ending", ["w:gz", "w:bz2", "w:xz", "w"])
def test_one_archive_wrapped_in_a_folder(tmp_path: Path, ending: str) -> None:
    files = {f"./animals/{name}": data for name, data in tree(**SPLIT).items()}
    name = {"w:gz": "a.tar.gz", "w:bz2": "a.tar.bz2", "w:xz": "a.tar.xz", "w": "a.tar"}[ending]
    check_split(to_tar(tmp_path / name, files, ending))


@pytest.mark.parametrize("prefix", ["", "animals/"])
@pytest.mark.parametrize("held_out", ["test", "val"])
def test_an_archive_for_each_split(tmp_path: Path, held_out: str, prefix: str) -> None:
    files = tree(**SPLIT)
    for split, name in (("train", "train"), ("test", held_out)):
        chosen = {
            prefix + k.replace("test/", f"{held_out}/"): v
            for k, v in files.items()
            if k.startswith(split)
        }
        to_tar(tmp_path / f"{name}.tar.gz", chosen)
    check_split(tmp_path)


def test_archives_that_start_at_the_classes(tmp_path: Path) -> None:
    to_tar(tmp_path / "train.tgz", tree(cat=3, dog=2))
    to_tar(tmp_path / "test.tgz", tree(cat=1, dog=2))
    check_split(tmp_path)


def test_a_single_tree_gets_a_seeded_stratified_split(tmp_path: Path) -> None:
    root = to_folder(tmp_path, tree(cat=20, dog=10))
    data = load_dataset("folder", data_root=root, seed=5, test_fraction=0.3)
    again = load_dataset("folder", data_root=root, seed=5, test_fraction=0.3)
    assert isinstance(data.test, LabelledImages)
    assert isinstance(again.test, LabelledImages)
    assert torch.bincount(data.test.labels).tolist() == [6, 3]
    assert brightness(data.test) == brightness(again.test)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    found = read_folder(to_folder(tmp_path, tree(train=2, car=2, bus=2)))
    assert found.classes == ("bus", "car", "train")
    assert found.held_out is None


def test_members_that_point_outside_are_read_but_never_written(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    files = {"../../cat/0.png": encoded(1), "/dog/0.png": encoded(2), "dog/1.png": encoded(3)}
    path = to_tar(inside / "evil.tar", files, "w")
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("dog/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    found = read_folder(path)
    assert found.classes == ("cat", "dog")
    assert len(found.labels) == 3
    assert sorted(tmp_path.rglob("*")) == before


def test_grey_among_colour_is_repeated(tmp_path: Path) -> None:
    files = {"a/0.png": encoded(7), "b/0.png": encoded(9, "RGB")}
    found = read_folder(to_folder(tmp_path, files))
    assert found.channels == 3
    pixels = (found.images.read(torch.arange(2))[:, :, 0, 0] * 255).round().int()
    assert pixels.tolist() == [[7, 7, 7], [9, 0, 0]]


def test_sixteen_bit_grey_keeps_its_range(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((4, 4), 32_896, dtype=np.uint16)).save(tmp_path / name / "0.png")
    found = read_folder(tmp_path)
    assert (found.images.read(torch.tensor([0])) * 255).round().unique().tolist() == [128.0]


def test_different_sizes_need_an_image_size(tmp_path: Path) -> None:
    files = tree(a=1) | {"b/0.png": encoded(1, size=(9, 9))}
    root = to_folder(tmp_path, files)
    with pytest.raises(InputError, match=r"b/0\.png is 9x9 pixels but .* 6x4: .*--image-size"):
        read_folder(root)
    assert read_folder(root, (5, 5)).images.read(torch.arange(2)).shape == (2, 1, 5, 5)


@pytest.mark.parametrize("as_archive", [False, True])
def test_a_collection_above_the_memory_limit_stays_on_disk(
    tmp_path: Path, as_archive: bool
) -> None:
    files = tree(cat=5, dog=4)
    root = to_folder(tmp_path / "x", files)
    if as_archive:
        root = to_tar(tmp_path / "x.tar", files, "w")
    held = read_folder(root)
    streamed = read_folder(root, limits=ReadLimits(memory_bytes=50))
    assert held.images.in_memory
    assert not streamed.images.in_memory
    everything = torch.arange(9)
    assert torch.equal(held.images.read(everything), streamed.images.read(everything))
    chosen = torch.tensor([7, 2])
    assert torch.equal(
        streamed.images.select(chosen).read(torch.tensor([0, 1])), held.images.read(chosen)
    )


def test_a_compressed_archive_above_the_memory_limit(tmp_path: Path) -> None:
    path = to_tar(tmp_path / "x.tar.gz", tree(cat=5, dog=4))
    with pytest.raises(InputError, match="compressed archive too large"):
        read_folder(path, limits=ReadLimits(memory_bytes=50))


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    files = tree(cat=2, dog=2)
    files["dog/1.png"] = files["dog/1.png"][:40]
    with pytest.raises(InputError, match=r"dog/1\.png is not a readable image"):
        read_folder(to_folder(tmp_path / "folder", files))
    with pytest.raises(InputError, match=r"x\.tar\.gz:dog/1\.png is not a readable image"):
        read_folder(to_tar(tmp_path / "x.tar.gz", files))


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tar", "x.tar.xz", "x.tar.bz2"])
def test_a_damaged_archive_is_named(tmp_path: Path, name: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 40), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "PNG")
    files = {f"{c}/{i}.png": stream.getvalue() for c in "ab" for i in range(4)}
    path = to_tar(
        tmp_path / name,
        files,
        {"gz": "w:gz", "tar": "w", "xz": "w:xz", "bz2": "w:bz2"}[name.rsplit(".", 1)[1]],
    )
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 4 // 10])
    with pytest.raises(InputError, match=f"{name} is not a readable tar archive"):
        read_folder(path)
    path.write_bytes(b"something else")
    with pytest.raises(InputError, match=f"{name} is not a readable tar archive"):
        read_folder(path)


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "holds no images"),
        ({"a/notes.txt": b"hello"}, "holds no images"),
        (tree(cat=3), "holds the single class 'cat'"),
        (tree(train_cat=3, test_cat=1), "holds the single class 'cat'"),
        ({"0.png": encoded(0), **tree(cat=1, dog=1)}, r"0\.png lies in no class folder"),
        (
            tree(**SPLIT, test_cow=1),
            r"cow/0\.png is of a class that the training set does not have",
        ),
        ({"cow/readme.md": b"", **tree(cat=2, dog=2)}, "cow holds no images"),
        ({"train/cow/x.md": b"", **tree(**SPLIT)}, "cow holds no images"),
        ({"test/x.md": b"", **tree(train_cat=2, train_dog=2)}, "test holds no images"),
    ],
)
def test_unusable_collections(tmp_path: Path, files: dict[str, bytes], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        read_folder(to_folder(tmp_path, files))


def test_images_beside_the_two_parts_of_a_split_are_listed(tmp_path: Path) -> None:
    files = {**tree(**SPLIT, extra_cat=1), "logo.png": encoded(0)}
    found = read_folder(to_folder(tmp_path, files))
    assert len(found.names) == 8
    assert [item.name for item in found.skipped] == ["logo.png", "extra/cat/0.png"]
    assert {item.reason for item in found.skipped} == {"lies in neither part of the split"}


def test_workers_of_a_loader_read_what_is_not_held(tmp_path: Path) -> None:
    path = to_tar(tmp_path / "x.tar", tree(cat=5, dog=4), "w")
    data = load_dataset("folder", data_root=path, limits=ReadLimits(memory_bytes=50))
    assert isinstance(data.train, LabelledImages)
    expected = [data.train[index][0] for index in range(len(data.train))]
    read = torch.cat([images for images, _ in make_loader(data.train, 3)])
    assert torch.equal(read, torch.stack(expected))


def test_a_path_that_is_neither(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_folder(tmp_path / "nothing")
    (tmp_path / "x.zip").write_bytes(b"")
    with pytest.raises(InputError, match="neither a folder nor a tar archive"):
        read_folder(tmp_path / "x.zip")
