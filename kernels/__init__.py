"""Memory-bound primitives: one folder each, with a reference, a fast CPU path and one public function."""

if __name__ != "cmd_plugin.kernels":
    raise ImportError(
        f"this folder is the package 'cmd_plugin.kernels' but was imported as {__name__!r}: "
        "write 'from cmd_plugin.kernels import ...'."
    )
