"""A small instance of every job, and ways to stop one in the middle."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.processes import run_script

# Ends the process, without a word, before its change number K of the file system.
_KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
left = int(sys.argv[1])
def dying(change):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return change(*args, **kwargs)
    return call
for name in ("rename", "replace", "unlink", "mkdir"):
    setattr(os, name, dying(getattr(os, name)))
from cmd_plugin.cli.main import run
try:
    run(sys.argv[2:])
finally:
    print("left", left, file=sys.stderr)
"""

# Lets no file grow beyond so many bytes, as on a full disk.
_FULL = """
import resource, sys
import torch
torch.set_num_threads(1)
from cmd_plugin.cli.main import run
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
run(sys.argv[2:])
"""

_PLAIN = """
import sys
import torch
torch.set_num_threads(1)
from cmd_plugin.cli.main import run
run(sys.argv[2:])
"""


@dataclass(frozen=True)
class JobCase:
    """A job that takes seconds.

    Attributes:
        name: The command.
        arguments: Its options; ``{inputs}`` stands for a folder made by the case's inputs.
        other: An option that decides, with another value.
        varying: Published files whose bytes differ between runs (pictures, times).
    """

    name: str
    arguments: tuple[str, ...]
    other: tuple[str, ...]
    varying: tuple[str, ...] = ()

    def command(self, inputs: Path, out: Path, *more: str) -> list[str]:
        """The command line."""
        words = [word.format(inputs=inputs) for word in self.arguments]
        return [*self.name.split(), *words, "--out", str(out), *more]


def start(script: str, limit: int, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, under one of the scripts above."""
    code = {"plain": _PLAIN, "killed": _KILLED, "full": _FULL}[script]
    return run_script(code, str(limit), *command)


def published(out: Path, case: JobCase) -> dict[str, Any]:
    """What a finished run left, without times and the like."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file() and p.name != ".lock"):
        name = path.relative_to(out).as_posix()
        if name == "result.json":
            content = json.loads(path.read_text(encoding="utf-8"))
            found[name] = _without_times({k: v for k, v in content.items() if k != "machine"})
        elif name.endswith(".safetensors"):
            found[name] = _read_tensors(path)
        elif not name.endswith((".png", ".ckpt", *case.varying)):
            found[name] = path.read_bytes()
        else:
            found[name] = None
    return found


def _read_tensors(path: Path) -> tuple[Any, bytes]:
    """Header and bytes of a safetensors file, whose metadata are in no particular order."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), data[start:]


def _without_times(content: Any) -> Any:
    """JSON without what was measured with a clock."""
    if isinstance(content, dict):
        timed = (
            "seconds",
            "overhead",
            "gbps",
            "speedup",
            "fraction_of_copy",
            "fastest_of_copy",
            "copy",
        )
        return {
            k: _without_times(v) for k, v in content.items() if not any(word in k for word in timed)
        }
    return [_without_times(v) for v in content] if isinstance(content, list) else content
