"""A run that was stopped anywhere ends, when it is resumed, with the bits of one that was not."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from cmd_plugin.errors import InputError
from cmd_plugin.jobs.federated import SimulateOptions, apps, simulate
from cmd_plugin.jobs.federated.saving import load_state, save_state
from cmd_plugin.runs.result import Result
from tests.helpers.processes import run_script

SMALL: dict[str, Any] = {
    "clients": 4,
    "rounds": 4,
    "train_limit": 60,
    "test_limit": 30,
    "model": "cnn:4",
    "threads": 1,
}
CMD: dict[str, Any] = {"warmup": 2, "modes": 3, "samples": 60, "embed_percent": 40.0}
METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {"method": "fedavg"},
    "cmd": CMD,
    "cmd, 8 bit": {**CMD, "bits": 8},
    "cmd, tied": {**CMD, "project": "tie", "pool": False},
    "apf": {"method": "apf", "apf_threshold": 0.5},
    "a-apf": {"method": "a-apf", "apf_threshold": 0.5},
    "topk": {"method": "topk"},
    "fedpaq": {"method": "fedpaq"},
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that compare numbers need not draw them."""
    monkeypatch.setattr(simulate, "draw_report", lambda *_: None)
    monkeypatch.setattr(simulate, "save_figure", lambda *_: None)


def left(out: Path) -> tuple[dict[str, bytes], Any]:
    """What a run left that may not depend on when it was stopped."""
    result = Result.load(out / "result.json")
    names = ("metrics.csv", "model.safetensors")
    return {n: (out / n).read_bytes() for n in names}, (result.metrics, result.data, result.files)


class StopAfter:
    """Raises KeyboardInterrupt in the middle of a client's training, after so many batches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches = -1
        self.seen = 0
        original = apps.cross_entropy

        def watched(*args: Any) -> Any:
            self.seen += 1
            if self.seen == self.batches:
                raise KeyboardInterrupt
            return original(*args)

        monkeypatch.setattr(apps, "cross_entropy", watched)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("method", METHODS)
def test_stopped_in_mid_round_and_resumed(
    method: str, fraction: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice: once before the first round has ended, or soon after, and once in a later one."""
    options = SimulateOptions(**SMALL, **METHODS[method], fraction=fraction)
    stop = StopAfter(monkeypatch)
    simulate.run(options, tmp_path / "whole")
    draw = random.Random(f"{method} {fraction}")
    first, second = sorted(draw.sample(range(1, stop.seen), 2))
    for number, batches in enumerate((first, second - first + 1)):
        stop.batches, stop.seen = batches, 0
        with pytest.raises(KeyboardInterrupt):
            simulate.run(options, tmp_path / "out", resume=number > 0)
        assert not (tmp_path / "out/result.json").exists()
    stop.batches = -1
    random.seed(number)  # a new process has another state
    found = simulate.train(options, tmp_path / "out", resume=True)
    assert left(tmp_path / "out") == left(tmp_path / "whole")
    whole = simulate.train(options, tmp_path / "whole", resume=True)
    assert all(torch.equal(found.state_dict[n], t) for n, t in whole.state_dict.items())
    assert not (tmp_path / "out/unfinished").exists()


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from cmd_plugin.jobs.federated import SimulateOptions, apps, simulate
left, original = int(sys.argv[2]), apps.cross_entropy
def watched(*args):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args)
apps.cross_entropy = watched
simulate.run(SimulateOptions(**eval(sys.argv[3])), sys.argv[1], resume=sys.argv[4] == "True")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
@pytest.mark.parametrize("method", ["cmd, 8 bit", "a-apf", "topk"])
def test_killed_three_times_and_resumed(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL, at places drawn over the whole run, each in a process of its own."""
    options = {**SMALL, **METHODS[method], "fraction": 0.5}
    stop = StopAfter(monkeypatch)
    simulate.run(SimulateOptions(**options), tmp_path / "whole")
    total, draw = stop.seen, random.Random(method)
    out = tmp_path / "out"
    for number in range(3):
        batches = draw.randrange(1, total // 2)
        child = run_script(KILLED, str(out), str(batches), repr(options), str(number > 0))
        if child.returncode == 0:  # so few rounds were left that it ended before
            break
        assert child.returncode == -signal.SIGKILL, child.stderr
    simulate.run(SimulateOptions(**options), out, resume=True)
    assert left(out) == left(tmp_path / "whole")


def stopped(out: Path, rounds: int) -> SimulateOptions:
    """A run that was stopped after so many rounds."""

    def stop(event: Any) -> None:
        if event.done == rounds:
            raise KeyboardInterrupt

    options = SimulateOptions(**SMALL, **CMD)
    with pytest.raises(KeyboardInterrupt):
        simulate.run(options, out, progress=stop)
    return options


def test_a_round_whose_state_was_not_saved_is_made_again(tmp_path: Path) -> None:
    """Rows and model may be one round ahead of the state; what happens to them does not matter."""
    options = stopped(tmp_path / "out", 2)
    state = tmp_path / "out/unfinished/state/rounds.safetensors"
    before = state.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        simulate.run(options, tmp_path / "out", resume=True, progress=interrupt)
    assert state.read_bytes() != before
    state.write_bytes(before)
    (tmp_path / "out/unfinished/metrics.csv").write_text("nonsense")
    (tmp_path / "out/unfinished/model.safetensors").unlink()
    simulate.run(options, tmp_path / "out", resume=True)
    simulate.run(options, tmp_path / "whole")
    assert left(tmp_path / "out") == left(tmp_path / "whole")


def interrupt(event: Any) -> None:
    raise KeyboardInterrupt(event)


REFUSED = r"cannot go on \(.*\): start again with --overwrite\.$"


def test_a_damaged_state_is_refused_and_can_be_replaced(tmp_path: Path) -> None:
    options = stopped(tmp_path, 3)
    path = tmp_path / "unfinished/state/rounds.safetensors"
    whole, state = path.read_bytes(), load_state(path)
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    for damage in (b"", whole[:-1], bytes(flipped)):
        path.write_bytes(damage)
        with pytest.raises(
            InputError, match=r"cannot go on \(.*\): start again with --overwrite\.$"
        ):
            simulate.run(options, tmp_path, resume=True)
    for change in (
        {"traffic": {}},
        {"arrays": state["arrays"][1:]},
        {"strategy": {**state["strategy"], "kind": "APFStrategy"}},
        {"clients": {"sent": 1, "contexts": []}},
        {"rounds": [[1]]},
        {"random": [3, [], None]},
    ):
        save_state(path, {**state, **change})
        with pytest.raises(
            InputError, match=r"cannot go on \(.*\): start again with --overwrite\.$"
        ):
            simulate.run(options, tmp_path, resume=True)
    simulate.run(options, tmp_path, overwrite=True)
    assert (tmp_path / "result.json").exists()


def test_a_removed_folder_is_noticed(tmp_path: Path) -> None:
    def remove(event: Any) -> None:
        if event.done == 1:
            (tmp_path / "out/unfinished").rename(tmp_path / "elsewhere")

    with pytest.raises(InputError, match="was removed or replaced while the run went on"):
        simulate.run(SimulateOptions(**SMALL, **CMD), tmp_path / "out", progress=remove)


def test_ray_refuses_to_go_on(tmp_path: Path) -> None:
    stopped(tmp_path, 2)
    options = SimulateOptions(**SMALL, **CMD, engine="ray")
    with pytest.raises(InputError, match=r"--engine ray cannot go on with a run, .* inprocess"):
        simulate.run(options, tmp_path, resume=True)
    (tmp_path / "unfinished/state/rounds.safetensors").unlink()  # as ray leaves none
    rounds: list[float] = []
    here = SimulateOptions(**SMALL, **CMD)
    simulate.run(here, tmp_path, resume=True, progress=lambda event: rounds.append(event.done))
    assert rounds == [0, 1, 2, 3, 4]
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 1 + 5
    given = simulate.run(options, tmp_path, resume=True)  # a finished run is given back
    assert given.options["engine"] == "inprocess"
