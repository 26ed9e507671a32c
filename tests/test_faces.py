"""Importing a name loads its room and no other: each public name, imported in a fresh process."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMES = {
    room: names
    for room, names in json.loads((ROOT / "tests/public_api.json").read_text("utf-8")).items()
    if room != "cmd_plugin"
}
METHODS = {"modes", "pointcloud", "diffusion", "clip", "distinction"}
LIGHTNING = {"pytorch_lightning", "lightning", "lightning_fabric"}
PICTURES = {"matplotlib", "plotly"}
TOWERS = {"open_clip", "transformers"}
LATE = {"timm", "torchvision", "sklearn", "captum", "h5py", "trimesh", "diffusers", *TOWERS}

# What must not come along with any name of a room.
FORBIDDEN = {
    "cmd_plugin.callbacks": {"flwr", *PICTURES, *LATE},
    "cmd_plugin.clip": {"flwr", *LIGHTNING, *PICTURES, *LATE, *METHODS - {"clip"}},
    "cmd_plugin.data": {"flwr", *LIGHTNING, *PICTURES, *METHODS, "torchvision", "timm"},
    "cmd_plugin.diffusion": {"flwr", *LIGHTNING, *PICTURES, *LATE, *METHODS - {"diffusion"}},
    "cmd_plugin.distinction": {
        *{"flwr", *LIGHTNING, *PICTURES, *LATE},
        *METHODS - {"distinction"},
    },
    "cmd_plugin.errors": {"torch", "numpy"},
    "cmd_plugin.federated": {*LIGHTNING, *PICTURES, *LATE, "pointcloud"},
    "cmd_plugin.kernels": {"flwr", *LIGHTNING, *PICTURES, *LATE, *METHODS},
    "cmd_plugin.modes": {"flwr", *LIGHTNING, *PICTURES, *LATE, "pointcloud"},
    "cmd_plugin.networks": {"flwr", *LIGHTNING, *PICTURES, *METHODS},
    "cmd_plugin.pointcloud": {"flwr", *LIGHTNING, *PICTURES, "modes"},
    "cmd_plugin.runs": {"flwr", *LIGHTNING, *PICTURES, *METHODS, *LATE},
}
# What some names must not bring either, and what some may, being made for it.
ALSO = {
    "cmd_plugin.callbacks.CMDCallback": {"pointcloud", "diffusion", "clip"},
    "cmd_plugin.callbacks.EmbeddingGeometryMonitor": {"pointcloud", "diffusion", "modes"},
    "cmd_plugin.callbacks.MemorizationMonitor": {"pointcloud", "clip", "modes"},
    "cmd_plugin.callbacks.PointImportanceMonitor": {"diffusion", "clip"},
}
_ENGINES = {*LIGHTNING, *PICTURES, "torchvision"}
MAY = {
    "cmd_plugin.clip.Whitener": {"sklearn"},
    "cmd_plugin.distinction.DecompositionAttribution": {*_ENGINES, "captum"},
    "cmd_plugin.distinction.DecompositionExplainer": _ENGINES,
}

# What every name of a room needs, and what takes seconds to import.
START: dict[str, tuple[str, ...]] = {
    "cmd_plugin.errors": (),
    "cmd_plugin.callbacks": ("torch", "pytorch_lightning", "lightning.pytorch"),
    "cmd_plugin.clip": ("torch", "torchmetrics"),  # a metric is one of theirs
    "cmd_plugin.distinction": ("torch", "torchmetrics"),
    "cmd_plugin.pointcloud": ("torch", "torchmetrics"),
    "cmd_plugin.federated": ("torch", "flwr.app", "flwr.clientapp", "flwr.serverapp.strategy"),
}

# The child imports each name in a fork of its own: as fresh as a new process, without its seconds.
# What the start loads for itself is forgotten (of Lightning: matplotlib and torchvision), so that
# a name that asks for it imports it once more.
CHILD = """
import json, os, sys
for module in sys.argv[2:]:
    __import__(module)
for module in list(sys.modules):
    if module.split(".")[0] in sys.argv[1].split(","):
        del sys.modules[module]
for room, name in json.load(sys.stdin):
    sys.stdout.flush()
    if os.fork() == 0:
        try:
            getattr(__import__(room, fromlist=[name]), name)
            error = ""
        except Exception as caught:
            error = repr(caught)
        tops = {m.split(".")[0] for m in sys.modules}
        tops |= {m.split(".")[1] for m in sys.modules if m.startswith("cmd_plugin.")}
        print(json.dumps([room, name, sorted(tops), error]), flush=True)
        os._exit(0)
    os.wait()
"""


def start_of(room: str) -> tuple[str, ...]:
    return START.get(room, ("torch",))


@functools.cache
def import_each(start: tuple[str, ...]) -> list[tuple[str, str, list[str], str]]:
    """Return (room, name, what came along, error) for all names of the rooms that start so."""
    rooms = [room for room in sorted(NAMES) if start_of(room) == start]
    forgotten = ",".join(sorted(PICTURES | LATE | TOWERS))
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, forgotten, *start],
        input=json.dumps([(room, name) for room in rooms for name in NAMES[room]]),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in child.stdout.splitlines()]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("room", sorted(NAMES))
def test_a_name_brings_no_other_room_along(room: str) -> None:
    if room == "cmd_plugin.federated":
        pytest.importorskip("flwr")
    rows = [row for row in import_each(start_of(room)) if row[0] == room]
    assert [row[1] for row in rows] == NAMES[room]
    for _, name, came, error in rows:
        assert error == "", name
        whole = f"{room}.{name}"
        forbidden = (FORBIDDEN[room] | ALSO.get(whole, set())) - MAY.get(whole, set())
        assert not forbidden & set(came), (name, forbidden & set(came))


def test_every_room_is_looked_at() -> None:
    assert set(FORBIDDEN) == set(NAMES)
