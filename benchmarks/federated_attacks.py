"""Clients that mean harm: what each way of joining updates survives under CMD with masks.

    python -m benchmarks.federated_attacks                     # about ten CPU minutes
    python -m benchmarks.federated_attacks --report            # what is in the result file

Digits over 10 clients, 16 rounds, CMD with pooled steps and 2-bit values (EDEN) in both directions.
None, 1 or 3 of the clients attack in every round, behind the mod, so that what they send are
well-formed frames:

- scaled update: 50 times what was trained;
- sign flip: 4 times what was trained, in the opposite direction;
- stale mask: the values of the weights that were free two embedding events ago, sent in the places
  of those that are free now;
- free rider: the model as it came, with the largest weight that is admitted.

A frame that says itself that it answers an older plan or round is refused, whichever the strategy.
"""

from __future__ import annotations

import argparse
import logging
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, cast

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord
from rich.console import Console
from rich.table import Table

from benchmarks.federated import Results
from benchmarks.federated_report import LAST
from benchmarks.machine import RESULTS, describe_machine
from cmd_plugin.errors import InputError, NonFiniteError
from cmd_plugin.federated import InProcessGrid
from cmd_plugin.federated._flower import dense_record, numpy_arrays
from cmd_plugin.federated.client import load_codec
from cmd_plugin.federated.strategy import FrameStrategy
from cmd_plugin.jobs.federated import SimulateOptions, make_client_app
from cmd_plugin.jobs.federated.federation import Federation

COMMON: dict[str, Any] = {
    "data": "digits",
    "model": "cnn",
    "clients": 10,
    "rounds": 16,
    "warmup": 4,
    "lr": 0.1,
    "bits": 2,
}
JOINS: dict[str, dict[str, Any]] = {
    "average": {},
    "average, updates of at most 10 medians": {"max_update_ratio": 10.0},
    "median": {"aggregate": "median"},
    "trimmed mean, 3 from each end": {"aggregate": "trimmed", "malicious": 3},
    "Krum, 3 assumed": {"aggregate": "krum", "malicious": 3},
}
ATTACKS = ("scaled update", "sign flip", "stale mask", "free rider")
ATTACKERS = (1, 3)
SEEDS = (1, 2, 3)
SCALES = {"scaled update": 50.0, "sign flip": -4.0}


class Attack:
    """A Flower mod behind ``cmd_mod``: honest clients pass, the first few attack.

    Args:
        kind: One of :data:`ATTACKS`; empty for none.
        attackers: How many clients do.
        images: The largest number of images that is admitted.
    """

    def __init__(self, kind: str, attackers: int, images: int) -> None:
        self.kind, self.attackers, self.images = kind, attackers, images
        self._free: dict[int, list[np.ndarray]] = {}

    def __call__(self, message: Message, context: Context, call_next: Any) -> Message:
        """Train, then do harm."""
        number = int(cast(int, context.node_config["partition-id"]))
        attacks = number < self.attackers and message.metadata.message_type == "train"
        if not attacks:
            return call_next(message, context)
        start = numpy_arrays(cast(ArrayRecord, message.content["arrays"]))
        reply = call_next(message, context)
        codec = load_codec(context)
        if reply.has_error() or codec is None:
            return reply
        packing = codec.packing
        trained = numpy_arrays(cast(ArrayRecord, reply.content["arrays"]))
        before, after = packing.flatten(start), packing.flatten(trained)
        if self.kind == "free rider":
            trained, after = start, before
            cast(MetricRecord, reply.content["metrics"])["num-examples"] = self.images
        elif self.kind == "stale mask":
            after = self._displaced(number, codec.plan.free, after)
        else:
            after = before + np.float32(SCALES[self.kind]) * (after - before)
        reply.content["arrays"] = dense_record(packing.unflatten(after, trained))
        return reply

    def _displaced(self, number: int, free: np.ndarray, values: np.ndarray) -> np.ndarray:
        known = self._free.setdefault(number, [free])
        if len(known[-1]) != len(free):
            known.append(free)
        old = known[-3] if len(known) > 2 else known[0]
        moved = values.copy()
        moved[free] = values[old[: len(free)]]
        return moved


def run_once(join: dict[str, Any], kind: str, attackers: int, seed: int) -> dict[str, Any]:
    """Train once; the accuracy, the round in which it broke, and how many updates were refused."""
    given = {name: value for name, value in join.items() if name != "max_update_ratio"}
    options = SimulateOptions(**COMMON, **given, seed=seed)
    nodes = [{"partition-id": n, "num-partitions": options.clients} for n in range(options.clients)]
    probe = Federation(options, InProcessGrid(make_client_app(options), nodes))
    images = int(cast(FrameStrategy, probe.strategy).max_examples)
    attack = Attack(kind, attackers, images)
    grid = InProcessGrid(make_client_app(options, [attack] if attackers else []), nodes)
    federation = Federation(options, grid, grid)
    strategy = cast(FrameStrategy, federation.strategy)
    strategy.max_update_ratio = join.get("max_update_ratio", strategy.max_update_ratio)
    broke = None
    try:
        for _ in range(options.rounds + 1):
            federation.advance()
    except (InputError, NonFiniteError):
        broke = len(federation.rounds)
    last = [ended.accuracy for ended in federation.rounds[-LAST:]]
    return {
        "accuracy": mean(last) if broke is None else None,
        "broke_in_round": broke,
        "refusals": len(strategy.refusals),
        "embedded_fraction": strategy.embedded_fraction,
    }


def cases() -> list[tuple[str, str, int]]:
    """Return join, attack and number of attackers of every cell."""
    plain = [(join, "", 0) for join in JOINS]
    return plain + list(product(JOINS, ATTACKS, ATTACKERS))


def show(results: Results) -> Table:
    """Mean accuracy in percent over the seeds that are there for all cells."""
    seeds = [
        seed
        for seed in SEEDS
        if all(
            results.find("attack", join, {**COMMON, "attack": kind, "attackers": count}, seed)
            for join, kind, count in cases()
        )
    ]
    shown = Table(title=f"accuracy %, mean of seeds {seeds}", title_justify="left")
    shown.add_column("updates are joined by")
    columns = [("", 0), *product(ATTACKS, ATTACKERS)]
    for kind, attackers in columns:
        shown.add_column(f"{kind}, {attackers} of 10" if kind else "nobody attacks")
    for join in JOINS:
        cells = []
        for kind, attackers in columns:
            options = {**COMMON, "attack": kind, "attackers": attackers}
            rows = [results.find("attack", join, options, seed) for seed in seeds]
            found = [row for row in rows if row is not None]
            broken = [row for row in found if row["accuracy"] is None]
            if not found:
                cells.append("")
            elif broken:
                cells.append(f"broken ({len(broken)} of {len(found)})")
            else:
                cells.append(f"{100 * mean(row['accuracy'] for row in found):.1f}")
        shown.add_row(join, *cells)
    return shown


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing from the result file, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--join", choices=[*JOINS], help="this row of the table alone")
    parser.add_argument("--new", type=Path, help="file for new rows, to be merged later")
    parser.add_argument("--merge", type=Path, nargs="+", default=[], help="files made with --new")
    parser.add_argument("--report", action="store_true", help="run nothing, show what is there")
    parser.add_argument("--seed", type=int, help="this seed alone")
    chosen = parser.parse_args(arguments)
    logging.getLogger("flwr").setLevel(logging.CRITICAL)  # a page a round
    results = Results(RESULTS / "federated_attacks.jsonl", None, chosen.new)
    for other in chosen.merge:
        results.merge(other)
    for seed, (join, kind, attackers) in product(SEEDS, cases()):
        options = {**COMMON, "attack": kind, "attackers": attackers}
        if chosen.report or chosen.join not in (None, join) or chosen.seed not in (None, seed):
            continue
        if results.find("attack", join, options, seed) is None:
            row = {"kind": "attack", "method": join, "seed": seed, "options": options}
            row |= run_once(JOINS[join], kind, attackers, seed)
            results.add({**row, "machine": describe_machine()})
    Console(width=180).print(show(results))


if __name__ == "__main__":
    main()
