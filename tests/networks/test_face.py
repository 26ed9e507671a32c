"""The room's face: every name is there, and none brings what only some calls need."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from cmd_plugin import networks

HEAVY = (
    "cmd_plugin.callbacks",
    "cmd_plugin.kernels",
    "cmd_plugin.modes",
    "cmd_plugin.pointcloud",
    "lightning",
    "matplotlib",
    "pytorch_lightning",
    "sklearn",
    "timm",
    "torch._dynamo",
    "torchvision",
)


def test_all_names_together_bring_nothing_heavy() -> None:
    script = (
        "import json, sys; from cmd_plugin.networks import *; "
        f"print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_no_module_takes_the_place_of_a_name() -> None:
    from cmd_plugin.networks import (  # noqa: F401
        checkpoints,
        evaluation,
        measuring,
        named,
        names,
        recalibration,
        weights,
    )

    assert all(callable(getattr(networks, name)) for name in networks.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = networks.nothing
