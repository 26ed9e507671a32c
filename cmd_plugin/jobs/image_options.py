"""The options of every job that trains a classifier on images: which data, which network."""

from __future__ import annotations

from dataclasses import dataclass

from cmd_plugin.runs.options import JobOptions, option

__all__ = ["DATA_PANEL", "ImageOptions"]

DATA_PANEL = "Data and network"


@dataclass(frozen=True, kw_only=True)
class ImageOptions(JobOptions):
    """Which images, and which network for them."""

    data: str = option(
        "digits",
        "digits (comes with scikit-learn), mnist, fashion-mnist, cifar10 or folder.",
        panel=DATA_PANEL,
    )
    data_root: str | None = option(
        None,
        "Where data lies: torchvision's layout, or with --data folder a folder of "
        "train/CLASS/IMAGE and test/CLASS/IMAGE (or CLASS/IMAGE), or an archive of it. Default: "
        "environment variable CMD_PLUGIN_DATA. Nothing is downloaded.",
        panel=DATA_PANEL,
        free=True,
    )
    model: str = option(
        "cnn",
        "cnn (57k parameters), cnn:WIDTH, or any timm or torchvision name.",
        panel=DATA_PANEL,
    )
    image_size: int | None = option(
        None, "Resize images to this side length.", panel=DATA_PANEL, at_least=1
    )
    train_limit: int | None = option(
        None, "Use only so many training images.", panel=DATA_PANEL, at_least=1
    )
