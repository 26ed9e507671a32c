"""What `cmd-plugin doctor` prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich import box
from rich.console import Console
from rich.table import Table

from cmd_plugin.cli.output import stdout_for_results
from cmd_plugin.jobs import doctor
from cmd_plugin.jobs.doctor import Check

__all__ = ["examine"]

_STYLES = {"ok": "green", "missing": "yellow", "broken": "red"}


def examine(*, as_json: bool, data_root: str | None = None) -> int:
    """Look at this machine and print what was found.

    Returns:
        The exit code: 0 if all that is required works, else 2.
    """
    with stdout_for_results():
        checks = doctor.examine(data_root)
    failed = [check for check in checks if check.required and check.state != "ok"]
    if as_json:
        content = {"works": not failed, "checks": [asdict(check) for check in checks]}
        print(json.dumps(content, indent=2))  # noqa: T201
    else:
        _show(checks, failed)
    return 2 if failed else 0


def _show(checks: Sequence[Check], failed: Sequence[Check]) -> None:
    console = Console(highlight=False, markup=False)
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("what", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("found", overflow="fold")
    for check in checks:
        table.add_row(check.name, check.state, check.found, style=_STYLES[check.state])
    console.print(table)
    required = [check for check in failed if check.advice]
    _advise(console, "Required:", required)
    _advise(console, "If you want it:", [c for c in checks if c.advice and c not in required])
    if not failed:
        console.print("All that is required works.")


def _advise(console: Console, title: str, checks: Sequence[Check]) -> None:
    if checks:
        console.print(title)
        for check in checks:
            console.print(f"  {check.name}: {check.advice}")
