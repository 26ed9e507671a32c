"""The settings of online CMD that a saved state must share with the run that continues it."""

from __future__ import annotations

from dataclasses import dataclass

from cmd_plugin.errors import InputError
from cmd_plugin.modes.choice import check_modes, check_profile
from cmd_plugin.modes.store import check_storage

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """See :class:`cmd_plugin.modes.OnlineModes` for what each one means.

    Raises:
        InputError: If one is out of range.
    """

    modes: int
    warmup: int
    samples: int
    seed: int
    storage: str
    profile: str
    shrink: bool
    forgetting: float

    def __post_init__(self) -> None:
        """Check what the draw of the samples does not check."""
        check_modes(self.modes)
        if isinstance(self.warmup, bool) or not isinstance(self.warmup, int) or self.warmup < 2:
            raise InputError(
                f"warmup must be a whole number of at least 2 (3 snapshots are fitted), got "
                f"{self.warmup!r}."
            )
        if not 0.0 < self.forgetting <= 1.0:
            raise InputError(f"forgetting must lie in (0, 1], got {self.forgetting!r}.")
        check_profile(self.profile)
        check_storage(self.storage)
