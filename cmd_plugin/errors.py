"""Exceptions the package raises on purpose, and the one helper for optional packages.

Every message is one sentence that says what was wrong, with which file or argument, and what to do.
The command line turns :class:`InputError` into exit code 2; anything else is a fault of ours.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = [
    "InputError",
    "MissingDependency",
    "NonFiniteError",
    "PluginError",
    "ShapeError",
    "StateMismatch",
    "require",
]


class PluginError(Exception):
    """Base of every exception this package raises on purpose."""


class InputError(PluginError, ValueError):
    """The caller's input cannot be used."""


class ShapeError(InputError):
    """A tensor has a shape, dtype or device that does not fit."""


class NonFiniteError(InputError):
    """A tensor holds NaN or infinite values; the message says how many and where."""


class StateMismatch(InputError):
    """A saved state does not belong to this model."""


class MissingDependency(PluginError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional module, or say which extra installs it.

    Args:
        module: Dotted name of the module to import.
        extra: Name of the extra of this distribution that brings it.

    Raises:
        MissingDependency: If the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and not module.startswith(error.name):
            raise
        message = (
            f'{module!r} is needed here but not installed: run pip install "cmd-plugin[{extra}]".'
        )
        raise MissingDependency(message) from error
