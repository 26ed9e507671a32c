"""Processes of their own for scripts of tests, without the seconds that imports take."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]

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

# Runs a file in two forks, as the two processes of one group over the loopback interface.
_RANKS = """
import os, runpy, signal, sys, traceback
folder = os.path.dirname(sys.argv[1])
children = []
for rank in range(2):
    child = os.fork()
    if child == 0:
        signal.alarm(300)
        os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
        os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0")  # for Lightning: both exist already
        sys.argv = [sys.argv[1], sys.argv[2], str(rank), *sys.argv[3:]]
        sys.path.insert(0, folder)
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            status = 0
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stderr.flush()
        os._exit(status)
    children.append(child)
status = 0
while children:
    child, ended = os.wait()
    children.remove(child)
    if ended and not status:  # the other would wait for it
        status = 1
        for other in children:
            os.kill(other, signal.SIGKILL)
sys.exit(status)
"""


@functools.cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _SERVER],
        cwd=_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.terminate)
    return server


def run_script(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, as ``python -c code arguments`` does."""
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        output = [Path(folder, name) for name in ("stdout", "stderr")]
        print(json.dumps([code, arguments, [*map(str, output)]]), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        printed = (path.read_text("utf-8") for path in output)
        return subprocess.CompletedProcess(arguments, status, *printed)


def run_ranks(script: Path, folder: Path, *arguments: str) -> None:
    """Run a file in two processes, with (folder, rank, arguments); both must end well."""
    child = run_script(_RANKS, str(script), str(folder), *arguments)
    assert child.returncode == 0, child.stderr[-3000:]
