"""The door to images of any kind and size: :func:`read_images`."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from cmd_plugin.data.archives import is_archive, walk
from cmd_plugin.data.arrays import is_array, read_array
from cmd_plugin.data.collection import ImageSet, Listing
from cmd_plugin.data.files import ImageFile, is_image_name
from cmd_plugin.data.folder import (
    find_classes,
    held_out_part,
    inner_paths,
    refuse_empty_folders,
)
from cmd_plugin.data.limits import DEFAULT_LIMITS, ReadLimits
from cmd_plugin.data.order import natural_key
from cmd_plugin.errors import InputError

__all__ = ["read_images"]


def read_images(
    path: str | os.PathLike[str],
    size: int | tuple[int, int] | None = None,
    labelled: bool | None = None,
    *,
    skip_unreadable: bool = False,
    limits: ReadLimits = DEFAULT_LIMITS,
) -> ImageSet:
    """Read the images of a folder, an archive or an array file, in natural order of their names.

    Files end in `.jpg`, `.jpeg`, `.png`, `.bmp`, `.webp`, `.tif`, `.tiff`, `.pgm` or `.ppm` and
    become 8 bits a channel: 16-bit grey is scaled from its whole range, floats from [0, 1]; signed
    and 32-bit integers are refused. JPEG and WebP are turned upright as the camera noted. Hidden
    files and files of other kinds are passed over. Nothing is written, and links inside archives
    are not followed.

    Args:
        path: A folder (read with the folders in it), a tar archive (plain, gz, bz2 or xz), a zip
            archive, one image file, or an array file. An array (`.npy`; in `.npz` and
            `.safetensors` the one named `images` or `arr_0`, or the only one) has shape [N, H, W],
            [N, C, H, W] or [N, H, W, C] with C of 1 or 3, and is uint8, or float in [0, 1]; others
            are refused. Labels beside it are named `labels` or `arr_1`, shape [N], integers from 0.
        size: Height and width (or one number for both) to scale and centre-crop to. `None` keeps
            the size of each image.
        labelled: `True` requires a folder for each class (labels beside an array), `False` reads
            all images as one flat set. `None` finds out: a set is labelled if every image lies in a
            class folder and there are at least two (if there are labels beside an array).
        skip_unreadable: Leave out image files that cannot be read and list them in
            :attr:`ImageSet.skipped`, which costs decoding each file once; otherwise the first one
            is refused, larger sets being checked by their headers here and to the end when read.
        limits: Bounds on what is read.

    Raises:
        InputError: If there is nothing to read, a file is damaged or larger than the limits allow,
            the layout does not fit `labelled`, or the folder is split into training and held-out
            images and not read with `labelled=False`.
    """
    root = Path(path).expanduser()
    pair = (size, size) if isinstance(size, int) else size
    if pair is not None and min(pair) < 1:
        raise InputError(f"size must be at least 1 pixel, got {size}.")
    if not root.exists():
        raise InputError(f"{root} does not exist: pass a folder of images, an archive or an array.")
    if root.is_file() and is_array(root):
        return read_array(root, pair, labelled, limits)
    if not root.is_dir() and not (
        root.is_file() and (is_archive(root) or is_image_name(root.name))
    ):
        raise InputError(
            f"{root} is neither a folder, a tar or zip archive, an image nor an array file (.npy, "
            ".npz, .safetensors): pass one of them."
        )

    listing = Listing(limits, skip_unreadable)
    listing.extend(walk(root, limits))
    labels = [file.label for file in listing.files]
    listing = listing.select(sorted(range(len(labels)), key=lambda i: natural_key(labels[i])))
    if not listing.files:
        raise _nothing_left(root, listing)
    names = _class_names(root, listing.files, labelled)
    store, kept = listing.load(pair)
    if not kept:
        raise _nothing_left(root, listing)

    classes: tuple[str, ...] = ()
    if names is not None:
        classes = tuple(sorted({names[index] for index in kept}))
    number = {name: index for index, name in enumerate(classes)}
    return ImageSet(
        images=store,
        names=tuple(listing.files[index].label for index in kept),
        labels=None if names is None else torch.tensor([number[names[index]] for index in kept]),
        classes=classes,
        channels=listing.channels,
        size=pair or listing.size,
        skipped=tuple(listing.skipped),
    )


def _nothing_left(root: Path, listing: Listing) -> InputError:
    skipped = ""
    if listing.skipped:
        name, reason = listing.skipped[0]
        skipped = f" beside {len(listing.skipped)} skipped ({name} {reason})"
    return InputError(f"{root} holds no images{skipped}: pass another path.")


def _class_names(root: Path, files: list[ImageFile], labelled: bool | None) -> list[str] | None:
    """Class name of each file, or `None` for a flat set."""
    if labelled is False:
        return None
    held_out = held_out_part(inner_paths(root, files))
    if held_out is not None:
        raise InputError(
            f"{root} is split into train and {held_out}: pass one of the two folders, or read all "
            "images as one set with labelled=False."
        )
    try:
        _, names = find_classes(root, files)
    except InputError:
        if labelled:
            raise
        return None
    if labelled is None:
        return names if len(set(names)) > 1 else None
    refuse_empty_folders(root, files)
    return names
