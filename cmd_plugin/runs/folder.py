"""The folder of one run: never half written, never written twice at once, never lost by accident.

::

    OUT/result.json and what else the job made     a finished run
    OUT/unfinished/run.json                        which run is going on, or was stopped
    OUT/unfinished/state/                          what it needs to go on
    OUT/unfinished/...                             what it has made so far
    OUT/.lock                                      held by the process that writes

A run works in ``unfinished/``. When it is complete, ``unfinished/result.json`` is written, and from
that moment on its files are moved up to OUT, where they replace those of an older run; a kill in
between is made good by whoever opens the folder next. So an old result stays whole until the new
one is, and what is cleared is first taken out of the way in one step.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import filelock

from cmd_plugin.errors import InputError
from cmd_plugin.runs.files import read_json, sweep, unwritable, write_atomically, write_json
from cmd_plugin.runs.result import RESULT, Result

__all__ = ["RunFolder"]

_WORK = "unfinished"
_RUN = "run.json"
_STATE = "state"
_LOCK = ".lock"
_ADVICE = "start again with --overwrite, or choose another --out"


class RunFolder:
    """Access to the folder of one run, for one process at a time.

    Args:
        out: The folder; :meth:`open` makes it.

    Attributes:
        out: As given.
        work: Where the run that goes on has its files.
        resumed: Whether that run was started by an earlier process.
    """

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out)
        self.work = self.out / _WORK
        self.resumed = False
        self._lock: filelock.BaseFileLock | None = None
        self._identity: tuple[int, int] | None = None
        self._new = False  # whether the folder was made for this run

    # -- opening ----------------------------------------------------------------------------------

    def open(
        self, job: str, options: Mapping[str, Any], *, resume: bool = False, overwrite: bool = False
    ) -> Result | None:
        """Get ready to run a job here, or return the result if it is there already.

        ======================  ===================  =====================  =====================
        the folder holds        neither              ``resume``             ``overwrite``
        ======================  ===================  =====================  =====================
        nothing of ours         starts               refused                starts
        an unfinished run       refused              goes on                starts anew
        a finished run          refused              returns its result     replaced when complete
        ======================  ===================  =====================  =====================

        Args:
            job: Name of the job.
            options: The options that decide its results, as JSON types; a run can only be resumed
                with the same.
            resume: Go on with the run that lies there.
            overwrite: Replace what lies there.

        Raises:
            InputError: If the folder cannot be written, another process is writing it, it holds a
                run that is neither resumed nor overwritten, or one of another job or options.
        """
        if resume and overwrite:
            raise InputError("--resume goes on with a run, --overwrite replaces it: give one.")
        self._acquire()
        try:
            return self._open(job, options, resume=resume, overwrite=overwrite)
        except BaseException:
            self.close()
            raise

    def _open(
        self, job: str, options: Mapping[str, Any], *, resume: bool, overwrite: bool
    ) -> Result | None:
        self._clear_discarded()
        if self.work.exists() and not (self.work / _RUN).is_file():
            raise InputError(
                f"{self.work} is no run of this program: move it away, or choose another --out."
            )
        if (self.work / RESULT).exists():
            self._publish()
        unfinished, finished = self.work.exists(), (self.out / RESULT).exists()
        if not (resume or overwrite) and (unfinished or finished):
            advice = "--resume to finish it, " if unfinished else ""
            raise InputError(
                f"{self.out} holds {'an unfinished' if unfinished else 'a finished'} run: add "
                f"{advice}--overwrite to replace it, or choose another --out."
            )
        if resume and not unfinished:
            if not finished:
                raise InputError(f"{self.out} holds no run to resume: leave out --resume.")
            result = Result.load(self.out / RESULT)
            self._compare(result.job, result.options, job, options)
            self.close()
            return result
        if resume:
            run = read_json(self.work / _RUN, _ADVICE)
            before = run.get("options")
            if not isinstance(before, dict):
                raise InputError(f"{self.work / _RUN} is damaged (no options): {_ADVICE}.")
            self._compare(run.get("job"), before, job, options)
            sweep(self.work)
        else:
            self._discard_work()
            self._start({"job": job, "options": dict(options)})
        self.resumed = resume
        found = self.work.stat()
        self._identity = found.st_dev, found.st_ino
        return None

    def _acquire(self) -> None:
        self._new = not self.out.exists()
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.out / _LOCK)
            lock.acquire(blocking=False)
        except filelock.Timeout:
            raise InputError(
                f"another process is writing to {self.out}: wait until it has ended, or choose "
                "another --out."
            ) from None
        except OSError as error:
            raise InputError(
                f"--out {self.out} cannot be written to ({error.strerror or error}): choose "
                "another folder."
            ) from error
        self._lock = lock

    def _start(self, run: Mapping[str, Any]) -> None:
        fresh = self.out / f".discarded-{uuid.uuid4().hex}"  # until it is complete it is not there
        with unwritable(self.out):
            (fresh / _STATE).mkdir(parents=True)
            write_json(fresh / _RUN, run)
            fresh.rename(self.work)

    def _compare(
        self, job_then: object, then: Mapping[str, Any], job: str, now: Mapping[str, Any]
    ) -> None:
        if job_then != job:
            raise InputError(
                f"{self.out} holds a run of `{job_then}`, not of `{job}`: choose another --out."
            )
        for name, value in now.items():
            if then.get(name) != value:
                raise InputError(
                    f"the run in {self.out} was started with {name}={then.get(name)}, now it is "
                    f"{value}: resume with the same options, or choose another --out."
                )

    # -- while the run goes on --------------------------------------------------------------------

    def path(self, name: str) -> Path:
        """Return where a file that the job makes lies while the run goes on.

        Raises:
            InputError: If the folder was removed meanwhile.
        """
        return self._inside(self.work / name)

    def state(self, name: str) -> Path:
        """Return where a file that only an unfinished run needs lies.

        Raises:
            InputError: If the folder was removed meanwhile.
        """
        return self._inside(self.work / _STATE / name)

    def write(self, path: Path, write: Callable[[Path], object]) -> None:
        """Write a file of this folder in one step; see :func:`write_atomically`."""
        write_atomically(self._inside(path), write)

    def _inside(self, path: Path) -> Path:
        """Return a path below :attr:`work`, its folder made, if that is still the one of now."""
        if not self._is_ours():
            raise InputError(
                f"{self.out} was removed or replaced while the run went on: start it again."
            )
        with unwritable(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _is_ours(self) -> bool:
        try:
            found = self.work.stat()
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == self._identity

    # -- the end ----------------------------------------------------------------------------------

    def finish(self, content: Mapping[str, Any]) -> Result:
        """Write result.json, and put all files of the run in the place of an older one's.

        Args:
            content: The result, as :meth:`Result.as_dict` gives it, without its files.

        Raises:
            InputError: If the folder was removed meanwhile or cannot be written.
        """
        made = sorted(self._made())
        write_json(self.path(RESULT), {**content, "files": [*made, RESULT]})
        self._publish()
        result = Result.load(self.out / RESULT)
        self.close()
        return result

    def _made(self) -> list[str]:
        """Return the files of the run that are no state, relative to :attr:`work`."""
        names = (p.relative_to(self.work) for p in self.work.rglob("*") if p.is_file())
        return [
            n.as_posix() for n in names if n.parts[0] != _STATE and n.name not in (_RUN, RESULT)
        ]

    def _publish(self) -> None:
        """Move a complete run up. Can be stopped anywhere and begun again."""
        new = set(Result.load(self.work / RESULT).files)
        with unwritable(self.out):
            for name in sorted(set(self._old_files()) - new):
                (self.out / name).unlink(missing_ok=True)
                self._remove_empty(self.out / name)
            for name in self._made():
                target = self.out / name
                target.parent.mkdir(parents=True, exist_ok=True)
                (self.work / name).replace(target)
            (self.work / RESULT).replace(self.out / RESULT)
            self._discard_work()

    def _old_files(self) -> list[str]:
        """Return the files of the finished run; none if it was not written by this version."""
        try:
            names = Result.load(self.out / RESULT).files
        except InputError:
            return []
        # The list comes from a file: it must not lead out of the folder.
        paths = ((name, PurePosixPath(str(name))) for name in names)
        return [
            str(name) for name, path in paths if not path.is_absolute() and ".." not in path.parts
        ]

    def _remove_empty(self, path: Path) -> None:
        for parent in path.parents:
            if parent == self.out or not parent.is_dir() or any(parent.iterdir()):
                return
            parent.rmdir()

    def _discard_work(self) -> None:
        if self.work.exists():  # in one step, so that no half of it can be taken for a run
            self.work.rename(self.out / f".discarded-{uuid.uuid4().hex}")
        self._clear_discarded()

    def _clear_discarded(self) -> None:
        for folder in self.out.glob(".discarded-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def forget_if_empty(self) -> None:
        """Take away a run that this process began and in which nothing was finished."""
        if not self._is_ours() or self.resumed or self._made():
            return
        if any(path.is_file() for path in (self.work / _STATE).rglob("*")):
            return
        with unwritable(self.out):
            self._discard_work()
            if self._new and not any(p for p in self.out.iterdir() if p.name != _LOCK):
                self.close()
                shutil.rmtree(self.out, ignore_errors=True)

    def close(self) -> None:
        """Let other processes have the folder; what the run has made so far stays."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()
