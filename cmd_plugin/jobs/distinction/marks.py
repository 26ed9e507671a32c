"""What a user has marked in images: masks of pixels, or a table of boxes."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import torch
from torch import Tensor

from cmd_plugin.data import ImageSet, read_images
from cmd_plugin.distinction.masks import boxes_to_mask
from cmd_plugin.errors import InputError

__all__ = ["read_marks"]

_COLUMNS = ("image", "left", "top", "right", "bottom")

Box = tuple[float, float, float, float]


def read_marks(
    path: Path, images: Path, names: tuple[str, ...], size: tuple[int, int]
) -> tuple[Tensor, int]:
    """Read what is marked in images, scaled and cropped as they were.

    Args:
        path: A folder or archive of masks with the images' names, or a table ``.csv`` of boxes: the
            columns image, left, top, right and bottom, in pixels of the image as it lies there.
        images: Where the images lie.
        names: Which of them.
        size: Height and width that they were brought to.

    Returns:
        [N, H, W] bool, and in how many of them something is marked.

    Raises:
        InputError: If it cannot be read, a mask is missing, or there is no box for any image.
    """
    marked = (
        _boxes(path, images, names, size)
        if path.suffix.lower() == ".csv"
        else _masks(path, names, size)
    )
    return marked, int(marked.flatten(1).any(dim=1).sum())


def _masks(path: Path, names: tuple[str, ...], size: tuple[int, int]) -> Tensor:
    read = read_images(path, size, labelled=False)
    places = {_plain(name): number for number, name in enumerate(read.names)}
    wanted = [_plain(name) for name in names]
    missing = [name for name in wanted if name not in places]
    if missing:
        raise InputError(
            f"--masks {path} has no mask for {missing[0]} ({len(missing)} missing): give one image "
            "of the same name for each, or boxes in a table .csv."
        )
    pixels = read.images.read(torch.tensor([places[name] for name in wanted]))
    return pixels.mean(dim=1) > 0.5


def _boxes(path: Path, images: Path, names: tuple[str, ...], size: tuple[int, int]) -> Tensor:
    boxes: dict[str, list[Box]] = {}
    for name, box in _rows(path):
        boxes.setdefault(_plain(name), []).append(box)
    if not any(_plain(name) in boxes for name in names):
        raise InputError(
            f"--masks {path} has no box for any of the images ({names[0]}, ...): its column image "
            "holds their names."
        )
    given = read_images(images, labelled=False)
    places = {name: number for number, name in enumerate(given.names)}
    masks = []
    for name in names:
        corners = torch.tensor(boxes.get(_plain(name), []), dtype=torch.float64).reshape(-1, 4)
        masks.append(boxes_to_mask(corners, _size(given, places[name]), size))
    return torch.stack(masks)


def _rows(path: Path) -> list[tuple[str, Box]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"--masks {path} cannot be read ({error}): check the path.") from error
    found = []
    for number, row in enumerate(rows, start=2):
        try:
            left, top, right, bottom = (float(row[column]) for column in _COLUMNS[1:])
            name = str(row["image"])
            if not (0.0 <= left < right < math.inf and 0.0 <= top < bottom < math.inf):
                raise ValueError("left is not below right, or top not below bottom")
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"--masks {path}, line {number}, holds no box ({error}): the columns are "
                f"{', '.join(_COLUMNS)}, in pixels from the upper left corner."
            ) from error
        found.append((name, (left, top, right, bottom)))
    return found


def _size(given: ImageSet, number: int) -> tuple[int, int]:
    """Height and width of an image as it lies there."""
    if given.size is not None:
        return given.size
    height, width = given.images.read(torch.tensor([number])).shape[-2:]
    return height, width


def _plain(name: str) -> str:
    return Path(name).with_suffix("").as_posix()
