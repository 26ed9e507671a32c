"""A small instance of every job, and ways to stop one in the middle."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

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

# Runs each script it is asked for in a fork of its own: as fresh as a new process, without the
# seconds that imports take.
_SERVER = """
import json, os, sys, traceback
import matplotlib.figure, pytorch_lightning, sklearn.datasets, torch, torchvision
import cmd_plugin.cli.main
for line in sys.stdin:
    code, arguments, output = json.loads(line)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, name in enumerate(output, 1):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.argv, status = ["-c", *arguments], 0
        try:
            exec(code, {"__name__": "__main__"})
        except SystemExit as ended:
            status = ended.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _SERVER],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.terminate)
    return server


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


def run_script(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, as ``python -c code arguments`` does."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        output = [Path(folder, name) for name in ("stdout", "stderr")]
        print(json.dumps([code, arguments, [*map(str, output)]]), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        printed = (path.read_text("utf-8") for path in output)
        return subprocess.CompletedProcess(arguments, status, *printed)


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
