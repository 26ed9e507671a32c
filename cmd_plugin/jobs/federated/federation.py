"""A federated training between two of its rounds, and what each round cost and gave."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any, get_type_hints

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from cmd_plugin.data import make_loader
from cmd_plugin.errors import InputError, StateMismatch
from cmd_plugin.federated._flower import numpy_arrays, serialised_bytes
from cmd_plugin.federated._memory import (
    read_named_arrays,
    restore_strategy,
    save_named_arrays,
    save_strategy,
)
from cmd_plugin.federated.adapters import fold_adapters
from cmd_plugin.federated.baselines import APFStrategy
from cmd_plugin.federated.inprocess import InProcessGrid
from cmd_plugin.federated.packing import Packing
from cmd_plugin.federated.rounds import run_round
from cmd_plugin.federated.strategy import FrameStrategy
from cmd_plugin.federated.traffic import Traffic
from cmd_plugin.jobs.federated.apps import (
    OrderedGrid,
    data_of,
    held_out_images,
    initial_arrays,
    make_strategy,
    network,
)
from cmd_plugin.jobs.federated.options import SimulateOptions
from cmd_plugin.networks import evaluate
from cmd_plugin.runs.process import own_threads

__all__ = ["COLUMNS", "Federation", "Round"]

_EVALUATION_BATCH = 512


@dataclass(frozen=True)
class Round:
    """What a round cost and gave; round 0 is the initial model.

    Attributes:
        round: Its number.
        accuracy: Held-out accuracy of the global model, in [0, 1].
        loss: Its held-out cross entropy in nats.
        bytes_up: Message bytes from clients in this round.
        bytes_down: Message bytes to clients in this round.
        fedavg_bytes: Message bytes of the same round had the model been sent as plain arrays, the
            whole of it where adapters are.
        fedavg_bytes_up: Those from clients.
        fedavg_bytes_down: Those to clients.
        embedded_fraction: Share of the weights that is not sent in the next round.
    """

    round: int
    accuracy: float
    loss: float
    bytes_up: int
    bytes_down: int
    fedavg_bytes: int
    fedavg_bytes_up: int
    fedavg_bytes_down: int
    embedded_fraction: float


COLUMNS = get_type_hints(Round)
"""Name -> type of what a row of metrics.csv holds."""


class Federation:
    """The global model, the strategy, and what the clients remember.

    Flower's strategies sample clients with Python's global generator: it is part of the state.

    Args:
        options: The options of the run.
        grid: The engine's grid.
        clients: The grid that holds the clients, if they can be asked for what they remember.

    Attributes:
        grid: The grid in the order of the clients' numbers, metered.
        strategy: The strategy.
        arrays: The global model.
        rounds: The rounds that have ended.
    """

    def __init__(
        self, options: SimulateOptions, grid: Grid, clients: InProcessGrid | None = None
    ) -> None:
        self.grid = OrderedGrid(grid)
        self.strategy = make_strategy(options)
        self.arrays = initial_arrays(options)
        self.rounds: list[Round] = []
        self._options = options
        self._clients = clients
        self._held_out = make_loader(held_out_images(options), _EVALUATION_BATCH)
        self._model = network(options, data_of(options))
        self._left_out = _bytes_left_out(options, self.arrays)

    def advance(self) -> Round:
        """Run the next round; number 0 only evaluates the initial model.

        Raises:
            InputError: If the training diverged, or no client's update was accepted.
        """
        number, before = len(self.rounds), self.arrays
        if number:
            self.arrays = run_round(self.strategy, self.grid, number, before)
        with own_threads(self._options.threads):
            self._model.load_state_dict(self.arrays.to_torch_state_dict())
            score = evaluate(self._model, self._held_out)
        if not math.isfinite(score.loss):
            raise InputError(
                f"the training diverged in round {number}: the held-out loss is {score.loss}; "
                "lower --lr."
            )
        if number and self.arrays is before:
            raise InputError(self._why_nothing_was_learned(number))
        sent, plain, embedded = self.grid.traffic, self.grid.traffic, 0.0
        if isinstance(self.strategy, FrameStrategy):
            plain, embedded = self.strategy.traffic, self.strategy.embedded_fraction
        up = sent.bytes_up - sum(r.bytes_up for r in self.rounds)
        down = sent.bytes_down - sum(r.bytes_down for r in self.rounds)
        plain_up = plain.plain_up + self._left_out * sent.messages_up
        plain_down = plain.plain_down + self._left_out * sent.messages_down
        plain_up -= sum(r.fedavg_bytes_up for r in self.rounds)
        plain_down -= sum(r.fedavg_bytes_down for r in self.rounds)
        ended = Round(
            number,
            score.accuracy,
            score.loss,
            up,
            down,
            plain_up + plain_down,
            plain_up,
            plain_down,
            embedded,
        )
        self.rounds.append(ended)
        return ended

    def _why_nothing_was_learned(self, number: int) -> str:
        refused = []
        if isinstance(self.strategy, FrameStrategy):
            refused = [refusal for refusal in self.strategy.refusals if refusal.round == number]
        if not refused:
            return f"no client answered in round {number}: see the clients' logs."
        return (
            f"every client's update was refused in round {number}, the first because of "
            f"{refused[0].field}: {refused[0].reason} If values are not finite, lower --lr."
        )

    def model(self) -> dict[str, Tensor]:
        """Return a copy of the global model's tensors by name; adapters are folded in."""
        if self._options.adapters is None:
            arrays = numpy_arrays(self.arrays)
            return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
        self._model.load_state_dict(self.arrays.to_torch_state_dict())
        return fold_adapters(self._model)

    def metrics(self) -> dict[str, Any]:
        """Return what has been found so far, as JSON types."""
        traffic, last = self.grid.traffic, self.rounds[-1]
        fedavg = sum(r.fedavg_bytes for r in self.rounds)
        framed = self.strategy if isinstance(self.strategy, FrameStrategy) else None
        masks = self.strategy.mask_bytes if isinstance(self.strategy, APFStrategy) else 0
        return {
            "accuracy": last.accuracy,
            "loss": last.loss,
            "bytes_up": traffic.bytes_up,
            "bytes_down": traffic.bytes_down,
            "payload_up": traffic.payload_up,
            "payload_down": traffic.payload_down,
            "fedavg_bytes": fedavg,
            "bytes_of_fedavg": (traffic.bytes_up + traffic.bytes_down) / fedavg,
            "mask_bytes": masks,
            "embedded_fraction": last.embedded_fraction,
            "parameters": Packing.of(numpy_arrays(initial_arrays(self._options))).layout.numel,
            "rounds": [vars(r) for r in self.rounds],
            "refusals": [str(refusal) for refusal in framed.refusals] if framed else [],
            "duplicates": framed.duplicates if framed else 0,
            "resyncs": framed.resyncs if framed else 0,
        }

    # -- to go on later ---------------------------------------------------------------------------

    @property
    def can_be_saved(self) -> bool:
        """Whether clients run where they can be asked for what they remember."""
        return self._clients is not None

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next rounds depend on.

        It holds tensors on the CPU, numbers, strings, None, lists and dicts only.

        Raises:
            InputError: If what clients remember cannot be had on this engine.
        """
        if self._clients is None:
            raise InputError("this engine's clients cannot be asked for what they remember.")
        version, words, gauss = random.getstate()
        return {
            "rounds": [list(astuple(ended)) for ended in self.rounds],
            "arrays": save_named_arrays(self.arrays),
            "strategy": save_strategy(self.strategy),
            "clients": self._clients.state_dict(),
            "traffic": self.grid.traffic.state_dict(),
            "random": [version, list(words), gauss],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned, bit for bit.

        Raises:
            StateMismatch: If it is of another run or damaged; this object is of no use then.
        """
        if self._clients is None:
            raise StateMismatch("this engine's clients cannot be given back what they remembered.")
        try:
            rounds = [Round(*row) for row in state["rounds"]]
            arrays = read_named_arrays(state["arrays"])
            traffic = Traffic.from_state(state["traffic"])
            version, words, gauss = state["random"]
            drawn = version, tuple(words), gauss
            random.Random().setstate(drawn)  # noqa: S311 refuses what is no state of it
            clients, strategy = state["clients"], state["strategy"]
        except StateMismatch:
            raise
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise StateMismatch(f"the saved rounds are damaged ({error!r}).") from error
        if [(n, a.shape) for n, a in arrays.items()] != [
            (n, a.shape) for n, a in self.arrays.items()
        ]:
            raise StateMismatch("the saved model has other tensors than the network.")
        restore_strategy(self.strategy, strategy)
        self._clients.load_state_dict(clients)
        self.rounds, self.arrays, self.grid.traffic = rounds, arrays, traffic
        random.setstate(drawn)


def _bytes_left_out(options: SimulateOptions, arrays: ArrayRecord) -> int:
    """How many bytes a message with the whole network has more than one with its adapters."""
    if options.adapters is None:
        return 0
    whole = initial_arrays(options, adapted=False)
    return _message_bytes(whole) - _message_bytes(arrays)


def _message_bytes(arrays: ArrayRecord) -> int:
    """Bytes of a message with such arrays, of which no two are equal: Flower sends those once."""
    values = numpy_arrays(arrays).items()
    different = {name: np.full_like(a, number) for number, (name, a) in enumerate(values)}
    record = ArrayRecord({name: Array(array) for name, array in different.items()})
    return serialised_bytes(Message(RecordDict({"arrays": record}), 0, "train"))
