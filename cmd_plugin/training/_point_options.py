"""Checks of the options that every training on point clouds has."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from cmd_plugin.errors import InputError

__all__ = ["check_point_options"]


def check_point_options(
    config: Any, choices: Mapping[str, Collection[str]], counts: Sequence[str]
) -> None:
    """Raise InputError, naming the option of the command line, for the first that is out of range.

    Args:
        config: Options as attributes; it has at least ``batch_size``, ``seed``, ``width`` and
            ``lr``.
        choices: Name of an attribute -> what it may be.
        counts: Names of attributes that are at least 1, or None.
    """
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise InputError(
                f"--{name} must be one of {', '.join(known)}, got {getattr(config, name)}."
            )
    for name in counts:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
    if config.batch_size < 2:
        raise InputError(f"--batch-size must be at least 2, got {config.batch_size}.")
    if config.seed < 0:
        raise InputError(f"--seed must be at least 0, got {config.seed}.")
    for name in ("width", "lr"):
        value = getattr(config, name)
        if not (value > 0.0 and math.isfinite(value)):
            raise InputError(f"--{name} must be above 0, got {value}.")
