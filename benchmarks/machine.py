"""Where results go, and what every result file says about where it comes from."""

from __future__ import annotations

from pathlib import Path

from cmd_plugin.machine import describe_machine

__all__ = ["RESULTS", "describe_machine"]

RESULTS = Path(__file__).parent / "results"
