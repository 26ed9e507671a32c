"""The folder of a run: one policy, and a kill anywhere can be made good."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cmd_plugin.errors import InputError
from cmd_plugin.runs.folder import RunFolder
from cmd_plugin.runs.result import Result

OPTIONS = {"epochs": 3, "lr": 0.1}
CONTENT: dict[str, Any] = {
    "job": "toy",
    "options": OPTIONS,
    "data": {},
    "metrics": {"accuracy": 0.5},
    "machine": {},
    "seconds": {"total": 1.0},
}


def run_to_the_end(out: Path, text: str, names: tuple[str, ...], **flags: bool) -> Result:
    folder = RunFolder(out)
    assert folder.open("toy", OPTIONS, **flags) is None
    for name in names:
        folder.write(folder.path(name), lambda path: path.write_text(text))
    folder.state("last").write_text("state")
    return folder.finish({**CONTENT, "metrics": {"text": text}})


def visible(out: Path) -> dict[str, str]:
    """Every file of a folder but the lock and the result."""
    files = (p for p in out.rglob("*") if p.is_file() and p.name not in (".lock", "result.json"))
    return {p.relative_to(out).as_posix(): p.read_text() for p in files}


def test_a_finished_run_leaves_its_files_and_nothing_else(tmp_path: Path) -> None:
    result = run_to_the_end(tmp_path / "out", "one", ("a.txt", "sub/b.txt"))
    assert result.files == ("a.txt", "sub/b.txt", "result.json")
    assert visible(tmp_path / "out") == {"a.txt": "one", "sub/b.txt": "one"}
    assert not (tmp_path / "out/unfinished").exists()


def test_nothing_is_replaced_by_accident(tmp_path: Path) -> None:
    run_to_the_end(tmp_path, "one", ("a.txt",))
    with pytest.raises(InputError, match=r"finished run: add --overwrite"):
        RunFolder(tmp_path).open("toy", OPTIONS)
    folder = RunFolder(tmp_path)
    folder.open("toy", OPTIONS, overwrite=True)
    folder.close()  # stopped before anything was done
    assert visible(tmp_path)["a.txt"] == "one"
    with pytest.raises(InputError, match=r"unfinished run: add --resume to finish it, --overwrite"):
        RunFolder(tmp_path).open("toy", OPTIONS)
    with pytest.raises(InputError, match="give one"):
        RunFolder(tmp_path).open("toy", OPTIONS, resume=True, overwrite=True)


def test_an_old_result_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    run_to_the_end(tmp_path, "one", ("a.txt", "old/b.txt"))
    (tmp_path / "mine.txt").write_text("the user's")
    folder = RunFolder(tmp_path)
    folder.open("toy", OPTIONS, overwrite=True)
    folder.path("a.txt").write_text("two")
    assert (tmp_path / "a.txt").read_text() == "one"
    assert Result.load(tmp_path / "result.json").metrics == {"text": "one"}
    folder.finish(CONTENT)
    assert visible(tmp_path) == {"a.txt": "two", "mine.txt": "the user's"}
    assert not (tmp_path / "old").exists()


def test_resume_goes_on_and_gives_a_finished_result_back(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run to resume"):
        RunFolder(tmp_path).open("toy", OPTIONS, resume=True)
    folder = RunFolder(tmp_path)
    folder.open("toy", OPTIONS)
    folder.state("last").write_text("epoch 1")
    (folder.work / ".a.txt.tmp").write_text("half")
    folder.close()
    folder = RunFolder(tmp_path)
    assert folder.open("toy", OPTIONS, resume=True) is None
    assert folder.resumed
    assert folder.state("last").read_text() == "epoch 1"
    assert not (folder.work / ".a.txt.tmp").exists()
    folder.finish(CONTENT)
    again = RunFolder(tmp_path).open("toy", OPTIONS, resume=True)
    assert again is not None
    assert again.metrics == {"accuracy": 0.5}


@pytest.mark.parametrize("finished", [True, False])
def test_other_options_or_another_job_are_refused(tmp_path: Path, finished: bool) -> None:
    folder = RunFolder(tmp_path)
    folder.open("toy", OPTIONS)
    if finished:
        folder.finish(CONTENT)
    folder.close()
    with pytest.raises(InputError, match=r"started with lr=0\.1, now it is 0\.2"):
        RunFolder(tmp_path).open("toy", {**OPTIONS, "lr": 0.2}, resume=True)
    with pytest.raises(InputError, match="holds a run of `toy`, not of `points train`"):
        RunFolder(tmp_path).open("points train", OPTIONS, resume=True)


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.open("toy", OPTIONS)
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(InputError, match="another process is writing"):
            RunFolder(tmp_path).open("toy", OPTIONS, **flags)
    folder.close()
    RunFolder(tmp_path).open("toy", OPTIONS, resume=True)


def test_a_refused_folder_is_let_go(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        RunFolder(tmp_path).open("toy", OPTIONS, resume=True)
    RunFolder(tmp_path).open("toy", OPTIONS)


def test_a_removed_folder_is_noticed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    folder = RunFolder(out)
    folder.open("toy", OPTIONS)
    shutil.rmtree(out)
    for access in (folder.path, folder.state):
        with pytest.raises(InputError, match="was removed or replaced"):
            access("a.txt")
    with pytest.raises(InputError, match="was removed or replaced"):
        folder.finish(CONTENT)
    assert not out.exists()
    (out / "unfinished").mkdir(parents=True)  # another one in its place is not ours either
    with pytest.raises(InputError, match="was removed or replaced"):
        folder.path("a.txt")


def test_somebody_elses_folder_of_the_same_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished/thesis.txt").write_text("years of work")
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(InputError, match="no run of this program"):
            RunFolder(tmp_path).open("toy", OPTIONS, **flags)
    assert (tmp_path / "unfinished/thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"job": "toy"}', '{"job": "toy", "options": 1}']
)
def test_a_damaged_description_is_refused(tmp_path: Path, damage: str) -> None:
    folder = RunFolder(tmp_path)
    folder.open("toy", OPTIONS)
    folder.close()
    (tmp_path / "unfinished/run.json").write_text(damage)
    with pytest.raises(InputError, match=r"run\.json is damaged"):
        RunFolder(tmp_path).open("toy", OPTIONS, resume=True)
    assert RunFolder(tmp_path).open("toy", OPTIONS, overwrite=True) is None


def test_a_manifest_does_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("not ours")
    out = tmp_path / "out"
    run_to_the_end(out, "one", ("a.txt",))
    text = (out / "result.json").read_text()
    (out / "result.json").write_text(text.replace('"a.txt"', f'"../outside.txt", "{outside}"'))
    run_to_the_end(out, "two", ("b.txt",), overwrite=True)
    assert outside.read_text() == "not ours"


def test_a_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(InputError, match="cannot be written to"):
        RunFolder(tmp_path / "out").open("toy", OPTIONS)


def test_files_have_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        run_to_the_end(tmp_path, "one", ("a.txt",))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


@contextmanager
def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Die at change number ``step`` of the file system, before it happens."""
    seen: list[str] = []

    def dying(name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            if len(seen) > step:
                raise Killed  # and everything after it too: a dead process changes nothing
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for owner, names in ((os, ("rename", "replace", "unlink", "rmdir", "mkdir", "open")),):
            for name in names:
                patch.setattr(owner, name, dying(name, getattr(owner, name)))
        yield seen


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_at_any_step_can_be_made_good(
    tmp_path: Path, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = 0
    while True:
        out = tmp_path / f"{overwrite}{step}"
        if overwrite:
            run_to_the_end(out, "old", ("a.txt", "gone.txt"))
        folder = RunFolder(out)
        died = False
        with killed_at(step, monkeypatch):
            try:
                folder.open("toy", OPTIONS, overwrite=overwrite)
                folder.path("a.txt").write_text("new")
                folder.path("sub/b.txt").write_text("new")
                folder.finish({**CONTENT, "metrics": {"text": "new"}})
            except Killed:
                died = True
        if folder._lock is not None:
            folder._lock.release()  # as the operating system does for the dead
        if not died:
            break
        complete = (out / "unfinished/result.json").exists()
        # Whatever was reached, --overwrite starts anew, --resume goes on or has nothing to do.
        probe = tmp_path / f"{overwrite}{step}copy"
        if out.exists():
            shutil.copytree(out, probe)
        assert run_to_the_end(probe, "last", ("c.txt",), overwrite=True).metrics == {"text": "last"}
        assert visible(probe) == {"c.txt": "last"}, step
        again = RunFolder(out)
        if not any(p.exists() for p in (out / "unfinished", out / "result.json")):
            with pytest.raises(InputError, match="no run to resume"):
                again.open("toy", OPTIONS, resume=True)
        else:
            found = again.open("toy", OPTIONS, resume=True)
            if complete:
                assert found is not None
                assert found.metrics == {"text": "new"}
            if found is not None and found.metrics == {"text": "new"}:
                assert visible(out) == {"a.txt": "new", "sub/b.txt": "new"}, step
            if found is not None and found.metrics == {"text": "old"}:
                assert visible(out) == {"a.txt": "old", "gone.txt": "old"}, step
        again.close()
        step += 1
    assert step > 10
