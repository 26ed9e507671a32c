"""The options of the points jobs: bounds, choices, and what has no effect is refused."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cmd_plugin.errors import InputError
from cmd_plugin.jobs.classifier import OPTIMIZERS, SCHEDULES
from cmd_plugin.jobs.points.options import ExplainOptions, RobustnessOptions, TrainOptions
from cmd_plugin.runs.options import JobOptions, option_fields


def explain(**changes: Any) -> ExplainOptions:
    return ExplainOptions(**{"clouds": (Path("a.npy"),), "weights": Path("b.pt"), **changes})


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (TrainOptions, {"data": "shpes"}, "--data must be one of shapes, chairs-monitors, hdf5"),
        (TrainOptions, {"model": "pointnext"}, "--model must be one of"),
        (TrainOptions, {"lr": 0.0}, "--lr must be above 0"),
        (TrainOptions, {"epochs": 0}, "--epochs must be at least 1"),
        (TrainOptions, {"batch_size": 1}, "--batch-size must be at least 2"),
        (TrainOptions, {"width": float("nan")}, "--width must be above 0"),
        (TrainOptions, {"weight_decay": -1.0}, "--weight-decay must be at least 0"),
        (TrainOptions, {"seed": -1}, "--seed must be at least 0"),
        (TrainOptions, {"fewest": 20}, "--fewest has an effect only with --uncritical"),
        (TrainOptions, {"data_root": "D"}, "--data-root has an effect only with --data chairs-mon"),
        (RobustnessOptions, {"model": "alexnet"}, "--model must be one of pointnet"),
        (RobustnessOptions, {"rounding": "floor"}, "--rounding must be one of official, exact"),
        (RobustnessOptions, {"epochs": 0}, "--epochs must be at least 1"),
        (RobustnessOptions, {"rounds": 0}, "--rounds must be at least 1"),
        (RobustnessOptions, {"width": 0.0}, "--width must be above 0"),
        (RobustnessOptions, {"batch_size": 1}, "--batch-size must be at least 2"),
        (RobustnessOptions, {"seed": -1}, "--seed must be at least 0"),
        (explain, {"measure": "lime"}, "--measure must be one of fbi, critical, critical++"),
        (explain, {"axes": "xyy"}, "--axes must be one of xyz, xzy, yxz, yzx, zxy, zyx"),
        (explain, {"up": "w"}, "--up must be one of x, y, z"),
        (explain, {"points": 0}, "--points must be at least 1"),
        (explain, {"width": 0.5}, "--width has an effect only with --model pointnet or"),
        (explain, {"item": 3}, "--item chooses among the voxel grids of a .npy.gz file, and a.npy"),
    ],
)
def test_what_cannot_be_used_is_named(make: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        make(**changes)
    assert message in str(caught.value)


def test_options_that_have_an_effect_are_taken() -> None:
    assert TrainOptions(uncritical=True, fewest=20).fewest == 20
    assert TrainOptions(data="hdf5", data_root="D").data_root == "D"
    assert explain(model="dgcnn", width=0.5).width == 0.5
    assert explain(clouds=(Path("grids.npy.gz"),), item=3).item == 3


def test_defaults_are_those_of_each_job() -> None:
    names = ("width", "points", "train_clouds", "test_clouds", "batch_size", "lr", "epochs")
    assert [getattr(TrainOptions(), name) for name in names] == [0.5, 512, None, None, 32, 2e-3, 15]
    found = [getattr(RobustnessOptions(), name) for name in names]
    assert found == [0.25, 256, 240, 60, 8, 3e-3, 15]


def test_choices_are_those_of_the_training() -> None:
    about = {field.name: about for field, _, about in option_fields(TrainOptions)}
    assert about["optimizer"].choices == OPTIMIZERS
    assert about["schedule"].choices == SCHEDULES


@pytest.mark.parametrize("kind", [TrainOptions, RobustnessOptions, ExplainOptions])
def test_every_option_is_described_and_an_example_runs(kind: type[JobOptions]) -> None:
    assert all(about.help.endswith(".") for _, _, about in option_fields(kind))
    verb = kind.__name__.removesuffix("Options").lower()
    assert f"Examples:\n      cmd-plugin points {verb}" in str(kind.__doc__)


def test_where_and_how_fast_do_not_decide() -> None:
    here = TrainOptions(data="hdf5", data_root="A", threads=1)
    there = TrainOptions(data="hdf5", data_root="B", threads=2, accelerator="auto")
    assert here.deciding() == there.deciding()


def test_how_networks_are_evaluated_does_not_decide_what_they_are() -> None:
    plain = RobustnessOptions()
    judged = dataclasses.replace(
        plain, test_clouds=9, rounding="exact", released=Path("r"), networks=Path("n"), threads=3
    )
    assert plain.settings == judged.settings
    assert plain.settings != dataclasses.replace(plain, epochs=3).settings
    assert plain.deciding() != judged.deciding()


def test_options_cost_no_torch() -> None:
    code = "import cmd_plugin.jobs.points.options, sys; print({'torch', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
