"""Exceptions the package raises on purpose, and the one helper for optional packages.

Every message is one sentence that says what was wrong, with which file or argument, and what to do.
The command line turns :class:`InputError` into exit code 2; anything else is a fault of ours.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
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
    _hide_own_kernels()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and not module.startswith(error.name):
            raise
        message = (
            f'{module!r} is needed here but not installed: run pip install "cmd-plugin[{extra}]".'
        )
        raise MissingDependency(message) from error


def _hide_own_kernels() -> None:
    """Keep transformers from importing this repository's folder ``kernels``.

    It asks whether a package of that name is installed. In a checkout that is the current folder,
    ours is found, and its guard against exactly this import would break theirs.
    """
    if "kernels" in sys.modules:
        return
    found = importlib.util.find_spec("kernels")
    ours = Path(__file__).with_name("kernels") / "__init__.py"
    if found is not None and found.origin and Path(found.origin).resolve() == ours.resolve():
        sys.modules["kernels"] = None  # type: ignore[assignment]
