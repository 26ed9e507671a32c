"""What the commands do: one module or folder a job, each with ``Options`` and ``run``.

Import a job from its module; importing this package loads nothing.
"""
