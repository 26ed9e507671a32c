"""The bench job: one stage a kernel, and rows of one machine only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cmd_plugin import machine
from cmd_plugin.errors import InputError
from cmd_plugin.jobs.bench import BenchOptions, run
from cmd_plugin.kernels import bench
from cmd_plugin.runs.progress import Progress
from cmd_plugin.runs.result import Result
from cmd_plugin.runs.table import Table

NAMES = ("swap_in", "swap_out", "reconstruct")


def options(**others: Any) -> BenchOptions:
    chosen = {"size": 2000, "repeats": 1, "compiled": False, "device": "cpu", "kernel": NAMES}
    return BenchOptions(**{**chosen, **others})


def test_rows_come_in_the_order_of_the_kernels(tmp_path: Path) -> None:
    events: list[Progress] = []
    result = run(options(), tmp_path, progress=events.append)
    names = [row["kernel"] for row in result.metrics["kernels"]]
    assert names == ["reconstruct", "swap_in", "swap_out"]
    assert events == [Progress(name, number, 3) for number, name in enumerate(names)]
    assert result.files == ("kernels.csv", "result.json")
    assert Result.load(tmp_path / "result.json") == result


def test_the_table_holds_the_same_numbers(tmp_path: Path) -> None:
    rows = run(options(), tmp_path).metrics["kernels"]
    header = (tmp_path / "kernels.csv").read_text().splitlines()[0].split(",")
    table = Table(tmp_path / "kernels.csv", dict.fromkeys(header, str)).rows()
    for row, line in zip(rows, table, strict=True):
        cells = dict(zip(header, line, strict=True))
        assert row.keys() <= cells.keys()
        assert cells["compile_seconds"] == "" != cells["seconds"]
        assert float(cells["seconds"]) == row["seconds"]
        assert cells["kernel"] == row["kernel"]


def test_threads_are_those_of_the_run_and_given_back(tmp_path: Path) -> None:
    import torch

    before = torch.get_num_threads()
    assert run(options(threads=before + 1), tmp_path).machine["threads"] == before + 1
    assert torch.get_num_threads() == before


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that were measured; the second call is interrupted."""
    names: list[str] = []

    def measure(size: int, wanted: list[str], **_: Any) -> Iterator[dict[str, Any]]:
        names.extend(wanted)
        if len(names) == 2:
            raise KeyboardInterrupt
        yield {"kernel": wanted[0], "size": size, "seconds": 0.5, "max_error": float("nan")}

    monkeypatch.setattr(bench, "measure_kernels", measure)
    return names


def test_a_stopped_run_goes_on_with_the_next_kernel(tmp_path: Path, measured: list[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(options(), tmp_path)
    result = run(options(), tmp_path, resume=True)
    assert measured == ["reconstruct", "swap_in", "swap_in", "swap_out"]
    kernels = [row["kernel"] for row in result.metrics["kernels"]]
    assert kernels == ["reconstruct", "swap_in", "swap_out"]
    assert result.metrics["kernels"][0]["max_error"] is None
    assert "NaN" not in (tmp_path / "result.json").read_text()
    json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)


def test_rows_of_two_machines_are_not_mixed(
    tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(options(), tmp_path)
    monkeypatch.setattr(machine, "_processor", lambda: "another one")
    with pytest.raises(InputError, match=r"processor=.*another one.*--overwrite"):
        run(options(), tmp_path, resume=True)
    assert len(measured) == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kernel": ("nonsense",)}, "unknown kernel 'nonsense': choose from snapshot_delta"),
        ({"device": "cuda"}, "there is no CUDA device here"),
    ],
)
def test_wrong_input_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match=message):
        run(options(**wrong), tmp_path / "out")
    assert not (tmp_path / "out").exists()
