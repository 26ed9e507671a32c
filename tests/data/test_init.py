"""The face of the room is lazy: a name brings what it needs and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import cmd_plugin.data as room

HEAVY = {"PIL", "torchvision", "sklearn", "matplotlib", "lightning", "pytorch_lightning", "torch"}


@pytest.mark.parametrize(
    ("statements", "loaded"),
    [
        (
            [
                "from cmd_plugin.data import DATASETS, ReadLimits",
                "from cmd_plugin.data.order import natural_key",
            ],
            set(),
        ),
        (["import cmd_plugin.data.splits", "from cmd_plugin.data import make_loader"], {"torch"}),
        (["from cmd_plugin.data import load_dataset, read_images"], {"torch", "PIL"}),
    ],
)
def test_a_name_brings_only_what_it_needs(statements: list[str], loaded: set[str]) -> None:
    code = "\n".join([*statements, "import json, sys", "print(json.dumps(sorted(sys.modules)))"])
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True
    )
    assert HEAVY & {name.split(".")[0] for name in json.loads(output.stdout)} == loaded


def test_the_room_lists_its_names_and_has_no_others() -> None:
    assert dir(room) == sorted(room.__all__)
    assert [name for name in room.__all__ if not hasattr(room, name)] == []
    with pytest.raises(AttributeError, match="has no attribute 'read_movies'"):
        _ = room.read_movies
