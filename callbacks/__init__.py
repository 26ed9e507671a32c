"""Lightning adapters: they decide when to measure, hand tensors over, log. No maths lives here.

Each callback is imported when it is first used.
"""

from __future__ import annotations

if __name__ != "cmd_plugin.callbacks":
    raise ImportError(
        f"this folder is the package 'cmd_plugin.callbacks' but was imported as {__name__!r}: "
        "write 'from cmd_plugin.callbacks import ...'."
    )

from typing import TYPE_CHECKING

from cmd_plugin._face import lazy_face

if TYPE_CHECKING:
    from cmd_plugin.callbacks.cmd import CMDCallback as CMDCallback
    from cmd_plugin.callbacks.embedding_geometry import (
        EmbeddingGeometryMonitor as EmbeddingGeometryMonitor,
    )
    from cmd_plugin.callbacks.memorization import MemorizationMonitor as MemorizationMonitor
    from cmd_plugin.callbacks.point_importance import (
        PointImportanceMonitor as PointImportanceMonitor,
    )

_MODULES = {
    "CMDCallback": "cmd",
    "EmbeddingGeometryMonitor": "embedding_geometry",
    "MemorizationMonitor": "memorization",
    "PointImportanceMonitor": "point_importance",
}

__all__ = list(_MODULES)

__getattr__, __dir__ = lazy_face(__name__, _MODULES)
