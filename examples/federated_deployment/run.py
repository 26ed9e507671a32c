"""A federation of real processes on this machine: one SuperLink, two SuperNodes, one run.

    python examples/federated_deployment/run.py                                  # digits
    python examples/federated_deployment/run.py --data mnist --data-root DATA    # MNIST

Starts everything on free ports of the loopback interface, trains, prints the result and stops
everything, also when it is interrupted. The apps in ``app/`` are those that ``cmd-plugin federated
simulate`` runs in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

APP = Path(__file__).parent / "app"
BIN = Path(sys.executable).parent
STARTED = {"superlink": "Starting Flower SuperLink", "supernode": "SuperNode ID"}


def free_ports(count: int) -> list[int]:
    """Return so many free ports of the loopback interface."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Federation:
    """SuperLink and SuperNodes as child processes; :meth:`stop` ends every one of them.

    Args:
        folder: Where logs and Flower's own files go.
        clients: Number of SuperNodes.
    """

    def __init__(self, folder: Path, clients: int = 2) -> None:
        self.folder = folder
        self.clients = clients
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.port, *self._node_ports = free_ports(1 + 4 * clients)
        self.environment = {
            **os.environ,
            "FLWR_HOME": str(folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            # SuperLink and SuperNodes start their helpers by name.
            "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
        }

    def start(self) -> None:
        """Start the SuperLink, then the SuperNodes, each when the one before is ready."""
        home = self.folder / "flwr"
        home.mkdir(parents=True, exist_ok=True)
        (home / "config.toml").write_text(
            '[superlink]\ndefault = "here"\n\n[superlink.here]\n'
            f'address = "127.0.0.1:{self.port}"\ninsecure = true\n',
            encoding="utf-8",
        )
        address = ["--host", "127.0.0.1", "--port", str(self.port)]
        self._spawn("superlink", ["flower-superlink", "--insecure", *address])
        self._wait_for_port()
        for number in range(self.clients):
            self.start_node(number)

    def start_node(self, number: int) -> None:
        """Start SuperNode ``number``, for the first time or again."""
        name = f"supernode{number}"
        config = f"partition-id={number} num-partitions={self.clients}"
        port = self._node_ports.pop()  # a new one each time: the last may still be closing
        command = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{self.port}"]
        command += ["--host", "127.0.0.1", "--port", str(port), "--node-config", config]
        self._spawn(name, command)
        self.wait_for_log(name, STARTED["supernode"])

    def kill_node(self, number: int) -> None:
        """Kill a SuperNode with all its children at once, as a power failure would."""
        process = self.processes.pop(f"supernode{number}")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def run(self, options: dict[str, Any], *, timeout_s: float = 1800.0) -> int:
        """Run the app with these options of its configuration; the exit code of ``flwr run``."""
        process = self.submit(options)
        try:
            return process.wait(timeout_s)
        finally:
            if process.poll() is None:
                process.kill()

    def submit(self, options: dict[str, Any]) -> subprocess.Popen[bytes]:
        """Start ``flwr run``; it ends when the run has ended."""
        settings = " ".join(f"{name}={_toml(value)}" for name, value in options.items())
        command = [str(BIN / "flwr"), "run", str(APP), "here", "--stream"]
        return self._popen("run", [*command, "--run-config", settings])

    def wait_for_log(self, name: str, text: str, *, timeout_s: float = 180.0) -> None:
        """Wait until a process has written this text into its log."""
        log = self.folder / f"{name}.log"
        self._wait(lambda: text in log.read_text(errors="replace"), f"{text!r} in {log}", timeout_s)

    def wait_until(
        self, condition: Callable[[], bool], what: str, *, timeout_s: float = 600.0
    ) -> None:
        """Wait until a condition holds, as long as all processes run."""
        self._wait(condition, what, timeout_s)

    def stop(self) -> None:
        """End all processes and their children, gently first."""
        for process in self.processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in self.processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with suppress(ProcessLookupError):  # helpers of a process that is gone itself
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.processes.clear()

    def _spawn(self, name: str, command: list[str]) -> None:
        self.processes[name] = self._popen(name, [str(BIN / command[0]), *command[1:]])

    def _popen(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(  # a group of its own, so that its children can be found
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                cwd=self.folder,
                start_new_session=True,
            )

    def _wait_for_port(self) -> None:
        def answers() -> bool:
            with socket.socket() as probe:
                probe.settimeout(1.0)
                return probe.connect_ex(("127.0.0.1", self.port)) == 0

        self._wait(answers, "the SuperLink to listen", 180.0)

    def _wait(self, condition: Callable[[], bool], what: str, timeout_s: float) -> None:
        def done() -> bool:
            for name, process in self.processes.items():
                if process.poll() is not None:
                    raise RuntimeError(
                        f"{name} ended with {process.returncode}: see {self.folder / name}.log."
                    )
            return condition()

        wait_until(done, what, timeout_s=timeout_s)


def wait_until(condition: Callable[[], bool], what: str, *, timeout_s: float) -> None:
    """Wait until a condition holds.

    Raises:
        TimeoutError: If it does not in time.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:.0f} s for {what}.")
        time.sleep(0.2)


def _toml(value: Any) -> str:
    return json.dumps(value)  # texts, numbers and booleans look alike in both


@contextmanager
def federation(folder: Path, clients: int = 2) -> Iterator[Federation]:
    """A running federation that is stopped at the end of the block, whatever happens in it."""
    started = Federation(folder, clients)
    try:
        started.start()
        yield started
    finally:
        started.stop()


def main(arguments: list[str] | None = None) -> int:
    """Run the example; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits", choices=["digits", "mnist"])
    parser.add_argument("--data-root", default=os.environ.get("CMD_PLUGIN_DATA", ""))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path, help="folder for results; a temporary one by default")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="federation-") as scratch:
        folder = Path(scratch)
        out = (options.out or folder / "results").absolute()
        settings = {
            "data": options.data,
            "data-root": options.data_root,
            "rounds": options.rounds,
            "train-limit": 2000 if options.data == "mnist" else 0,
            "out": str(out),
        }
        with federation(folder) as running:
            print(f"SuperLink on port {running.port}, {running.clients} SuperNodes; training ...")
            code = running.run(settings)
        if code or not (out / "result.json").exists():
            print((folder / "run.log").read_text(errors="replace")[-4000:], file=sys.stderr)
            return code or 1
        result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    metrics = result["metrics"]
    for ended in metrics["rounds"]:
        print(
            f"round {ended['round']}: accuracy {ended['accuracy']:.4f}, "
            f"{ended['bytes_up'] / 1e3:.1f} kB up, {ended['bytes_down'] / 1e3:.1f} kB down, "
            f"{ended['embedded_fraction']:.1%} not sent"
        )
    print(f"{metrics['bytes_of_fedavg']:.1%} of FedAvg's bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
