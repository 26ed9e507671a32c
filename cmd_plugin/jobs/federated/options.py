"""The options of ``cmd-plugin federated simulate``, and of the same two apps when deployed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cmd_plugin.errors import InputError
from cmd_plugin.federated.partition import parse_partition
from cmd_plugin.jobs.image_options import DATA_PANEL, ImageOptions
from cmd_plugin.runs.options import option, option_fields

__all__ = ["AGGREGATES", "METHODS", "SimulateOptions"]

AGGREGATES = ("average", "median", "trimmed", "krum")
METHODS = ("fedavg", "cmd", "apf", "a-apf", "topk", "fedpaq", "eden")

_FEDERATION = "Federation"
_METHOD = "Method"
_MACHINE = "Seed and machine"

_CMD = {"method": ("cmd",)}
_APF = {"method": ("apf", "a-apf")}


@dataclass(frozen=True, kw_only=True)
class SimulateOptions(ImageOptions):
    r"""Train with several clients on this machine, and count what they would have sent.

    The clients and the server are the Flower apps that also deploy. Bytes are those of Flower's
    serialised messages, up and down, over all clients; FedAvg's are those of the same rounds with
    plain arrays. Method fedavg is Flower's own FedAvg.

    Writes metrics.csv, result.json, model.safetensors and report.png. The model is kept after every
    round, and a run that was stopped goes on after its last finished round.

    Examples:
      cmd-plugin federated simulate --clients 4 --rounds 6 --warmup 2
      cmd-plugin federated simulate --method topk --topk 0.05 --partition dirichlet:0.3
      cmd-plugin federated simulate --data mnist --data-root DATA --rounds 60 --warmup 10 --bits 8
    """

    # CMD's defaults are the schedule of benchmarks/federated.py; the paper's method is modes=10,
    # embed_every=2, embed_percent=10, relative=False, project="epoch", pool=False.

    test_limit: int | None = option(
        None, "Evaluate on only so many held-out images.", panel=DATA_PANEL, at_least=1
    )
    clients: int = option(10, "Number of clients.", panel=_FEDERATION, at_least=1)
    partition: str = option(
        "iid",
        "iid, or dirichlet:ALPHA (the smaller ALPHA, the fewer classes a client has).",
        panel=_FEDERATION,
    )
    rounds: int = option(30, "Rounds of training.", panel=_FEDERATION, at_least=1)
    local_epochs: int = option(1, "Epochs of a client in a round.", panel=_FEDERATION, at_least=1)
    fraction: float = option(
        1.0, "Share of the clients in a round, above 0 to 1.", panel=_FEDERATION, above=0, at_most=1
    )
    batch_size: int = option(32, "Images in a step.", panel=_FEDERATION, at_least=1)
    lr: float = option(0.05, "Learning rate of the clients' SGD.", panel=_FEDERATION, above=0)
    momentum: float = option(
        0.0, "Its momentum, from zero each round.", panel=_FEDERATION, at_least=0, below=1
    )
    weight_decay: float = option(0.0, "Its weight decay.", panel=_FEDERATION, at_least=0)
    aggregate: str = option(
        "average",
        "How the server joins updates: average (FedAvg), or against clients that mean harm median, "
        "trimmed (mean), krum.",
        panel=_FEDERATION,
        choices=AGGREGATES,
    )
    malicious: int = option(
        1,
        "trimmed, krum: clients of a round that may mean harm.",
        panel=_FEDERATION,
        at_least=1,
        only={"aggregate": ("trimmed", "krum")},
    )
    adapters: int | None = option(
        None,
        "Train low-rank adapters of so many ranks beside frozen random convolutions, with any "
        "method; with fedpaq it is FLoCoRA.",
        panel=_FEDERATION,
        at_least=1,
    )
    adapter_scale: float = option(
        16.0, "What their product is multiplied by.", panel=_FEDERATION, above=0
    )
    method: str = option(
        "cmd", "fedavg, cmd, apf, a-apf, topk, fedpaq or eden.", panel=_METHOD, choices=METHODS
    )
    max_update_ratio: float = option(
        100.0,
        "All but fedavg: refuse an update of more than so many times the round's median norm.",
        panel=_METHOD,
        above=1,
        only={"method": METHODS[1:]},
    )
    warmup: int = option(
        8,
        "cmd: rounds that only watch; modes are fitted after the next one.",
        panel=_METHOD,
        at_least=2,
        only=_CMD,
    )
    modes: int = option(
        250,
        "cmd: number of modes, 1 to 256.",
        panel=_METHOD,
        at_least=1,
        at_most=256,
        only=_CMD,
    )
    samples: int = option(
        1000,
        "cmd: weights whose trajectories are clustered.",
        panel=_METHOD,
        at_least=1,
        only=_CMD,
    )
    embed_every: int = option(
        1, "cmd: rounds between embedding events.", panel=_METHOD, at_least=1, only=_CMD
    )
    embed_percent: float = option(
        25.0,
        "cmd: percentage embedded at an event.",
        panel=_METHOD,
        above=0,
        at_most=100,
        only=_CMD,
    )
    relative: bool = option(
        True,
        "cmd: of the weights that are still sent, or of all.",
        panel=_METHOD,
        off="absolute",
        only=_CMD,
    )
    project: str = option(
        "step",
        "cmd: embedded weights follow after the round (epoch), after every step (step), or train "
        "through their references (tie).",
        panel=_METHOD,
        choices=("epoch", "step", "tie"),
        only=_CMD,
    )
    pool: bool = option(
        True,
        "cmd: references move by what all weights on their curve did, in a round or, with "
        "--project step, in every step.",
        panel=_METHOD,
        off="no-pool",
        only=_CMD,
    )
    bits: int | None = option(
        None,
        "cmd, eden (2): 8, 4, 2 or 1 bits a value, both ways; fedpaq (8): 8 or 4, on the way up.",
        panel=_METHOD,
        only={"method": ("cmd", "eden", "fedpaq")},
    )
    coding: str = option(
        "eden",
        "cmd with bits: eden (differences, rotated at random), or linear (blocks, 8 or 4 bits).",
        panel=_METHOD,
        choices=("linear", "eden"),
        only=_CMD,
    )
    memory: bool = option(
        True,
        "eden, cmd with bits: clients remember the model they were sent and get what changed; "
        "otherwise the weights in 8 bits. Has no effect with a fraction below 1.",
        panel=_METHOD,
        off="no-memory",
        only={"method": ("cmd", "eden")},
    )
    topk: float = option(
        0.1,
        "topk: share of the weights sent.",
        panel=_METHOD,
        above=0,
        below=1,
        only={"method": ("topk",)},
    )
    apf_threshold: float = option(
        0.05,
        "apf, a-apf: effective perturbation of a settled weight.",
        panel=_METHOD,
        above=0,
        only=_APF,
    )
    apf_decay: float = option(
        0.9,
        "apf, a-apf: decay of the moving averages per round.",
        panel=_METHOD,
        above=0,
        below=1,
        only=_APF,
    )
    seed: int = option(
        0,
        "Of initial weights, partition, sampling of clients, order of images and modes.",
        panel=_MACHINE,
        at_least=0,
    )
    engine: str = option(
        "inprocess",
        "inprocess (one client after another), or ray (Flower's simulation engine, in parallel, "
        "some 30 s of start-up, no --resume); same results.",
        panel=_MACHINE,
        choices=("inprocess", "ray"),
        free=True,
    )
    threads: int = option(1, "CPU threads of a client.", panel=_MACHINE, at_least=1, free=True)

    def check_together(self) -> None:
        """Refuse what single bounds cannot say."""
        parse_partition(self.partition)
        rotated = self.method == "eden" or (self.method == "cmd" and self.coding == "eden")
        allowed = (1, 2, 4, 8) if rotated else (4, 8)
        if self.bits is not None and self.bits not in allowed:
            *first, last = allowed
            raise InputError(
                f"--bits must be {', '.join(map(str, first))} or {last}, got {self.bits}."
            )
        others = {"trimmed": 2 * self.malicious + 1, "krum": 2 * self.malicious + 3}
        least = others.get(self.aggregate, 1)
        if self.clients_per_round < least:
            raise InputError(
                f"--aggregate {self.aggregate} with --malicious {self.malicious} needs at least "
                f"{least} clients in a round, got {self.clients_per_round}."
            )
        if self.method == "cmd" and self.rounds <= self.warmup:
            raise InputError(
                f"--rounds must be above --warmup ({self.warmup}), got {self.rounds}: modes are "
                "fitted after round number warmup + 1."
            )

    @property
    def clients_per_round(self) -> int:
        """Number of clients that take part in a round, at least one."""
        return max(1, round(self.fraction * self.clients))

    @property
    def remembers(self) -> bool:
        """Whether clients are sent differences: with few in a round, most would be out of date."""
        return self.memory and self.clients_per_round == self.clients

    @classmethod
    def from_run_config(cls, run_config: Mapping[str, Any]) -> SimulateOptions:
        """Return the options in a Flower run configuration.

        Names have dashes for underscores; others are left alone; an empty text or 0 stands for None
        where that is allowed, because Flower's configurations know no None. Options that have no
        effect with the method chosen are left out: an app has to list all that may ever be set.

        Raises:
            InputError: If an option is out of range.
        """
        given: dict[str, Any] = {}
        fields = list(option_fields(cls))
        for field, _, _ in fields:
            name = field.name.replace("_", "-")
            if name in run_config:
                value = run_config[name]
                given[field.name] = None if field.default is None and not value else value
        for field, _, about in fields:
            for name, allowed in about.only.items():
                if given.get(name, getattr(cls, name)) not in allowed:
                    given.pop(field.name, None)
        return cls(**given)
