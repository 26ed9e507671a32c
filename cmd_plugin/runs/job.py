"""One run of a job: its folder, its finished stages, its progress and its result."""

from __future__ import annotations

import json
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from cmd_plugin.errors import InputError
from cmd_plugin.runs.files import read_json, write_json
from cmd_plugin.runs.folder import RunFolder
from cmd_plugin.runs.options import JobOptions
from cmd_plugin.runs.progress import Progress, ReportProgress
from cmd_plugin.runs.result import Result
from cmd_plugin.runs.table import Table

__all__ = ["Job"]

_ADVICE = "start again with --overwrite"


class Job:
    """What a job's ``run`` function works with, as a context manager.

    ::

        def run(options, out, *, resume=False, overwrite=False, progress=None) -> Result:
            data = load(options)  # fails before anything is written
            with Job("noun verb", options, out, resume=resume, overwrite=overwrite,
                     progress=progress) as job:
                if job.result is not None:  # finished by an earlier process
                    return job.result
                for seed in options.seeds:
                    found = job.stage(f"seed{seed}", lambda: train(job, seed))
                return job.finish(metrics=..., data=...)

    Args:
        name: The job's name, as on the command line.
        options: Its options; which may differ when a run is resumed is said there.
        out: Its folder; None works in a temporary one, which is removed.
        resume: Go on with the run that lies there.
        overwrite: Replace what lies there, once the new run is complete.
        progress: Called with every event.

    Attributes:
        folder: The folder.
        result: The result that lay there, with ``resume``; None if there is work to do.

    Raises:
        InputError: As :meth:`RunFolder.open`, when entered.
    """

    def __init__(
        self,
        name: str,
        options: JobOptions,
        out: str | Path | None,
        *,
        resume: bool = False,
        overwrite: bool = False,
        progress: ReportProgress | None = None,
    ) -> None:
        self.name = name
        self.options = options
        self.out = out
        self.result: Result | None = None
        self._flags = {"resume": resume, "overwrite": overwrite}
        self._progress = progress
        self._stack = ExitStack()
        self._started = time.perf_counter()

    def __enter__(self) -> Job:
        """Open the folder."""
        out = self.out
        if out is None:
            out = self._stack.enter_context(tempfile.TemporaryDirectory())
        self.folder = RunFolder(out)
        self.result = self.folder.open(self.name, self.options.deciding(), **self._flags)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let the folder go; what is unfinished stays there."""
        self.folder.close()
        self._stack.close()

    def stage(self, name: str, work: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Return what a stage found: from its file if it was finished before, else by doing it.

        Args:
            name: Its name, which can be a file's.
            work: Does it; returns JSON types.

        Raises:
            InputError: If the file is damaged.
        """
        if not self.is_finished(name):
            found = json.loads(json.dumps(work(), allow_nan=False))
            seal = zlib.crc32(_canonical(found))
            write_json(self.folder.state(f"{name}.json"), {"found": found, "crc32": seal})
        # Read back also when it was just made: a resumed run must not see other types.
        path = self.folder.state(f"{name}.json")
        content = read_json(path, _ADVICE)
        found = content.get("found")
        if not isinstance(found, dict) or zlib.crc32(_canonical(found)) != content.get("crc32"):
            raise InputError(f"{path} is damaged (it is not what was written): {_ADVICE}.")
        return found

    def is_finished(self, stage: str) -> bool:
        """Whether a stage was finished, by this or an earlier process."""
        return self.folder.state(f"{stage}.json").exists()

    def table(self, name: str, columns: Mapping[str, Callable[[str], Any]]) -> Table:
        """Return a table that the job fills while it goes on; see :class:`Table`."""
        return Table(self.folder.path(name), columns, self.folder.state(f"{name}.seal"))

    def report(self, stage: str, done: float, total: float | None, note: str = "") -> None:
        """Tell how far the job is; see :class:`Progress`."""
        if self._progress is not None:
            self._progress(Progress(stage, done, total, note))

    def finish(
        self,
        *,
        metrics: Mapping[str, Any],
        data: Mapping[str, Any],
        seconds: Mapping[str, float] | None = None,
    ) -> Result:
        """Complete the run: its files replace those of an older one.

        Args:
            metrics: What was found, as JSON types without NaN.
            data: What it was found on.
            seconds: What the time was spent on, besides the total.

        Raises:
            InputError: If the folder cannot be written any more.
        """
        from cmd_plugin.machine import describe_machine

        total = time.perf_counter() - self._started
        result = self.folder.finish(
            {
                "job": self.name,
                "options": self.options.as_dict(),
                "data": dict(data),
                "metrics": dict(metrics),
                "machine": describe_machine(),
                "seconds": {"total": total, **(seconds or {})},
            }
        )
        if self.out is None:  # its temporary folder is about to go
            result = replace(result, out=None)
        self.result = result
        return result


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode()
