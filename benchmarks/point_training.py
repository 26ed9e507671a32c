"""Does `cmd-plugin points train` learn its two data sets, and in how much time?

    python -m benchmarks.point_training --data-root DATA    # about five minutes of CPU time

Trains the reference PointNet on the procedural shapes and on chairs against monitors, exactly as
the command does, and reports the held-out accuracy after the last epoch with the CPU time of the
whole run, data and evaluations included. Results: ``results/point_training.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import RESULTS, describe_machine
from cmd_plugin.jobs.points import train
from cmd_plugin.jobs.points.options import TrainOptions


def measure(options: TrainOptions) -> dict[str, Any]:
    """Train, keeping nothing; what was found, on what, with the CPU seconds."""
    started = time.process_time()
    result = train.run(options, None)
    spent = time.process_time() - started
    return {
        **result.metrics,
        "data": result.data,
        "config": dict(result.options),
        "cpu_seconds": spent,
    }


def main(arguments: list[str] | None = None) -> None:
    """Train, print, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", default=os.environ.get("CMD_PLUGIN_DATA"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=8, help="of the shapes; the others take 3")
    parser.add_argument("--out", type=Path, default=RESULTS / "point_training.json")
    options = parser.parse_args(arguments)
    if options.data_root is None:
        parser.error("say where the data lie: --data-root, or the variable CMD_PLUGIN_DATA")
    common = {"threads": options.threads}
    runs = [
        measure(TrainOptions(epochs=options.epochs, **common)),
        measure(
            TrainOptions(
                data="chairs-monitors", data_root=str(options.data_root), epochs=3, **common
            )
        ),
    ]
    for run in runs:
        run["config"].pop("data_root")  # a path of this machine
    table = Table(title=f"PointNet, {options.threads} thread(s)")
    for column in ("data", "epochs", "held-out accuracy", "CPU seconds"):
        table.add_column(column, justify="left" if column == "data" else "right")
    for run in runs:
        table.add_row(
            f"{run['data']['name']}, {len(run['data']['classes'])} classes, "
            f"{run['data']['train_clouds']} + {run['data']['held_out_clouds']} clouds",
            str(run["config"]["epochs"]),
            f"{100 * run['accuracy']:.2f} %",
            f"{run['cpu_seconds']:.0f}",
        )
    Console(width=120).print(table)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    result = {"runs": runs, "machine": describe_machine()}
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
