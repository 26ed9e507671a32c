"""Images: data sets that need no download, those a user has on disk, and images of any kind.

Every name is imported when it is first used, so that splitting labels loads no image library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cmd_plugin._face import lazy_face

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

_MODULES = {
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

__all__ = list(_MODULES)

__getattr__, __dir__ = lazy_face(__name__, _MODULES)
