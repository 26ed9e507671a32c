"""What each public module exports is a promise: changing it means changing a checked-in list.

To write the list again after an intended change, run ``python tests/test_public_api.py``.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

import cmd_plugin

LIST = Path(__file__).with_name("public_api.json")
MODULES = [
    "cmd_plugin",
    *(f"cmd_plugin.{name}" for name in dir(cmd_plugin) if not name.startswith("_")),
]


# What a room's names need beside the package itself; where it is missing, the room is not checked.
NEEDS = {"cmd_plugin.federated": "flwr"}


def exported() -> dict[str, list[str]]:
    """Names each public module exports, as written in its ``__all__``."""
    return {name: sorted(importlib.import_module(name).__all__) for name in MODULES}


@pytest.mark.parametrize("name", MODULES)
def test_every_exported_name_exists_once(name: str) -> None:
    pytest.importorskip(NEEDS.get(name, "cmd_plugin"))
    module = importlib.import_module(name)
    assert len(module.__all__) == len(set(module.__all__))
    assert [entry for entry in module.__all__ if not hasattr(module, entry)] == []


@pytest.mark.parametrize("name", MODULES)
def test_every_export_is_described(name: str) -> None:
    pytest.importorskip(NEEDS.get(name, "cmd_plugin"))
    module = importlib.import_module(name)
    things = {entry: getattr(module, entry) for entry in module.__all__}
    assert [e for e, thing in things.items() if callable(thing) and not thing.__doc__] == []


def test_exports_are_the_checked_in_list() -> None:
    assert exported() == json.loads(LIST.read_text(encoding="utf-8"))


def test_each_room_is_reached_from_the_package() -> None:
    for name in MODULES[1:]:
        assert getattr(cmd_plugin, name.split(".")[1]) is importlib.import_module(name)


if __name__ == "__main__":
    LIST.write_text(json.dumps(exported(), indent=2) + "\n", encoding="utf-8")
