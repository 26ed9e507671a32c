"""Lightning adapters: they decide when to measure, hand tensors over, log. No maths lives here."""

if __name__ != "cmd_plugin.callbacks":
    raise ImportError(
        f"this folder is the package 'cmd_plugin.callbacks' but was imported as {__name__!r}: "
        "write 'from cmd_plugin.callbacks import ...'."
    )

from cmd_plugin.callbacks.cmd import CMDCallback
from cmd_plugin.callbacks.point_importance import PointImportanceMonitor

__all__ = ["CMDCallback", "PointImportanceMonitor"]
