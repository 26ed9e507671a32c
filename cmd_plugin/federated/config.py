"""The options of a federated run, checked before anything is loaded or trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from cmd_plugin.errors import InputError
from cmd_plugin.federated.codec import PROJECTIONS
from cmd_plugin.federated.partition import parse_partition
from cmd_plugin.federated.quantise import BITS

__all__ = ["METHODS", "FederatedConfig"]

METHODS = ("fedavg", "cmd", "apf", "a-apf", "topk", "fedpaq")

ENGINES = ("inprocess", "ray")


@dataclass(frozen=True)
class FederatedConfig:
    """Options of a federated run.

    CMD's defaults are the schedule of ``benchmarks/federated.py``; the paper's method is
    ``modes=10, embed_every=2, embed_percent=10, relative=False, project="epoch", pool=False``.

    Attributes:
        data: Data set, see :func:`cmd_plugin.data.load_dataset`.
        data_root: Where it lies.
        image_size: Side length to resize images to; None keeps theirs.
        train_limit: Number of training images used, over all clients; None uses all.
        test_limit: Number of held-out images used; None uses all.
        model: Network, see :func:`cmd_plugin.networks.build_model`.
        clients: Number of clients.
        partition: ``"iid"`` or ``"dirichlet:ALPHA"``.
        rounds: Rounds of training.
        local_epochs: Epochs of each client in a round.
        fraction: Share of the clients that take part in a round, in (0, 1].
        batch_size: Images in a step.
        lr: Learning rate of the clients' SGD, which starts anew each round.
        momentum: Its momentum, in [0, 1).
        weight_decay: Its weight decay.
        method: One of :data:`METHODS`.
        warmup: CMD: rounds F before the one that fits the modes, at least 2.
        modes: CMD: number of modes M.
        samples: CMD: weights whose trajectories are clustered.
        embed_every: CMD: rounds L between embedding events.
        embed_percent: CMD: percentage P of the weights embedded at an event.
        relative: CMD: P counts from the weights still free.
        project: CMD: ``"epoch"``, ``"step"`` or ``"tie"``.
        pool: CMD: references move by what all weights on their curve did, in the local training
            of a round or, with ``project="step"``, in every step of it.
        bits: Bits of a value: CMD quantises both ways, FedPAQ the way up (8 if None).
        topk: Top-k: share of the weights in a message.
        apf_threshold: APF and A-APF: effective perturbation below which a weight has settled.
        apf_decay: APF and A-APF: decay of the moving averages per round.
        seed: Seed of initial weights, partition, sampling of clients, order of images and modes.
        threads: CPU threads of each client; other numbers may change the last bits of results.
        engine: ``"inprocess"`` runs clients in this process one after another, ``"ray"`` on
            Flower's simulation engine in parallel; see :func:`simulate`.

    Raises:
        InputError: If an option is out of range.
    """

    data: str = "digits"
    data_root: str | None = None
    image_size: int | None = None
    train_limit: int | None = None
    test_limit: int | None = None
    model: str = "cnn"
    clients: int = 10
    partition: str = "iid"
    rounds: int = 30
    local_epochs: int = 1
    fraction: float = 1.0
    batch_size: int = 32
    lr: float = 0.05
    momentum: float = 0.0
    weight_decay: float = 0.0
    method: str = "cmd"
    warmup: int = 8
    modes: int = 250
    samples: int = 1000
    embed_every: int = 1
    embed_percent: float = 25.0
    relative: bool = True
    project: str = "step"
    pool: bool = True
    bits: int | None = None
    topk: float = 0.1
    apf_threshold: float = 0.05
    apf_decay: float = 0.9
    seed: int = 0
    threads: int = 1
    engine: str = "inprocess"

    def __post_init__(self) -> None:
        for name, choices in (
            ("method", METHODS),
            ("engine", ENGINES),
            ("project", PROJECTIONS),
        ):
            value = getattr(self, name)
            self._require(name, f"one of {', '.join(choices)}", value in choices)
        parse_partition(self.partition)
        for name in (
            "clients",
            "rounds",
            "local_epochs",
            "batch_size",
            "samples",
            "embed_every",
            "threads",
        ):
            self._require(name, "at least 1", getattr(self, name) >= 1)
        for name in ("train_limit", "test_limit", "image_size"):
            value = getattr(self, name)
            self._require(name, "at least 1", value is None or value >= 1)
        self._require("fraction", "above 0 and at most 1", 0.0 < self.fraction <= 1.0)
        self._require("lr", "above 0", self.lr > 0.0 and math.isfinite(self.lr))
        self._require("momentum", "at least 0 and below 1", 0.0 <= self.momentum < 1.0)
        decay = self.weight_decay
        self._require("weight_decay", "at least 0", decay >= 0.0 and math.isfinite(decay))
        self._require("warmup", "at least 2", self.warmup >= 2)
        self._require("modes", "from 1 to 256", 1 <= self.modes <= 256)
        percent = self.embed_percent
        self._require("embed_percent", "above 0 and at most 100", 0.0 < percent <= 100.0)
        bits = " or ".join(map(str, BITS))
        self._require("bits", bits, self.bits is None or self.bits in BITS)
        self._require("topk", "above 0 and below 1", 0.0 < self.topk < 1.0)
        self._require("apf_threshold", "above 0", self.apf_threshold > 0.0)
        self._require("apf_decay", "above 0 and below 1", 0.0 < self.apf_decay < 1.0)
        self._require("seed", "at least 0", self.seed >= 0)
        if self.method == "cmd" and self.rounds <= self.warmup:
            raise InputError(
                f"--rounds must be above --warmup ({self.warmup}), got {self.rounds}: modes are "
                "fitted after round number warmup + 1."
            )

    def _require(self, name: str, condition: str, met: bool) -> None:
        if not met:
            raise InputError(
                f"--{name.replace('_', '-')} must be {condition}, got {getattr(self, name)}."
            )

    @property
    def clients_per_round(self) -> int:
        """Number of clients that take part in a round, at least one."""
        return max(1, round(self.fraction * self.clients))

    def as_dict(self) -> dict[str, Any]:
        """All options."""
        return asdict(self)

    @classmethod
    def from_run_config(cls, run_config: Mapping[str, Any]) -> FederatedConfig:
        """Return the options in a Flower run configuration.

        Names have dashes for underscores; others are left alone; an empty text or 0 stands for None
        where that is allowed, because Flower's configurations know no None.
        """
        options: dict[str, Any] = {}
        for field in fields(cls):
            name = field.name.replace("_", "-")
            if name in run_config:
                value = run_config[name]
                options[field.name] = None if field.default is None and not value else value
        return cls(**options)
