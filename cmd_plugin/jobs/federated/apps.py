"""Image classification as a Flower ClientApp and ServerApp: the same two simulate and deploy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, FedMedian, FedTrimmedAvg, Krum, Strategy
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, TensorDataset

from cmd_plugin.data import ImageData, load_dataset
from cmd_plugin.data.splits import stratified_subset
from cmd_plugin.federated.adapters import add_adapters
from cmd_plugin.federated.baselines import (
    APFStrategy,
    EDENStrategy,
    FedPAQStrategy,
    TopKStrategy,
)
from cmd_plugin.federated.client import cmd_mod
from cmd_plugin.federated.cmd_strategy import CMDStrategy
from cmd_plugin.federated.partition import partition_indices
from cmd_plugin.federated.traffic import MeteredGrid
from cmd_plugin.federated.training import embedded_training
from cmd_plugin.jobs.federated.options import SimulateOptions
from cmd_plugin.modes import Embedding
from cmd_plugin.networks import build_model
from cmd_plugin.runs.process import own_random_state, own_threads

__all__ = ["OrderedGrid", "initial_arrays", "make_client_app", "make_strategy"]

_QUERY_TIMEOUT_S = 120.0

Batches = Iterator[tuple[Tensor, Tensor]]


@lru_cache(maxsize=2)
def load_data(
    name: str, root: str | None, seed: int, limit: int | None, size: int | None
) -> ImageData:
    """Load a data set once per process."""
    return load_dataset(name, data_root=root, seed=seed, train_limit=limit, image_size=size)


def data_of(options: SimulateOptions) -> ImageData:
    """Return the data set of a run."""
    return load_data(
        options.data, options.data_root, options.seed, options.train_limit, options.image_size
    )


@lru_cache(maxsize=2)
def _parts(
    key: tuple[Any, ...], clients: int, partition: str, seed: int
) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    labels = cast(Any, load_data(*key).train).labels.numpy()
    return partition_indices(labels, clients, partition, seed)


def part_of(options: SimulateOptions, number: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the indices of the training images of one client."""
    key = (options.data, options.data_root, options.seed, options.train_limit, options.image_size)
    return _parts(key, options.clients, options.partition, options.seed)[number]


def held_out_images(options: SimulateOptions) -> Dataset[tuple[Tensor, Tensor]]:
    """Return the images the global model is evaluated on.

    Raises:
        InputError: If more are asked for than there are.
    """
    test = data_of(options).test
    if options.test_limit is None:
        return test
    labels = cast(Any, test).labels
    chosen = stratified_subset(labels, options.test_limit, options.seed)
    return cast(
        "Dataset[tuple[Tensor, Tensor]]", TensorDataset(*cast(Any, test).__getitems__(chosen))
    )


def network(options: SimulateOptions, data: ImageData, *, adapted: bool = True) -> nn.Module:
    """Build the network every run with this seed starts from.

    Args:
        options: Options of the run.
        data: Its images.
        adapted: Whether with the adapters that the options ask for.
    """
    with own_random_state():
        torch.manual_seed(options.seed)
        model = build_model(options.model, data.channels, len(data.classes), data.size)
        if adapted and options.adapters is not None:
            add_adapters(model, options.adapters, options.adapter_scale)
    return model


def initial_arrays(options: SimulateOptions, *, adapted: bool = True) -> ArrayRecord:
    """Return the model every run with this seed starts from; see :func:`network`."""
    return ArrayRecord(network(options, data_of(options), adapted=adapted).state_dict())


# -- clients --------------------------------------------------------------------------------------


def make_client_app(options: SimulateOptions | None = None, mods: Sequence[Any] = ()) -> ClientApp:
    """Return a client that trains an image classifier on its part of a data set.

    Its part is number ``partition-id`` of the node's configuration. It takes part in every strategy
    of this room and, without frames, in every strategy of Flower; FedProx's ``proximal-mu`` is
    obeyed.

    Args:
        options: Options of the run; None reads them from Flower's run configuration.
        mods: Flower mods that see plain arrays, the outermost first.
    """
    app = ClientApp(mods=[cmd_mod, *mods])

    def of_run(context: Context) -> SimulateOptions:
        return options or SimulateOptions.from_run_config(context.run_config)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        content = RecordDict({"node": MetricRecord({"partition-id": number})})
        return Message(content, reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return _train(message, context, of_run(context))

    return app


def _train(message: Message, context: Context, options: SimulateOptions) -> Message:
    settings = cast(ConfigRecord, message.content["config"])
    number = int(context.node_config["partition-id"])
    round_number = int(cast(int, settings["server-round"]))
    data, part = data_of(options), part_of(options, number)
    with own_random_state(), own_threads(options.threads):
        model = network(options, data)
        arrays = cast(ArrayRecord, message.content["arrays"])
        model.load_state_dict(arrays.to_torch_state_dict())
        draw = np.random.SeedSequence([options.seed, number, round_number]).generate_state(1)
        torch.manual_seed(int(draw[0]))  # dropout, if the network has it
        with embedded_training(context, model):
            loss = _fit(
                model,
                lambda epoch: _batches(data, part, options, number, epoch),
                options,
                first_epoch=(round_number - 1) * options.local_epochs,
                proximal=float(cast(float, settings.get("proximal-mu", 0.0))),
            )
    metrics = MetricRecord({"num-examples": len(part), "train-loss": loss})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content, reply_to=message)


def _batches(
    data: ImageData, part: Any, options: SimulateOptions, number: int, epoch: int
) -> Batches:
    """Batches of one client's epoch; their order depends on nothing but seed, client and epoch."""
    order = part[np.random.default_rng([options.seed, number, epoch]).permutation(len(part))]
    size = options.batch_size
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        if len(chosen) > 1 or len(order) == 1:  # BatchNorm cannot learn from one image
            yield cast(Any, data.train).__getitems__(chosen)


def _fit(
    model: nn.Module,
    batches: Callable[[int], Batches],
    options: SimulateOptions,
    *,
    first_epoch: int,
    proximal: float,
) -> float:
    """Train for a round; the mean loss over all images, before their steps."""
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=options.lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
    )
    start = [p.detach().clone() for p in model.parameters()] if proximal else []
    model.train()
    total, count = 0.0, 0
    for epoch in range(first_epoch, first_epoch + options.local_epochs):
        for images, labels in batches(epoch):
            optimizer.zero_grad(set_to_none=True)
            loss = cross_entropy(model(images), labels)
            total += loss.item() * len(labels)
            count += len(labels)
            for parameter, anchor in zip(model.parameters(), start, strict=bool(start)):
                loss = loss + 0.5 * proximal * (parameter - anchor).square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return total / count


# -- server ---------------------------------------------------------------------------------------


def make_strategy(options: SimulateOptions) -> Strategy:
    """Return the strategy of a run's method, around one of Flower's; it waits for all clients."""
    inner = _aggregation(options)
    if options.method == "fedavg":
        return inner
    # No client can have more images than there are.
    most = len(cast(Any, data_of(options).train))
    bounds: dict[str, Any] = {
        "max_examples": most,
        "max_update_ratio": options.max_update_ratio,
    }
    if options.method == "cmd":
        embedding = Embedding(
            options.embed_every,
            options.embed_percent,
            options.relative,
            cast(Any, options.project),
        )
        return CMDStrategy(
            inner,
            embedding,
            modes=options.modes,
            warmup=options.warmup,
            samples=options.samples,
            bits=options.bits,
            coding=options.coding,
            memory=options.remembers,
            pool=options.pool,
            seed=options.seed,
            **bounds,
        )
    if options.method in ("apf", "a-apf"):
        return APFStrategy(
            inner,
            threshold=options.apf_threshold,
            decay=options.apf_decay,
            aggressive=options.method == "a-apf",
            seed=options.seed,
            **bounds,
        )
    if options.method == "topk":
        return TopKStrategy(inner, share=options.topk, **bounds)
    if options.method == "eden":
        return EDENStrategy(inner, bits=options.bits or 2, memory=options.remembers, **bounds)
    return FedPAQStrategy(inner, bits=options.bits or 8, **bounds)


def _aggregation(options: SimulateOptions) -> Strategy:
    """Return Flower's strategy that joins the updates."""
    sampling: dict[str, Any] = {
        "fraction_train": options.fraction,
        "fraction_evaluate": 0.0,
        "min_train_nodes": options.clients_per_round,
        "min_available_nodes": options.clients,
    }
    if options.aggregate == "median":
        return FedMedian(**sampling)
    if options.aggregate == "trimmed":
        return FedTrimmedAvg(beta=options.malicious / options.clients_per_round, **sampling)
    if options.aggregate == "krum":
        return Krum(num_malicious_nodes=options.malicious, **sampling)
    return FedAvg(**sampling)


class OrderedGrid(MeteredGrid):
    """A metered grid that lists nodes by their ``partition-id``.

    Flower's engines number nodes at random; strategies sample from the list. Replies come in the
    order of the partitions as well, whatever order clients were sampled in. Each new node is asked
    once which part of the data it has. These questions are set-up and not part of :attr:`traffic`;
    a node that does not answer is left out.
    """

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self.partitions: dict[int, int] = {}

    def get_node_ids(self) -> Iterable[int]:
        """Return the numbers of the nodes that are there, by partition, then by number."""
        present = list(self._grid.get_node_ids())
        new = [node for node in present if node not in self.partitions]
        if new:
            question = RecordDict({"question": ConfigRecord({"ask": "partition-id"})})
            asked = [
                Message(question, dst_node_id=node, message_type="query") for node in sorted(new)
            ]
            for reply in self._grid.send_and_receive(asked, timeout=_QUERY_TIMEOUT_S):
                if reply.has_error():
                    continue
                answer = cast(MetricRecord, reply.content["node"])
                self.partitions[reply.metadata.src_node_id] = int(cast(int, answer["partition-id"]))
        known = [node for node in present if node in self.partitions]
        return sorted(known, key=self._place)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Return the replies in the order of the partitions.

        The order of sums decides their last bits; in that of arrival no two runs would be equal.
        """
        messages = list(messages)
        replies = super().send_and_receive(messages, timeout=timeout)
        node = {m.metadata.message_id: m.metadata.dst_node_id for m in messages}
        return sorted(replies, key=lambda r: self._place(node.get(r.metadata.reply_to_message_id)))

    def _place(self, node: int | None) -> tuple[int, int]:
        return self.partitions.get(node or 0, len(self.partitions)), node or 0
