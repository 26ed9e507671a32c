"""The width multiplier that all networks share."""

from __future__ import annotations

from cmd_plugin.errors import InputError

__all__ = ["scaled"]


def scaled(channels: int, width: float) -> int:
    """A hidden width times the multiplier, rounded, in multiples of 4 and at least 8.

    Raises:
        InputError: If the multiplier is not above 0.
    """
    if not width > 0.0:
        raise InputError(f"width must be above 0, got {width}.")
    return channels if width == 1.0 else max(8, 4 * round(channels * width / 4))
