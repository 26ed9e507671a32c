"""Names of the data sets and where they lie, for those who must not wait for torch."""

from __future__ import annotations

__all__ = ["DATASETS", "MARKS", "ROOT_VARIABLE"]

DATASETS = ("digits", "mnist", "fashion-mnist", "cifar10", "folder")

ROOT_VARIABLE = "CMD_PLUGIN_DATA"

MARKS = {
    "mnist": "MNIST/raw/train-images-idx3-ubyte",
    "fashion-mnist": "FashionMNIST/raw/train-images-idx3-ubyte",
    "cifar10": "cifar-10-batches-py",
    "cifar10-jpeg": "cifar10-jpeg",
}
"""Image set -> the file or folder below the data root by which it is known."""
