"""The room's face: what comes along with a name, and what is said where Flower is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run_fresh(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def came_along(code: str, *names: str) -> list[str]:
    """Which of these modules a piece of code loads."""
    done = run_fresh(f"import sys\n{code}\nprint(*(set({names!r}) & set(sys.modules)))")
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


HEAVY = ("pytorch_lightning", "lightning", "matplotlib", "sklearn", "timm", "torchvision")


def test_strategies_load_no_lightning() -> None:
    pytest.importorskip("flwr")
    names = "room.CMDStrategy, room.TopKStrategy, room.cmd_mod, room.embedded_training"
    code = f"import cmd_plugin.federated as room; {names}"
    assert came_along(code, *HEAVY, "cmd_plugin.callbacks", "cmd_plugin.jobs") == []


def test_what_needs_no_flower_loads_none() -> None:
    code = "import cmd_plugin.federated as room; room.ModeCodec, room.partition_indices"
    assert came_along(code, *HEAVY, "flwr") == []
    assert came_along("import cmd_plugin.federated as room; dir(room)", "torch", "numpy") == []


@pytest.mark.parametrize(
    "name", ["federated.CMDStrategy", "jobs.federated.make_client_app", "jobs.federated.simulate"]
)
def test_a_missing_flower_names_the_extra(name: str) -> None:
    room, _, thing = name.rpartition(".")
    done = run_fresh(
        f"import sys; sys.modules['flwr'] = None\nfrom cmd_plugin.{room} import {thing}"
    )
    assert "MissingDependency: " in done.stderr
    assert 'pip install "cmd-plugin[federated]"' in done.stderr
