"""Images: data sets that need no download, those a user has on disk, and images of any kind.

Every name is imported when it is first used, so that splitting labels loads no image library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmd_plugin.data.collection import ImageSet as ImageSet
    from cmd_plugin.data.datasets import ImageData as ImageData
    from cmd_plugin.data.datasets import load_dataset as load_dataset
    from cmd_plugin.data.images import EpochShuffle as EpochShuffle
    from cmd_plugin.data.images import LabelledImages as LabelledImages
    from cmd_plugin.data.images import make_loader as make_loader
    from cmd_plugin.data.limits import ReadLimits as ReadLimits
    from cmd_plugin.data.names import DATASETS as DATASETS
    from cmd_plugin.data.read import read_images as read_images

__all__ = [
    "DATASETS",
    "EpochShuffle",
    "ImageData",
    "ImageSet",
    "LabelledImages",
    "ReadLimits",
    "load_dataset",
    "make_loader",
    "read_images",
]

_HOMES = {
    "DATASETS": "names",
    "EpochShuffle": "images",
    "ImageData": "datasets",
    "ImageSet": "collection",
    "LabelledImages": "images",
    "ReadLimits": "limits",
    "load_dataset": "datasets",
    "make_loader": "images",
    "read_images": "read",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
