"""Options say everything about themselves once, and are checked when they are made."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cmd_plugin.errors import InputError
from cmd_plugin.runs.options import JobOptions, argument, option


@dataclass(frozen=True, kw_only=True)
class Options(JobOptions):
    inputs: tuple[Path, ...] = argument("Files.", positional=True)
    data: str = option("digits", "Data set.", choices=("digits", "mnist"))
    lr: float = option(0.05, "Learning rate.", above=0)
    noise: float = option(0.0, "Label noise.", at_least=0, below=1)
    epochs: int = option(3, "Epochs.", at_least=1)
    limit: int | None = option(None, "Use so many.", at_least=1)
    mode: str = option("online", "Mode.", choices=("online", "embedded"))
    embed_every: int = option(5, "Epochs between events.", only={"mode": ("embedded",)})
    shrink: bool = option(False, "Shrink.")
    threads: int | None = option(None, "CPU threads.", free=True)
    json_file: str = option("", "A file.", flag="json")

    def check_together(self) -> None:
        if self.noise and self.data == "mnist":
            raise InputError("--noise is for digits.")


def make(**changes: Any) -> Options:
    return Options(**{"inputs": (Path("a"),), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "cifar"}, "--data must be one of digits, mnist, got cifar."),
        ({"lr": 0.0}, "--lr must be above 0, got 0.0."),
        ({"lr": float("nan")}, "--lr must be above 0, got nan."),
        ({"lr": float("inf")}, "--lr must be above 0, got inf."),
        ({"noise": 1.0}, "--noise must be at least 0 and below 1, got 1.0."),
        ({"epochs": 0}, "--epochs must be at least 1, got 0."),
        ({"epochs": 2.5}, "--epochs must be a whole number, got 2.5."),
        ({"epochs": True}, "--epochs must be a whole number, got True."),
        ({"limit": 0}, "--limit must be at least 1, got 0."),
        ({"shrink": 1}, "--shrink must be True or False, got 1."),
        ({"inputs": "file"}, "INPUTS must be a list, got 'file'."),
        ({"json_file": 3}, "--json must be text, got 3."),
        ({"noise": 0.1, "data": "mnist"}, "--noise is for digits."),
        (
            {"embed_every": 2},
            (
                "--embed-every has an effect only with --mode embedded, and it is online: change "
                "that or leave it out."
            ),
        ),
    ],
)
def test_a_wrong_value_is_named_as_on_the_command_line(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        make(**changes)
    assert str(caught.value) == message


def test_options_become_json_types_and_free_ones_do_not_decide() -> None:
    options = make(embed_every=2, mode="embedded", threads=2, lr=1)
    everything = options.as_dict()
    assert everything["inputs"] == ["a"]
    assert everything["embed_every"] == 2
    assert options.deciding() == {k: v for k, v in everything.items() if k != "threads"}


def test_an_option_without_default_has_to_be_given() -> None:
    with pytest.raises(TypeError, match="inputs"):
        Options()  # type: ignore[call-arg]


def test_options_load_neither_torch_nor_numpy() -> None:
    code = (
        "import cmd_plugin.runs.options, sys; print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
