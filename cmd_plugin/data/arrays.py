"""Images in array files: `.npy`, `.npz` and `.safetensors`."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmd_plugin.data.collection import ImageSet
from cmd_plugin.data.files import explain
from cmd_plugin.data.images import MemoryImages
from cmd_plugin.data.limits import ReadLimits
from cmd_plugin.data.npy import read_npy
from cmd_plugin.errors import InputError, NonFiniteError, ShapeError

__all__ = ["is_array", "read_array"]

_ENDINGS = (".npy", ".npz", ".safetensors")
_IMAGES = ("images", "arr_0")
_LABELS = ("labels", "arr_1")  # numpy.savez(path, images, labels) names them arr_0 and arr_1
_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
_HIGHEST_LABEL = 99_999
_CHUNK_BYTES = 64 * 1024**2
_ANY_KIND = "fiubcSUV"  # of which the wrong ones are refused by name afterwards


def is_array(path: Path) -> bool:
    """Whether the name is that of an array file."""
    return path.suffix.lower() in _ENDINGS


def read_array(
    path: Path, size: tuple[int, int] | None, labelled: bool | None, limits: ReadLimits
) -> ImageSet:
    """Read images from an array file; see :func:`cmd_plugin.data.read_images`.

    `.npy` and `.safetensors` stay on disk, mapped into memory; `.npz` is held.

    Args:
        path: The file.
        size: Height and width to scale and centre-crop to; `None` keeps the size.
        labelled: Whether labels are required (`True`), not looked at (`False`) or taken where there
            are some (`None`).
        limits: Bounds on what is read.

    Raises:
        ShapeError: If the array has another shape or dtype.
        NonFiniteError: If it holds NaN.
        InputError: If the file is damaged or holds no such array, values lie outside [0, 1], or
            labels are missing or of another kind.
    """
    try:
        images, labels = _READERS[path.suffix.lower()](path, limits)
    except InputError:
        raise
    except Exception as error:  # damaged files end in almost any exception
        raise InputError(
            f"{path} is not a readable array file ({explain(error)}): make or copy it again."
        ) from error

    pixels = _arrange(images, path)
    _check_values(pixels, path)
    classes: tuple[str, ...] = ()
    if labelled and labels is None:
        raise InputError(f"{path} holds no labels: add them as an array named 'labels'.")
    if labelled is False:
        labels = None
    if labels is not None:
        labels = _check_labels(labels, len(pixels), path)
        classes = tuple(str(value) for value in range(int(labels.max()) + 1))
    if size is not None:
        pixels = _crop_to_aspect(pixels, size)
    return ImageSet(
        images=MemoryImages(pixels, size),
        names=tuple(str(index) for index in range(len(pixels))),
        labels=labels,
        classes=classes,
        channels=pixels.shape[1],
        size=size or (pixels.shape[2], pixels.shape[3]),
        skipped=(),
    )


def _read_npy(path: Path, limits: ReadLimits) -> tuple[Tensor, Tensor | None]:
    # Copy on write: torch takes no memory that cannot be written.
    mapped = np.lib.format.open_memmap(path, mode="c")
    return _to_tensor(mapped, path, limits), None


def _read_npz(path: Path, limits: ReadLimits) -> tuple[Tensor, Tensor | None]:
    with zipfile.ZipFile(path) as archive:
        members = {m.filename.removesuffix(".npy"): m for m in archive.infolist()}
        found: dict[str, Tensor] = {}
        for name in _choose(list(members), path):
            member = members[name]
            if member.file_size > limits.memory_bytes:
                raise InputError(
                    f"{path} holds {member.file_size} bytes of {name}, more than the "
                    f"{limits.memory_bytes} allowed: save it as .npy, which is read piece by "
                    "piece, or raise ReadLimits.memory_bytes."
                )
            with archive.open(member) as stream:
                array = read_npy(stream, member.file_size, kinds=_ANY_KIND)
            found[name] = _to_tensor(array, path, limits)
    return _images_and_labels(found)


def _read_safetensors(path: Path, limits: ReadLimits) -> tuple[Tensor, Tensor | None]:
    del limits  # the file is mapped, and holds no more than its length
    from safetensors import safe_open

    with safe_open(path, framework="pt", device="cpu") as file:
        names = _choose(list(file.keys()), path)
        return _images_and_labels({name: file.get_tensor(name) for name in names})


_READERS = {".npy": _read_npy, ".npz": _read_npz, ".safetensors": _read_safetensors}


def _choose(names: list[str], path: Path) -> list[str]:
    images = next((name for name in _IMAGES if name in names), None)
    if images is None and len(names) == 1:
        return names
    if images is None:
        listed = ", ".join(sorted(names)) or "nothing"
        raise InputError(f"{path} holds no array named 'images', but {listed}: rename one.")
    labels = next((name for name in _LABELS if name in names), None)
    return [images] if labels is None else [images, labels]


def _images_and_labels(found: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    images, *labels = found.values()
    return images, labels[0] if labels else None


def _to_tensor(array: NDArray[Any], path: Path, limits: ReadLimits) -> Tensor:
    if array.dtype.kind not in "fiu":
        raise ShapeError(f"{path} holds values of type {array.dtype}: give uint8 or floats.")
    if not array.dtype.isnative:
        if array.nbytes > limits.memory_bytes:
            raise InputError(f"{path} is of foreign byte order and too large: save it again.")
        array = array.astype(array.dtype.newbyteorder("="))
    return torch.from_numpy(array)


def _arrange(images: Tensor, path: Path) -> Tensor:
    """The same values as [N, C, H, W]."""
    shape = list(images.shape)
    advice = "give [N, H, W], [N, C, H, W] or [N, H, W, C] with 1 or 3 channels"
    if images.dtype not in _DTYPES:
        dtype = str(images.dtype).removeprefix("torch.")
        raise ShapeError(f"the images in {path} are {dtype}: give uint8, or floats in [0, 1].")
    if images.ndim not in (3, 4) or 0 in shape:
        raise ShapeError(f"the array in {path} has shape {shape}: {advice}.")
    if images.ndim == 3:
        if shape[2] in (1, 3, 4):
            raise ShapeError(
                f"the array in {path} has shape {shape}, which looks like a single image: {advice}."
            )
        return images[:, None]
    first, last = shape[1] in (1, 3), shape[3] in (1, 3)
    if first == last:
        state = "may have its channels first or last" if first else "has no axis of channels"
        raise ShapeError(f"the array in {path} has shape {shape} and {state}: {advice}.")
    return images if first else images.permute(0, 3, 1, 2)


def _check_values(pixels: Tensor, path: Path) -> None:
    if not pixels.dtype.is_floating_point:
        return
    rows = max(1, _CHUNK_BYTES // (pixels[0].numel() * pixels.element_size()))
    for start in range(0, len(pixels), rows):
        low, high = (float(value) for value in pixels[start : start + rows].aminmax())
        if math.isnan(low):
            raise NonFiniteError(f"the images in {path} hold NaN: replace them by numbers.")
        if low < 0.0 or high > 1.0:
            raise InputError(
                f"the images in {path} have values from {low:g} to {high:g}: scale floats to "
                "[0, 1], or save uint8."
            )


def _check_labels(labels: Tensor, count: int, path: Path) -> Tensor:
    integers = not labels.dtype.is_floating_point and labels.dtype != torch.bool
    if not integers or tuple(labels.shape) != (count,):
        raise ShapeError(
            f"the labels in {path} are {labels.dtype} of shape {list(labels.shape)}: give one "
            f"integer for each of the {count} images."
        )
    labels = labels.to(torch.int64)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high > _HIGHEST_LABEL:
        raise InputError(
            f"the labels in {path} run from {low} to {high}: number classes from 0, to at most "
            f"{_HIGHEST_LABEL}."
        )
    return labels


def _crop_to_aspect(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """The largest centred part with the proportions of `size`; a view."""
    height, width = pixels.shape[-2:]
    scale = max(size[0] / height, size[1] / width)
    kept = (max(1, round(size[0] / scale)), max(1, round(size[1] / scale)))
    top, left = (height - kept[0]) // 2, (width - kept[1]) // 2
    return pixels[..., top : top + kept[0], left : left + kept[1]]
