"""Importing a callback loads that callback."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import cmd_plugin.callbacks

# Lightning itself loads matplotlib (through torchmetrics), so it comes first and what it brought is
# forgotten: our import would have to ask for it again. One distribution of it, to save time.
_SCRIPT = """
import json, sys
sys.modules["lightning"] = None
import pytorch_lightning
for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
    del sys.modules[name]
before = set(sys.modules)
from cmd_plugin.callbacks import CMDCallback
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_cmd_callback_loads_no_point_clouds_and_no_plotting() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", _SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert "cmd_plugin.callbacks.cmd" in found
    assert "cmd_plugin.callbacks.point_importance" not in found
    rooms = {name.split(".")[1] for name in found if name.startswith("cmd_plugin.")}
    assert not rooms & {"pointcloud", "diffusion", "clip", "distinction", "federated", "jobs"}
    heavy = {"matplotlib", "sklearn", "timm", "torchvision", "flwr", "captum"}
    assert not heavy & {name.partition(".")[0] for name in found}


def test_unknown_names_are_refused() -> None:
    assert dir(cmd_plugin.callbacks) == ["CMDCallback", "PointImportanceMonitor"]
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = cmd_plugin.callbacks.Nothing
    with pytest.raises(ImportError, match="Nothing"):
        from cmd_plugin.callbacks import Nothing  # noqa: F401
