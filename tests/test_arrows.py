"""Imports go down: the floors of the house, read from every import statement of the package."""

from __future__ import annotations

import ast
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import cmd_plugin

PACKAGE = Path(cmd_plugin.__file__).parent

# From the ground up. A room may import rooms of lower floors; those of its own floor only where
# they are named below.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "machine", "_face"),
    ("kernels",),
    ("runs", "networks", "data"),
    ("modes", "pointcloud", "diffusion", "clip", "distinction"),
    ("callbacks", "federated"),
    ("jobs",),
    ("cli", "__main__"),
)
NEIGHBOURS = {("networks", "data"), ("networks", "runs"), ("data", "runs"), ("__main__", "cli")}
LIGHTNING = {"pytorch_lightning", "lightning", "lightning_fabric"}
# Who may name whose engine at all.
ENGINES = {
    **{name: {"callbacks", "federated", "jobs", "distinction"} for name in LIGHTNING},
    "flwr": {"federated", "jobs"},
    "cyclopts": {"cli"},
    "rich": {"cli"},
}


def floor(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def imports() -> Iterator[tuple[str, str, str]]:
    """Yield (file, room, module imported) of every import statement, lazy ones as well."""
    # os.walk follows the two links: their files are part of the package.
    folders = os.walk(PACKAGE, followlinks=True)
    files = [Path(folder, name) for folder, _, names in folders for name in names]
    for path in sorted(file for file in files if file.suffix == ".py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        room = parts[0]
        if room == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules: list[str] = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: imports are absolute"
                modules = [node.module or ""]
                if node.module == "cmd_plugin":
                    modules = [f"cmd_plugin.{alias.name}" for alias in node.names]
            yield from (("/".join(parts), room, module) for module in modules)


def test_every_room_stands_on_a_floor() -> None:
    rooms = {p.stem if p.is_file() else p.name for p in PACKAGE.iterdir()}
    rooms = {r for r in rooms if r not in ("__init__", "__pycache__", "py")}
    assert rooms <= {room for rooms in FLOORS for room in rooms}


def test_the_links_are_read_as_well() -> None:
    assert {"kernels", "callbacks"} <= {room for _, room, _ in imports()}


def test_imports_go_down() -> None:
    wrong = []
    for file, room, module in imports():
        if not module.startswith("cmd_plugin.") or module == "cmd_plugin.__version__":
            continue
        other = module.split(".")[1]
        if other == room or (room, other) in NEIGHBOURS:
            continue
        if floor(other) >= floor(room):
            wrong.append(f"{file} imports {module}")
    assert wrong == []


def test_engines_are_named_only_where_they_belong() -> None:
    wrong = [
        f"{file} imports {module}"
        for file, room, module in imports()
        if room not in ENGINES.get(module.split(".")[0], {room})
    ]
    assert wrong == []


def test_of_class_evidence_the_explainers_alone_know_lightning() -> None:
    found = {
        f for f, room, m in imports() if room == "distinction" and m.split(".")[0] in LIGHTNING
    }
    assert found == {"distinction/explainer", "distinction/lightning"}


def test_every_internal_import_exists() -> None:
    for file, _, module in imports():
        if module.startswith("cmd_plugin.") and module != "cmd_plugin.__version__":
            assert importlib.util.find_spec(module) is not None, f"{file}: {module}"
