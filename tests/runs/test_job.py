"""A job does each stage once, goes on where it was stopped, and ends in one result."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cmd_plugin.errors import InputError
from cmd_plugin.runs.files import write_atomically
from cmd_plugin.runs.job import Job
from cmd_plugin.runs.options import JobOptions, option
from cmd_plugin.runs.progress import Progress
from cmd_plugin.runs.result import Result


@dataclass(frozen=True, kw_only=True)
class Options(JobOptions):
    seeds: int = option(3, "Seeds.", at_least=1)
    threads: int | None = option(None, "Threads.", free=True)


def run(
    options: Options, out: Path | None, done: list[int], stop: int = 99, **flags: Any
) -> Result:
    with Job("toy", options, out, **flags) as job:
        if job.result is not None:
            return job.result

        def work(seed: int) -> dict[str, Any]:
            if seed == stop:
                raise KeyboardInterrupt
            done.append(seed)
            job.report(f"seed {seed}", seed + 1, options.seeds, "fine")
            return {"seed": seed, "pair": (1, 2)}

        found = [job.stage(f"seed{seed}", lambda seed=seed: work(seed)) for seed in range(3)]
        job.folder.write(job.folder.path("note.txt"), lambda path: path.write_text("hello"))
        return job.finish(metrics={"found": found}, data={"name": "none"})


def test_a_stopped_job_goes_on_after_its_last_finished_stage(tmp_path: Path) -> None:
    done: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        run(Options(), tmp_path, done, stop=2)
    result = run(Options(threads=2), tmp_path, done, resume=True)
    assert done == [0, 1, 2]
    assert result.metrics["found"][1] == {"seed": 1, "pair": [1, 2]}
    assert result.files == ("note.txt", "result.json")
    assert Result.load(tmp_path / "result.json") == result
    assert run(Options(), tmp_path, done, resume=True).metrics == result.metrics
    assert done == [0, 1, 2]


def test_a_result_says_where_it_comes_from(tmp_path: Path) -> None:
    result = run(Options(), tmp_path, [])
    assert result.job == "toy"
    assert result.options == {"seeds": 3, "threads": None}
    assert result.machine["versions"]["torch"]
    assert result.seconds["total"] > 0


def test_progress_is_one_kind_of_event() -> None:
    events: list[Progress] = []
    run(Options(), None, [], progress=events.append)
    assert events == [Progress(f"seed {n}", n + 1, 3, "fine") for n in range(3)]


def test_a_damaged_stage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(Options(), tmp_path, [], stop=2)
    (tmp_path / "unfinished/state/seed0.json").write_text('{"seed": ')
    with pytest.raises(InputError, match=r"seed0\.json is damaged"):
        run(Options(), tmp_path, [], resume=True)


def test_not_a_number_never_reaches_a_result(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"), Job("toy", Options(), tmp_path) as job:
        job.finish(metrics={"loss": float("nan")}, data={})
    assert not (tmp_path / "result.json").exists()


def test_a_full_disk_is_a_sentence_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"a\.bin cannot be written \(File too large\)"):
            write_atomically(path, lambda file: file.write_bytes(b"x" * 5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("finished", [False, True])
def test_a_run_that_fails_before_anything_was_finished_leaves_nothing(
    tmp_path: Path, finished: bool
) -> None:
    out = tmp_path / "out"
    if finished:
        run(Options(), out, [])
    for error in (InputError("wrong"), ZeroDivisionError()):
        with pytest.raises(type(error)), Job("toy", Options(), out, overwrite=finished):
            raise error
        assert out.exists() == finished
        assert not (out / "unfinished").exists()
    with pytest.raises(KeyboardInterrupt):
        run(Options(), out, [], stop=1, overwrite=finished)
    assert (out / "unfinished/state/seed0.json").exists()
