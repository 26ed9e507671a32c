"""Instruments for training runs and trained networks.

Importing this package is cheap: the rooms (``cmd_plugin.modes``, ``cmd_plugin.callbacks``, ...) are
imported when first used.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from types import ModuleType

__all__ = ["__version__"]

_ROOMS = (
    "callbacks",
    "clip",
    "data",
    "diffusion",
    "distinction",
    "errors",
    "federated",
    "kernels",
    "modes",
    "networks",
    "pointcloud",
    "runs",
)

try:
    __version__ = metadata.version("cmd-plugin")
except metadata.PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> ModuleType:
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS])
