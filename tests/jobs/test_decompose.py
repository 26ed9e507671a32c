"""The decompose job: what its result says, and how it goes on after it was stopped."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cmd_plugin.errors import InputError
from cmd_plugin.jobs import decompose
from cmd_plugin.jobs.decompose import DecomposeOptions, run
from cmd_plugin.modes import Decomposition
from cmd_plugin.runs.figures import read_about
from cmd_plugin.runs.progress import Progress
from cmd_plugin.runs.result import Result

EPOCHS = 6


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six epochs of two tensors that move along two directions, and one that stands still."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    first, second = torch.randn(30, 10), torch.randn(40)
    for epoch in range(EPOCHS):
        state = {
            "one.weight": first * (1 + 0.1 * epoch),
            "two.bias": second * (1 + 0.2 * (-1) ** epoch),
            "still": torch.ones(5),
        }
        save_file(state, folder / f"epoch={epoch}.safetensors")
    return folder


def options(folder: Path, **others: Any) -> DecomposeOptions:
    return DecomposeOptions(inputs=(folder,), modes=2, samples=100, **others)


def test_the_result_says_what_was_found_on_what(folder: Path, tmp_path: Path) -> None:
    result = run(options(folder, export=(4,)), tmp_path / "out")
    assert result.job == "decompose"
    assert result.files == (
        "decomposition.png",
        "epoch=004.safetensors",
        "modes.safetensors",
        "result.json",
    )
    assert result.data == {
        "checkpoints": [str(folder / f"epoch={epoch}.safetensors") for epoch in range(EPOCHS)],
        "unit": "epoch",
        "left_out": [],
    }
    assert result.metrics["parameters"] == 345
    assert result.metrics["weight_bytes"] == 4 * 345 * EPOCHS
    layers = {layer["name"]: layer for layer in result.metrics["layers"]}
    assert layers["still"]["explained_variance"] is None
    assert layers["one.weight"]["explained_variance"] == pytest.approx(1.0, abs=1e-3)
    assert layers["one.weight"]["weights"] == 300
    assert Result.load(tmp_path / "out" / "result.json") == result
    assert read_about(tmp_path / "out" / "decomposition.png")["modes"] == 2


def test_an_exported_epoch_is_that_snapshot(folder: Path, tmp_path: Path) -> None:
    run(options(folder, export=(4, 0)), tmp_path / "out")
    saved = Decomposition.load(tmp_path / "out" / "modes.safetensors")
    for epoch in (0, 4):
        found = load_file(tmp_path / "out" / f"epoch={epoch:03d}.safetensors")
        expected = saved.state_dict_at(epoch)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_picture_has_a_row_for_every_tensor(tmp_path: Path) -> None:
    """Also for one that stands still, and long names that differ only at the front stay apart."""
    names = [f"decoder.layers.{n}.attention.parametrizations.weight.original" for n in range(2)]
    for epoch in range(3):
        state = {name: torch.arange(1.0, 31.0) * (1 + epoch) for name in names}
        save_file({"a": torch.ones(5), **state}, tmp_path / f"epoch={epoch}.safetensors")
    run(DecomposeOptions(inputs=(tmp_path,), modes=1, samples=65), tmp_path / "out")
    figure = decompose._draw(Decomposition.load(tmp_path / "out" / "modes.safetensors"), "epoch")
    for axes in figure.axes[1:]:
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert len(set(labels)) == 3
        bottom, top = axes.get_ylim()
        assert top < -0.4 < 2.4 < bottom  # bars are 0.8 wide, around 0, 1 and 2


@pytest.mark.parametrize(
    ("name", "unit", "labels"),
    [
        ("checkpoint-{}/model.safetensors", "step", [100, 200, 1000]),
        ("net_{}.safetensors", "snapshot", [100, 200, 1000]),
    ],
)
def test_what_numbers_the_snapshots_is_said(
    tmp_path: Path, name: str, unit: str, labels: list[int]
) -> None:
    """Steps are no epochs: neither on the axis nor in the name of an exported file."""
    weights = torch.randn(50)
    files = [tmp_path / name.format(label) for label in labels]
    for number, file in enumerate(files):
        file.parent.mkdir(exist_ok=True)
        save_file({"weight": weights * (1 + number)}, file)
    method = {"modes": 1, "samples": 50, "storage": "fp32"}
    chosen = DecomposeOptions(inputs=tuple(reversed(files)), export=(200,), **method)
    result = run(chosen, tmp_path / "out")
    assert result.data["unit"] == unit
    assert result.metrics["epochs"] == labels
    found = load_file(tmp_path / "out" / f"{unit}=200.safetensors")["weight"]
    torch.testing.assert_close(found, 2 * weights)
    figure = decompose._draw(Decomposition.load(tmp_path / "out" / "modes.safetensors"), unit)
    assert figure.axes[0].get_xlabel() == unit


def test_an_unknown_epoch_exports_nothing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="epoch 9 was not recorded"):
        run(options(folder, export=(4, 9)), tmp_path / "out")
    assert not list(tmp_path.rglob("epoch=004*"))


def test_one_progress_over_both_passes(folder: Path) -> None:
    events: list[Progress] = []
    run(options(folder), None, progress=events.append)
    assert [event.done for event in events] == list(range(1, 2 * EPOCHS + 1))
    assert {event.total for event in events} == {2 * EPOCHS}
    assert [event.stage for event in events[EPOCHS - 1 : EPOCHS + 1]] == [
        "reading checkpoints",
        "measuring the error",
    ]


def stop_at(stage: str) -> Callable[[Progress], None]:
    def report(event: Progress) -> None:
        if event.stage == stage and event.done % EPOCHS == 3:
            raise KeyboardInterrupt

    return report


@pytest.mark.parametrize("stage", ["reading checkpoints", "measuring the error"])
def test_a_stopped_run_goes_on_to_the_same_result(folder: Path, tmp_path: Path, stage: str) -> None:
    """Also when the training it looks at has gone on meanwhile: it keeps to its files."""
    expected = run(options(folder), tmp_path / "straight")
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(options(folder), out, progress=stop_at(stage))
    if stage == "measuring the error":
        later = folder / f"epoch={EPOCHS}.safetensors"
        os.link(folder / "epoch=0.safetensors", later)
    events: list[Progress] = []
    result = run(options(folder), out, resume=True, progress=events.append)
    assert result.metrics == expected.metrics
    assert result.data == expected.data
    assert (events[0].stage == "reading checkpoints") == (stage == "reading checkpoints")
    straight, gone_on = (
        load_file(tmp_path / name / "modes.safetensors") for name in ("straight", "out")
    )
    assert straight.keys() == gone_on.keys()
    assert all(torch.equal(straight[name], gone_on[name]) for name in straight)


def test_what_was_left_out_is_said_again_when_a_run_goes_on(folder: Path, tmp_path: Path) -> None:
    damaged = folder / "epoch=2.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:50])
    chosen = options(folder, skip_unreadable=True)
    with (
        pytest.warns(UserWarning, match=r"left out: .*epoch=2\.safetensors"),
        pytest.raises(KeyboardInterrupt),
    ):
        run(chosen, tmp_path / "out", progress=stop_at("measuring the error"))
    with pytest.warns(UserWarning, match=r"left out: .*epoch=2\.safetensors"):
        result = run(chosen, tmp_path / "out", resume=True)
    (sentence,) = result.data["left_out"]
    assert str(damaged) in sentence
    assert str(damaged) not in result.data["checkpoints"]
    assert result.metrics["snapshots"] == EPOCHS - 1


def test_inputs_are_required() -> None:
    with pytest.raises(InputError, match="INPUTS must name at least one"):
        DecomposeOptions(inputs=())
