"""A user's own network, out of a module of theirs."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from cmd_plugin.errors import InputError

__all__ = ["import_network"]


def import_network(place: str, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """Build a network from an import string; its module is run, as by any import.

    Args:
        place: ``module:Class``, or ``package.module:function`` that returns a network. Modules are
            looked for in the current folder, too.
        arguments: Keyword arguments of the call; none by default.

    Raises:
        InputError: If there is no such module or name, either fails, or what comes is no network.
    """
    name, _, inner = place.partition(":")
    if not inner or not all(part.isidentifier() for part in (*name.split("."), *inner.split("."))):
        raise InputError(
            f"{place!r} names no network: write module:Class, as in networks.mine:PointNet."
        )
    with _current_folder():
        make: Any = _imported(name)
        for part in inner.split("."):
            if not hasattr(make, part):
                near = difflib.get_close_matches(part, dir(make), n=1)
                hint = f"did you mean {near[0]}?" if near else "check the name."
                raise InputError(f"{name} has no {inner}: {hint}")
            make = getattr(make, part)
        try:
            network = make(**(arguments or {}))
        except Exception as error:  # it is a stranger's code
            raise InputError(
                f"{place} cannot be built with {dict(arguments or {})} ({_reason(error)}): give "
                "the arguments that it needs."
            ) from error
    if not isinstance(network, nn.Module):
        raise InputError(
            f"{place} made {type(network).__name__}, no torch.nn.Module: name the network's class."
        )
    return network


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise InputError(
                f"there is no module {name}: give its name as for an import, and run the command "
                f"where it lies (not in {Path.cwd()})."
            ) from error
        raise InputError(f"the module {name} needs {error.name}: install it.") from error
    except Exception as error:  # it is a stranger's code
        raise InputError(f"the module {name} cannot be imported ({_reason(error)}).") from error


@contextmanager
def _current_folder() -> Iterator[None]:
    """Look for modules in the current folder as well, after all others."""
    here = str(Path.cwd())
    if here in sys.path:
        yield
        return
    sys.path.append(here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(here)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:200].rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
