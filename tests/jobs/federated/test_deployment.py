"""The deployment example as real processes: SuperLink, two SuperNodes, one of them killed."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[3] / "examples" / "federated_deployment"


def load_example() -> Any:
    spec = importlib.util.spec_from_file_location("federated_deployment", EXAMPLE / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def alive(groups: list[int]) -> list[str]:
    """Processes of these groups that still run; a zombie waits for its parent, and does not."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except OSError:  # it ended meanwhile
            continue
        state, _, group = text.rpartition(")")[2].split()[:3]
        if int(group) in groups and state not in "ZX":
            found.append(text)
    return found


def test_the_app_is_small_enough_for_flower_to_send() -> None:
    files = [path for path in (EXAMPLE / "app").rglob("*") if path.is_file()]
    kept = [path for path in files if "__pycache__" not in path.parts]
    assert {path.suffix for path in kept} <= {".py", ".toml"}
    assert sum(path.stat().st_size for path in kept) < 10_000


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for left-over processes in /proc")
def test_a_supernode_killed_in_mid_round_and_restarted(tmp_path: Path) -> None:
    """The round goes on without it, the new one is sent everything, training ends."""
    example = load_example()
    out, rounds = tmp_path / "out", 6
    table, log = out / "unfinished/metrics.csv", tmp_path / "supernode1.log"

    def finished() -> int:
        """Rounds that have ended; round 0 and the heading are lines as well."""
        return len(table.read_text().splitlines()) - 2 if table.exists() else -1

    def received() -> int:
        return log.read_text(errors="replace").count("Receiving: train message")

    options = {"rounds": rounds, "embed-every": 1, "train-limit": 200, "test-limit": 100}
    options["out"] = str(out)
    with example.federation(tmp_path) as running:
        groups = [process.pid for process in running.processes.values()]
        run = running.submit(options)
        # After the event of round 4 there is a plan that the restarted node does not know.
        running.wait_until(lambda: finished() >= 4 and received() > finished(), "round 5")
        killed_in = finished() + 1
        running.kill_node(1)
        running.start_node(1)
        groups.append(running.processes["supernode1"].pid)
        assert run.wait(600) == 0
    # A killed process may take a moment to go.
    example.wait_until(lambda: not alive(groups), "all processes to end", timeout_s=60)
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))["metrics"]
    assert [ended["round"] for ended in result["rounds"]] == list(range(rounds + 1))
    assert len(result["refusals"]) >= 1
    assert all(re.match(r"round \d+: client \d+ refused, reply", r) for r in result["refusals"])
    lost = {int(refusal.split()[1].rstrip(":")) for refusal in result["refusals"]}
    assert killed_in in lost
    assert result["embedded_fraction"] > 0.5
    # The last round had both: as much went up as in any round with two clients and this plan.
    assert lost != set(range(killed_in, rounds + 1))
    assert (out / "model.safetensors").exists()
