"""Lightning adapters: they decide when to measure, hand tensors over, log. No maths lives here.

Each callback is imported when it is first used.
"""

from __future__ import annotations

if __name__ != "cmd_plugin.callbacks":
    raise ImportError(
        f"this folder is the package 'cmd_plugin.callbacks' but was imported as {__name__!r}: "
        "write 'from cmd_plugin.callbacks import ...'."
    )

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmd_plugin.callbacks.cmd import CMDCallback
    from cmd_plugin.callbacks.point_importance import PointImportanceMonitor

__all__ = ["CMDCallback", "PointImportanceMonitor"]

_HOMES = {"CMDCallback": "cmd", "PointImportanceMonitor": "point_importance"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
