"""Reading a labelled image collection whose folder names are the classes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cmd_plugin.data.files import (
    FileImages,
    ImageFile,
    Pixels,
    decode,
    find_archives,
    is_archive,
    size_mismatch,
    walk,
)
from cmd_plugin.data.images import ImageStore, MemoryImages
from cmd_plugin.errors import InputError

__all__ = ["FolderImages", "read_folder"]

MEMORY_LIMIT = 2 * 1024**3
"""Collections of at most this many decoded bytes are held in memory; larger ones stay on disk."""

HELD_OUT_NAMES = ("test", "val", "valid", "validation")


@dataclass(frozen=True)
class FolderImages:
    """A collection as it lies on disk.

    Attributes:
        images: All images, training ones first when the collection is split.
        labels: Class of each image, shape [N], int64.
        classes: Class names in label order.
        channels: 1 or 3.
        size: Height and width.
        held_out: Which images are the held-out set, shape [N], bool; `None` when the collection is
            one tree.
    """

    images: ImageStore
    labels: Tensor
    classes: tuple[str, ...]
    channels: int
    size: tuple[int, int]
    held_out: Tensor | None


def read_folder(
    root: Path, image_size: tuple[int, int] | None = None, memory_limit: int = MEMORY_LIMIT
) -> FolderImages:
    """Read a folder, a tar archive, or a folder with `train.tar*` and `test.tar*`.

    Inside, images lie as `train/CLASS/...` and `test/CLASS/...`, or as one tree `CLASS/...`. `val`,
    `valid` and `validation` are taken for the held-out set where there is no `test`.

    Args:
        root: The folder or archive.
        image_size: Height and width to scale and crop to; `None` requires that all images have one
            size.
        memory_limit: Decoded bytes above which images stay on disk.

    Raises:
        InputError: If nothing usable is there: a missing or empty folder, images without class
            folders, one class only, a class without images, damaged or differently sized images, or
            a compressed archive that is too large to be held in memory.
    """
    if not root.exists():
        raise InputError(
            f"{root} does not exist: pass a folder of images or a tar archive as --data-root."
        )
    if root.is_file() and not is_archive(root):
        raise InputError(
            f"{root} is neither a folder nor a tar archive: pass one of them as --data-root."
        )

    files, pixels = _decode_all(_walk_splits(root), image_size, memory_limit)
    if not files:
        raise InputError(
            f"{root} holds no images: expected CLASS/*.png, or train/CLASS/*.png and test/..."
        )
    roles, names = _layout(root, files)
    _refuse_empty_classes(root, names, split=any(role == "test" for role in roles))

    kept = [index for index, role in enumerate(roles) if role != "ignored"]
    classes = tuple(sorted({names[index] for index in kept if roles[index] != "test"}))
    if len(classes) < 2:
        raise InputError(
            f"{root} holds the single class {classes[0]!r}: put each class in a folder of its own."
        )
    number = {name: index for index, name in enumerate(classes)}
    for index in kept:
        if names[index] not in number:
            raise InputError(
                f"{files[index].name} is of a class that the training set does not have."
            )
    labels = torch.tensor([number[names[index]] for index in kept])
    held_out = torch.tensor([roles[index] == "test" for index in kept])

    store, channels, size = _store(root, files, pixels, kept, image_size)
    return FolderImages(
        store, labels, classes, channels, size, held_out if held_out.any() else None
    )


def _walk_splits(root: Path) -> Iterator[ImageFile]:
    archives = {} if root.is_file() else find_archives(root)
    held_out = next((name for name in HELD_OUT_NAMES if name in archives), None)
    if "train" in archives and held_out is not None:
        for role, path in (("train", archives["train"]), ("test", archives[held_out])):
            for file in walk(path):
                # Such archives may repeat the split's name inside, below a folder of their own.
                inner = file.parts
                for depth, part in enumerate(inner[:-2]):
                    if part in ("train", *HELD_OUT_NAMES):
                        inner = inner[depth + 1 :]
                        break
                yield replace(file, parts=(role, *inner))
        return
    yield from walk(root)


def _decode_all(
    found: Iterator[ImageFile], size: tuple[int, int] | None, memory_limit: int
) -> tuple[list[ImageFile], list[Pixels]]:
    """Decode until the limit is passed; what lies beyond is listed only."""
    files: list[ImageFile] = []
    pixels: list[Pixels] = []
    held = 0
    for file in found:
        files.append(replace(file, data=None))
        if held > memory_limit:
            continue
        pixels.append(decode(file, size))
        expected = size or pixels[0].shape[1:]
        if pixels[-1].shape[1:] != expected:
            raise size_mismatch(file, pixels[-1], (expected[0], expected[1]))
        held += pixels[-1].nbytes
    return files, pixels


def _layout(root: Path, files: list[ImageFile]) -> tuple[list[str], list[str]]:
    """Role ("train", "test", "ignored" or "" for one tree) and class name of each file."""
    paths = [file.parts for file in files]
    if root.is_file():
        # Archives often wrap everything in one folder named like the archive.
        while len({path[0] for path in paths}) == 1 and all(len(path) > 2 for path in paths):
            paths = [path[1:] for path in paths]
    top = {path[0] for path in paths if len(path) > 1}
    held_out = next((name for name in HELD_OUT_NAMES if name in top), None)
    roles = [""] * len(paths)
    if "train" in top and held_out is not None:
        known = {"train": "train", held_out: "test"}
        roles = [known.get(path[0], "ignored") for path in paths]
        paths = [path[1:] for path in paths]
    elif top == {"train"}:
        paths = [path[1:] for path in paths]
    names = []
    for file, role, path in zip(files, roles, paths, strict=True):
        if len(path) < 2 and role != "ignored":
            raise InputError(
                f"{file.name} lies in no class folder: put it in a folder named after its class."
            )
        names.append(path[0])
    return roles, names


def _refuse_empty_classes(root: Path, names: list[str], split: bool) -> None:
    if not root.is_dir() or find_archives(root):
        return
    seen = set(names)
    tops = [root / "train"] if split or set(_folders(root)) == {"train"} else [root]
    for top in tops:
        for name in _folders(top):
            if name not in seen:
                raise InputError(f"{top / name} holds no images: add some or remove the folder.")


def _folders(path: Path) -> list[str]:
    return sorted(
        p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith((".", "__MACOSX"))
    )


def _store(
    root: Path,
    files: list[ImageFile],
    pixels: list[Pixels],
    kept: list[int],
    image_size: tuple[int, int] | None,
) -> tuple[ImageStore, int, tuple[int, int]]:
    channels = max(len(image) for image in pixels)
    height, width = pixels[0].shape[1:]
    size = (height, width)
    if len(pixels) < len(files):
        if any(file.length > 0 and file.start is None for file in files):
            message = (
                f"{root} is a compressed archive too large for the memory: unpack it to a folder "
                "or decompress it to a plain .tar, which can be read in any order."
            )
            raise InputError(message)
        chosen = [files[index] for index in kept]
        return FileImages(chosen, channels, size, image_size is not None), channels, size
    stacked = np.empty((len(kept), channels, height, width), dtype=np.uint8)
    for row, index in enumerate(kept):
        stacked[row] = pixels[
            index
        ]  # a grey image among coloured ones is repeated over the channels
        pixels[index] = np.empty(0, dtype=np.uint8)  # so that the collection is not held twice
    return MemoryImages(torch.from_numpy(stacked)), channels, size
