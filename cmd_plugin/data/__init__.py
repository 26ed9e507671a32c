"""Image data sets: one that needs no download, and loaders for those a user has on disk."""

from cmd_plugin.data.datasets import DATASETS, ImageData, load_dataset
from cmd_plugin.data.images import EpochShuffle, LabelledImages, make_loader

__all__ = ["DATASETS", "EpochShuffle", "ImageData", "LabelledImages", "load_dataset", "make_loader"]
