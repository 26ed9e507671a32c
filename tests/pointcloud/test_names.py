"""Names are known without torch, and mean what the room has; its face imports what is asked for."""

from __future__ import annotations

import subprocess
import sys

from cmd_plugin.pointcloud.corruption_error import mean_corruption_error
from cmd_plugin.pointcloud.corruptions import CORRUPTIONS
from cmd_plugin.pointcloud.names import NETWORK_NAMES, ROUNDINGS
from cmd_plugin.pointcloud.networks import NETWORKS


def loaded_after(code: str) -> set[str]:
    """Modules that a fresh process holds after running ``code``."""
    code += "\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_names_are_those_of_the_networks_and_roundings() -> None:
    assert tuple(NETWORKS) == NETWORK_NAMES
    levels = {name: [0.5] * 5 for name in CORRUPTIONS}
    for rounding in ROUNDINGS:
        mean_corruption_error(levels, 0.5, rounding=rounding)  # type: ignore[arg-type]


def test_names_cost_no_torch() -> None:
    assert not {"torch", "numpy"} & loaded_after("import cmd_plugin.pointcloud.names")


def test_the_face_imports_what_is_asked_for_and_nothing_else() -> None:
    loaded = loaded_after("from cmd_plugin.pointcloud import point_importance, refocus")
    assert "cmd_plugin.pointcloud.refocusing" in loaded
    assert not {"torchmetrics", "matplotlib", "cmd_plugin.pointcloud.epic"} & loaded


def test_no_module_stands_in_the_way_of_a_name() -> None:
    code = """
import importlib, pkgutil, types
import cmd_plugin.pointcloud as room
for found in pkgutil.iter_modules(room.__path__):
    importlib.import_module(f"{room.__name__}.{found.name}")
print(*(name for name in room.__all__ if isinstance(getattr(room, name), types.ModuleType)))
print(len(room.__all__) == len(set(room.__all__)), dir(room) == sorted(room.__all__))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["", "True True"]
