"""One run of a job: its folder, its finished stages, its progress and its result."""

from __future__ import annotations

import json
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

from cmd_plugin.errors import InputError
from cmd_plugin.runs.files import read_json, write_json
from cmd_plugin.runs.folder import RunFolder
from cmd_plugin.runs.options import JobOptions
from cmd_plugin.runs.progress import Progress, ReportProgress
from cmd_plugin.runs.result import Result
from cmd_plugin.runs.table import Table

__all__ = ["Job", "RunJob", "make_job"]

_ADVICE = "start again with --overwrite"


class Job:
    """What the work of a job is done with, as a context manager; :func:`make_job` makes one.

    A run that ends in an error before anything was finished leaves nothing behind, so that the
    corrected command can be given at once.

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
        if isinstance(error, Exception):  # what a user interrupts stays, to be resumed
            self.folder.forget_if_empty()
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


Options = TypeVar("Options", bound=JobOptions, contravariant=True)


class RunJob(Protocol[Options]):
    """The public function of a job."""

    def __call__(
        self,
        options: Options,
        out: str | Path | None = None,
        *,
        resume: bool = False,
        overwrite: bool = False,
        progress: ReportProgress | None = None,
    ) -> Result:
        """Run the job.

        Args:
            options: What to do.
            out: Folder for everything it makes, see :class:`RunFolder`; None keeps nothing.
            resume: Go on with the unfinished run in ``out``; of a finished one return the result.
            overwrite: Replace what lies in ``out``, a finished run when the new one is complete.
            progress: Called with every :class:`Progress`.

        Raises:
            InputError: If an option, an input or the folder cannot be used. What was finished stays
                in ``out``.
            KeyboardInterrupt: If the user stops it; it can be resumed.
        """


def make_job(name: str) -> Callable[[Callable[[Job, Options], Result]], RunJob[Options]]:
    """Make the public function of a job, see :class:`RunJob`, from the one that does its work.

    ::

        @make_job("noun verb")
        def run(job: Job, options: Options) -> Result:
            data = load(options)
            for seed in options.seeds:
                found = job.stage(f"seed{seed}", lambda: train(job, seed))
            return job.finish(metrics=..., data=...)

    Args:
        name: The job's name, as on the command line.
    """

    def make(work: Callable[[Job, Options], Result]) -> RunJob[Options]:
        # Without the annotations, which are those of the work.
        @wraps(work, assigned=("__module__", "__name__", "__qualname__", "__doc__"))
        def run(
            options: Options,
            out: str | Path | None = None,
            *,
            resume: bool = False,
            overwrite: bool = False,
            progress: ReportProgress | None = None,
        ) -> Result:
            flags: dict[str, Any] = {"resume": resume, "overwrite": overwrite}
            with Job(name, options, out, **flags, progress=progress) as opened:
                return work(opened, options) if opened.result is None else opened.result

        del run.__wrapped__  # inspect shall show the arguments that callers give
        return run

    return make


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode()
