"""A small federation: clients with data of their own, a network, and Flower's FedAvg around it."""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, Result, Strategy
from torch import nn
from torch.nn.functional import cross_entropy

from cmd_plugin.federated import InProcessGrid, MeteredGrid, cmd_mod, embedded_training

FEATURES, CLASSES, WEIGHTS = 6, 3, 110

Hook = Callable[[Message, Context], None]


def network(*, norm: bool = False, seed: int = 0) -> nn.Sequential:
    """110 weights, or 120 and three statistics with BatchNorm."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = [nn.Linear(FEATURES, 5)]
        layers += [nn.BatchNorm1d(5)] if norm else []
        layers += [nn.Tanh(), nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, CLASSES)]
        return nn.Sequential(*layers)


def client_data(number: int, count: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of one client: three noisy blobs, moved a little for each client."""
    generator = torch.Generator().manual_seed(1000 + number)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    centres = torch.eye(CLASSES, FEATURES) * 2.0
    noise = torch.randn(count, FEATURES, generator=generator)
    return centres[labels] + noise + 0.1 * number, labels


def train_round(model: nn.Module, number: int, round_number: int, lr: float = 0.1) -> float:
    """Two epochs of stateless SGD in an order that depends on client and round; the last loss."""
    inputs, labels = client_data(number)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    model.train()
    loss = torch.zeros(())
    for epoch in range(2):
        generator = torch.Generator().manual_seed(100 * round_number + 10 * number + epoch)
        for rows in torch.randperm(len(labels), generator=generator).split(8):
            optimizer.zero_grad()
            loss = cross_entropy(model(inputs[rows]), labels[rows])
            loss.backward()
            optimizer.step()
    return loss.item()


def make_app(
    mods: Sequence[Any] = (cmd_mod,),
    *,
    norm: bool = False,
    before: Hook | None = None,
    change: Callable[[int, int, RecordDict], None] | None = None,
) -> ClientApp:
    """Return the client app.

    Args:
        mods: Its mods.
        norm: With BatchNorm.
        before: Called with message and context before a client trains.
        change: Called with (client, round, content) of a reply before it is sent.
    """
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        round_number = int(message.content["config"]["server-round"])
        if before is not None:
            before(message, context)
        model = network(norm=norm)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        with embedded_training(context, model):
            loss = train_round(model, number, round_number)
        metrics = MetricRecord({"num-examples": 24 + number, "loss": loss})
        content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
        if change is not None:
            change(number, round_number, content)
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        model = network(norm=norm)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        inputs, labels = client_data(int(context.node_config["partition-id"]))
        accuracy = (model.eval()(inputs).argmax(1) == labels).float().mean().item()
        metrics = MetricRecord({"num-examples": len(labels), "accuracy": accuracy})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def make_grid(app: ClientApp, clients: int = 4) -> InProcessGrid:
    """Return a grid of clients."""
    return InProcessGrid(
        app, [{"partition-id": n, "num-partitions": clients} for n in range(clients)]
    )


def fed_avg(*, fraction: float = 1.0, evaluate: float = 0.0) -> FedAvg:
    """Return FedAvg, for any number of clients."""
    return FedAvg(
        fraction_train=fraction,
        fraction_evaluate=evaluate,
        min_train_nodes=1,
        min_evaluate_nodes=0,
        min_available_nodes=1,
    )


def run(
    strategy: Strategy,
    grid: Any,
    rounds: int,
    *,
    norm: bool = False,
    on_round: Callable[[int, dict[str, np.ndarray]], None] | None = None,
) -> Result:
    """Train for so many rounds from the common initial model, clients sampled alike."""
    random.seed(0)

    def watch(number: int, arrays: ArrayRecord) -> None:
        if on_round is not None:
            on_round(number, {name: array.numpy() for name, array in arrays.items()})

    return strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(network(norm=norm).state_dict()),
        num_rounds=rounds,
        train_config=ConfigRecord({"lr": 0.1}),
        evaluate_fn=watch,
    )


def digest(arrays: ArrayRecord) -> str:
    """Return a hash of all bits of a model."""
    text = hashlib.sha256()
    for name, array in arrays.items():
        text.update(name.encode())
        text.update(array.numpy().tobytes())
    return text.hexdigest()


class TappedGrid(MeteredGrid):
    """A grid that keeps every message it sees: phases[i] = (sent, replies) of one exchange."""

    def __init__(
        self, grid: InProcessGrid, reorder: Callable[[list[Any]], list[Any]] = list
    ) -> None:
        super().__init__(grid)
        self.reorder = reorder
        self.phases: list[tuple[list[Message], list[Message]]] = []
        self.tamper: Callable[[int, list[Message]], list[Message]] | None = None

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Keep both ways in the order of the messages; do to replies what the test asks for."""
        sent = list(messages)
        if not sent:  # a phase that is switched off
            return []
        place = {message.metadata.dst_node_id: number for number, message in enumerate(sent)}
        replies = list(super().send_and_receive(sent, timeout=timeout))
        names = {m.metadata.message_id: m.metadata.dst_node_id for m in sent}
        replies.sort(key=lambda r: place[names[r.metadata.reply_to_message_id]])
        if self.tamper is not None:
            replies = self.tamper(len(self.phases), replies)
        # Copies: a strategy puts decoded arrays into the replies it is given.
        self.phases.append((sent, [copy.copy(reply) for reply in replies]))
        return self.reorder(replies)
