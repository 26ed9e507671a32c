"""Names of the data sets, for those who must not wait for torch to know them."""

from __future__ import annotations

__all__ = ["DATASETS"]

DATASETS = ("digits", "mnist", "fashion-mnist", "cifar10", "folder")
