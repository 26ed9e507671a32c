"""The ground floor of everything that wraps somebody's network.

Each name is imported when it is first used, so that reading weights loads no model zoo.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmd_plugin.networks.measuring import kept_buffers as kept_buffers
    from cmd_plugin.networks.measuring import undisturbed as undisturbed

_MODULES = {
    "kept_buffers": "measuring",
    "undisturbed": "measuring",
}

__all__ = ["kept_buffers", "undisturbed"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
