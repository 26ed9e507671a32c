"""Image files found in folders: only regular ones, each real folder once, in one order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cmd_plugin.data import ReadLimits
from cmd_plugin.data.archives import walk
from cmd_plugin.data.files import Found, ImageFile, Skipped, Unreadable
from cmd_plugin.data.limits import DEFAULT_LIMITS
from tests.helpers.image_files import encoded, to_folder, tree


def found(root: Path) -> tuple[list[str], list[Skipped], list[str]]:
    """Labels of the images, what was skipped, and sentences about the unreadable."""
    everything: list[Found] = list(walk(root, DEFAULT_LIMITS))
    return (
        [item.label for item in everything if isinstance(item, ImageFile)],
        [item for item in everything if isinstance(item, Skipped)],
        [str(item) for item in everything if isinstance(item, Unreadable)],
    )


def test_files_come_before_the_folders_beside_them_and_both_are_sorted(tmp_path: Path) -> None:
    names = ["b/2.png", "b/10.png", "b/a/1.png", "z.png", "a-1/x.png", "a/x.png", "a/b/c/y.JPG"]
    to_folder(tmp_path, dict.fromkeys(names, b""))
    expected = []
    for folder, folders, files in os.walk(tmp_path):
        folders.sort()
        expected += [str(Path(folder, name).relative_to(tmp_path)) for name in sorted(files)]
    assert found(tmp_path) == (expected, [], [])


def test_a_loop_of_links_does_not_multiply_images(tmp_path: Path) -> None:
    root = to_folder(tmp_path / "x", tree(a=1, b=1))
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "self").symlink_to("self")
    (root / "b" / "other").symlink_to(root / "a")
    files, skipped, unreadable = found(root)
    assert files == ["a/0.png", "b/0.png"]
    assert skipped == [
        Skipped("a/up", "is the folder . once more, which is read under that name"),
        Skipped("b/other", "is the folder a once more, which is read under that name"),
    ]
    assert unreadable == []


def test_links_to_folders_elsewhere_are_followed_once(tmp_path: Path) -> None:
    elsewhere = to_folder(tmp_path / "elsewhere", tree(deep=2))
    root = to_folder(tmp_path / "x", {"own/0.png": b""})
    (root / "link-1").symlink_to(elsewhere)
    (root / "link-2").symlink_to(elsewhere)
    files, skipped, _ = found(root)
    assert files == ["link-1/deep/0.png", "link-1/deep/1.png", "own/0.png"]
    assert [item.name for item in skipped] == ["link-2"]


def test_a_real_folder_keeps_its_name_though_a_link_to_it_sorts_first(tmp_path: Path) -> None:
    root = to_folder(tmp_path, tree(zebra=1))
    (root / "animal").symlink_to(root / "zebra")
    assert found(root)[0] == ["zebra/0.png"]


def test_a_pipe_a_device_and_a_broken_link_are_no_images(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "gone.png").symlink_to("nowhere")
    reasons = {}
    for item in walk(tmp_path, DEFAULT_LIMITS):
        assert isinstance(item, ImageFile)
        with pytest.raises(Unreadable) as caught:
            item.open(DEFAULT_LIMITS)
        assert str(caught.value).startswith(str(tmp_path / item.label))
        reasons.update([caught.value.skipped])
    assert reasons == {
        "gone.png": "cannot be read (No such file or directory)",
        "pipe.png": "is not a regular file (a pipe, socket or device)",
        "zero.png": "is not a regular file (a pipe, socket or device)",
    }


def test_hidden_files_are_passed_over_and_images_of_other_formats_are_named(tmp_path: Path) -> None:
    names = [".x.png", ".git/a.png", "__MACOSX/a.png", "notes.txt", "png", "photo.HEIC", "a.png"]
    files, skipped, _ = found(to_folder(tmp_path, dict.fromkeys(names, b"")))
    assert files == ["a.png"]
    assert skipped == [
        Skipped("photo.HEIC", "is of a format that is not read (.heic): convert it to PNG")
    ]


def test_a_folder_that_cannot_be_listed_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = to_folder(tmp_path, tree(a=1, locked=1))
    listed = os.scandir

    def refuse(path: Path) -> Iterator[os.DirEntry[str]]:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(os, "scandir", refuse)
    files, _, unreadable = found(root)
    assert files == ["a/0.png"]
    assert len(unreadable) == 1
    assert "locked cannot be listed (Permission denied)" in unreadable[0]


def test_a_name_that_is_not_text_can_be_written(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    Path(os.fsdecode(name)).write_bytes(encoded(1))
    (file,) = walk(tmp_path, DEFAULT_LIMITS)
    assert isinstance(file, ImageFile)
    assert file.label == "caf\\udce9.png"
    assert file.name.encode("utf-8").endswith(b"caf\\udce9.png")
    with file.open(DEFAULT_LIMITS) as stream:
        assert stream.read() == encoded(1)


def test_a_file_with_too_many_bytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "big.png"
    with path.open("wb") as stream:
        stream.truncate(3 * 1024**3)  # a hole: it takes no room on the disk
    (file,) = walk(tmp_path, DEFAULT_LIMITS)
    assert isinstance(file, ImageFile)
    with pytest.raises(
        Unreadable, match=r"big\.png has 3221225472 bytes, more than the 268435456 allowed"
    ):
        file.open(DEFAULT_LIMITS)
    path.write_bytes(encoded(1))
    size = len(encoded(1))
    with file.open(ReadLimits(file_bytes=size)) as stream:
        assert stream.read() == encoded(1)
    with pytest.raises(Unreadable, match=f"has {size} bytes, more than the {size - 1} allowed"):
        file.open(ReadLimits(file_bytes=size - 1))


def test_the_error_can_be_handed_on_by_the_worker_of_a_loader(tmp_path: Path) -> None:
    with pytest.raises(Unreadable) as caught:
        ImageFile(("x.png",), tmp_path / "x.png").open(DEFAULT_LIMITS)
    # torch makes the exception again from its type and its message.
    assert isinstance(type(caught.value)(str(caught.value)), Unreadable)
