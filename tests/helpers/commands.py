"""The command line, run in the process of a test."""

from __future__ import annotations

import pytest

from cmd_plugin.cli.main import run


def exit_code(*arguments: str) -> int:
    """Run ``cmd-plugin`` with these words; its exit code."""
    with pytest.raises(SystemExit) as ended:
        run(arguments)
    assert isinstance(ended.value.code, int)
    return ended.value.code
