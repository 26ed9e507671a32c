"""Class folders: a labelled image collection, whole or split into training and held-out images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from cmd_plugin.data.archives import find_archives, is_archive, walk
from cmd_plugin.data.collection import ImageSet, Listing
from cmd_plugin.data.files import Found, ImageFile, Skipped
from cmd_plugin.data.limits import DEFAULT_LIMITS, ReadLimits
from cmd_plugin.errors import InputError

__all__ = [
    "FolderImages",
    "find_classes",
    "held_out_part",
    "inner_paths",
    "read_folder",
    "refuse_empty_folders",
]

HELD_OUT_NAMES = ("test", "val", "valid", "validation")


@dataclass(frozen=True)
class FolderImages(ImageSet):
    """A labelled collection as it lies on disk, training images first when it is split.

    Attributes:
        labels: Class of each image, shape [N], int64.
        held_out: Which images are the held-out set, shape [N], bool; `None` when the collection is
            one tree.
    """

    labels: Tensor
    held_out: Tensor | None


def read_folder(
    root: Path, image_size: tuple[int, int] | None = None, limits: ReadLimits = DEFAULT_LIMITS
) -> FolderImages:
    """Read a folder, an archive, or a folder with `train.tar*` and `test.tar*` (or `.zip`).

    Inside, images lie as `train/CLASS/...` and `test/CLASS/...`, or as one tree `CLASS/...`. `val`,
    `valid` and `validation` are taken for the held-out set where there is no `test`. They keep the
    order in which they lie: sorted by name in a folder, one after the other in an archive.

    Args:
        root: The folder or archive.
        image_size: Height and width to scale and crop to; `None` requires that all images have one
            size.
        limits: Bounds on what is read.

    Raises:
        InputError: If nothing usable is there: a missing or empty folder, images without class
            folders, one class only, a class without images, damaged or differently sized images,
            or something larger than the limits allow.
    """
    if not root.exists():
        raise InputError(
            f"{root} does not exist: pass a folder of images or an archive as --data-root."
        )
    if not root.is_dir() and not (root.is_file() and is_archive(root)):
        raise InputError(
            f"{root} is neither a folder nor a tar archive nor a zip archive: pass one of them as "
            "--data-root."
        )

    listing = Listing(limits)
    listing.extend(_walk_splits(root, limits))
    if not listing.files:
        raise InputError(
            f"{root} holds no images: expected CLASS/*.png, or train/CLASS/*.png and test/..."
        )
    if image_size is None:
        listing.refuse_different_sizes()
    roles, names = find_classes(root, listing.files)
    refuse_empty_folders(root, listing.files)

    kept = [index for index, role in enumerate(roles) if role != "ignored"]
    for file, role in zip(listing.files, roles, strict=True):
        if role == "ignored":
            listing.skipped.append(Skipped(file.label, "lies in neither part of the split"))
    classes = tuple(sorted({names[index] for index in kept if roles[index] != "test"}))
    if len(classes) < 2:
        raise InputError(
            f"{root} holds the single class {classes[0]!r}: put each class in a folder of its own."
        )
    number = {name: index for index, name in enumerate(classes)}
    for index in kept:
        if names[index] not in number:
            raise InputError(
                f"{listing.files[index].name} is of a class that the training set does not have."
            )
    held_out = torch.tensor([roles[index] == "test" for index in kept])

    chosen = listing.select(kept)
    store, _ = chosen.load(image_size)
    return FolderImages(
        images=store,
        names=tuple(file.label for file in chosen.files),
        labels=torch.tensor([number[names[index]] for index in kept]),
        classes=classes,
        channels=chosen.channels,
        size=image_size or chosen.size,
        skipped=tuple(listing.skipped),
        held_out=held_out if held_out.any() else None,
    )


def _walk_splits(root: Path, limits: ReadLimits) -> Iterator[Found]:
    archives = {} if root.is_file() else find_archives(root)
    held_out = next((name for name in HELD_OUT_NAMES if name in archives), None)
    if "train" not in archives or held_out is None:
        yield from walk(root, limits)
        return
    for role, path in (("train", archives["train"]), ("test", archives[held_out])):
        for file in walk(path, limits):
            if not isinstance(file, ImageFile):
                yield file
                continue
            # Such archives may repeat the split's name inside, below a folder of their own.
            inner = file.parts
            for depth, part in enumerate(inner[:-2]):
                if part in ("train", *HELD_OUT_NAMES):
                    inner = inner[depth + 1 :]
                    break
            yield replace(file, parts=(role, *inner))


def inner_paths(root: Path, files: list[ImageFile]) -> list[tuple[str, ...]]:
    """Path of each file, without folders that an archive wraps around everything."""
    paths = [file.parts for file in files]
    if root.is_file():
        while len({path[0] for path in paths}) == 1 and all(len(path) > 2 for path in paths):
            paths = [path[1:] for path in paths]
    return paths


def held_out_part(paths: list[tuple[str, ...]]) -> str | None:
    """Name of the folder of held-out images; `None` where the collection is not split."""
    top = {path[0] for path in paths if len(path) > 1}
    return next((name for name in HELD_OUT_NAMES if name in top and "train" in top), None)


def find_classes(root: Path, files: list[ImageFile]) -> tuple[list[str], list[str]]:
    """Role ("train", "test", "ignored" or "" for one tree) and class name of each file.

    Raises:
        InputError: If an image lies in no class folder.
    """
    paths = inner_paths(root, files)
    held_out = held_out_part(paths)
    roles = [""] * len(paths)
    if held_out is not None:
        known = {"train": "train", held_out: "test"}
        roles = [known.get(path[0], "ignored") for path in paths]
        paths = [path[1:] for path in paths]
    elif {path[0] for path in paths if len(path) > 1} == {"train"}:
        paths = [path[1:] for path in paths]
    names = []
    for file, role, path in zip(files, roles, paths, strict=True):
        if len(path) < 2 and role != "ignored":
            raise InputError(
                f"{file.name} lies in no class folder: put it in a folder named after its class."
            )
        names.append(path[0] if path else "")
    return roles, names


def refuse_empty_folders(root: Path, files: list[ImageFile]) -> None:
    """Refuse a class folder, or a part of a split, in which no image was found.

    Raises:
        InputError: If there is such a folder; archives have none that matter.
    """
    if not root.is_dir() or find_archives(root):
        return
    paths = [file.parts for file in files]
    split = held_out_part(paths) is not None
    levels: list[tuple[str, ...]] = [] if split else [()]
    if split or {path[0] for path in paths} == {"train"}:
        levels.append(("train",))
    for level in levels:
        depth = len(level)
        filled = {path[depth] for path in paths if path[:depth] == level}
        folder = root.joinpath(*level)
        for name in _folders(folder):
            if name not in filled:
                raise InputError(f"{folder / name} holds no images: add some or remove the folder.")


def _folders(path: Path) -> list[str]:
    return sorted(
        p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith((".", "__MACOSX"))
    )
