"""A whole federation on this machine: train, count what was sent, write table and picture."""

from __future__ import annotations

import csv
import logging
import os
import platform
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy
from safetensors.torch import save_file

from cmd_plugin import __version__
from cmd_plugin.errors import InputError, PluginError, require
from cmd_plugin.federated._flower import numpy_arrays
from cmd_plugin.federated.apps import (
    OrderedGrid,
    data_of,
    held_out_images,
    initial_arrays,
    make_client_app,
    make_strategy,
    part_of,
    serve,
)
from cmd_plugin.federated.baselines import APFStrategy
from cmd_plugin.federated.config import FederatedConfig
from cmd_plugin.federated.inprocess import InProcessGrid
from cmd_plugin.federated.packing import Packing
from cmd_plugin.federated.report import write_report
from cmd_plugin.federated.strategy import FrameStrategy
from cmd_plugin.federated.traffic import Traffic
from cmd_plugin.networks import Score
from cmd_plugin.training.folder import write_atomically, write_json

__all__ = ["FederatedResult", "Round", "make_server_app", "simulate", "train_and_record"]

_COLUMNS = (
    "round",
    "accuracy",
    "loss",
    "bytes_up",
    "bytes_down",
    "fedavg_bytes",
    "embedded_fraction",
)


@dataclass(frozen=True)
class Round:
    """What a round cost and gave; round 0 is the initial model.

    Attributes:
        round: Its number.
        accuracy: Held-out accuracy of the global model, in [0, 1].
        loss: Its held-out cross entropy in nats.
        bytes_up: Message bytes from clients in this round.
        bytes_down: Message bytes to clients in this round.
        fedavg_bytes: Message bytes of the same round had the model been sent as plain arrays.
        embedded_fraction: Share of the weights that is not sent in the next round.
    """

    round: int
    accuracy: float
    loss: float
    bytes_up: int
    bytes_down: int
    fedavg_bytes: int
    embedded_fraction: float


@dataclass(frozen=True)
class FederatedResult:
    """What a federated run found.

    Attributes:
        summary: The content of result.json.
        out: Folder with metrics.csv, result.json, model.safetensors and report.png; None if
            nothing was written.
        state_dict: The final global model.
    """

    summary: dict[str, Any]
    out: Path | None
    state_dict: dict[str, torch.Tensor]


def simulate(
    config: FederatedConfig,
    out: str | Path | None = None,
    *,
    progress: Callable[[Round], None] | None = None,
) -> FederatedResult:
    """Run a federation on this machine, with the ServerApp and ClientApp that also deploy.

    Clients run in this process, or with ``engine="ray"`` on Flower's simulation engine; the results
    are the same, bit for bit, as long as all clients take part. (With a ``fraction`` below 1
    Flower draws from Python's global generator, which ray's threads use as well.)
    ``method="fedavg"`` is Flower's FedAvg, unwrapped.

    Args:
        config: The options.
        out: Folder for results; None writes nothing. Rows of metrics.csv are written as rounds end,
            and stay when the run is interrupted.
        progress: Called after every round, and for the initial model as round 0.

    Raises:
        InputError: If data, model or folder cannot be used, or the training diverges.
        MissingDependency: If ray is needed and missing.
    """
    held_out_images(config)
    for number in range(config.clients):
        part_of(config, number)
    initial_arrays(config)  # data, partition and model fail here, before anything is written

    def train_on(grid: Grid) -> FederatedResult:
        return train_and_record(grid, config, out, progress=progress)

    if config.engine == "ray":
        return _run_on_ray(config, train_on)
    nodes = [
        {"partition-id": number, "num-partitions": config.clients}
        for number in range(config.clients)
    ]
    return train_on(InProcessGrid(make_client_app(config), nodes))


def make_server_app() -> ServerApp:
    """Return the server of a deployed federation; its options are in Flower's run configuration.

    They are those of :class:`FederatedConfig` with dashes for underscores, and ``out``, the folder
    for results on the server's machine (empty for none).
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        config = FederatedConfig.from_run_config(context.run_config)
        train_and_record(grid, config, str(context.run_config.get("out", "")) or None)

    return app


def train_and_record(
    grid: Grid,
    config: FederatedConfig,
    out: str | Path | None = None,
    *,
    progress: Callable[[Round], None] | None = None,
) -> FederatedResult:
    """Train on an engine's grid, count what is sent, and write results as rounds end.

    Args:
        grid: The engine's grid.
        config: The options.
        out: Folder for results; None writes nothing.
        progress: Called after every round, and for the initial model as round 0.

    Raises:
        InputError: If the folder cannot be used or the training diverges.
    """
    started = time.perf_counter()
    folder = None if out is None else _open(Path(out))
    ordered = OrderedGrid(grid)
    rounds: list[Round] = []

    def on_round(number: int, score: Score) -> None:
        rounds.append(_round(number, score, strategy, ordered.traffic, rounds))
        _check_somebody_answered(number, strategy, config)
        if folder is not None:
            with (folder / "metrics.csv").open("a", newline="", encoding="utf-8") as stream:
                csv.writer(stream).writerow([repr(getattr(rounds[-1], c)) for c in _COLUMNS])
        if progress is not None:
            progress(rounds[-1])

    with _flower_settings(config.seed):
        strategy = make_strategy(config)
        result = serve(ordered, config, strategy, on_round)
    summary = _summary(config, strategy, ordered, rounds, time.perf_counter() - started)
    # No round ended with an update: the model is the initial one.
    arrays = result.arrays or initial_arrays(config)
    state = {name: torch.from_numpy(a.numpy().copy()) for name, a in arrays.items()}
    if folder is not None:
        write_atomically(
            folder / "model.safetensors", lambda path: save_file(state, path, {"format": "pt"})
        )
        write_report(folder / "report.png", summary)
        write_json(folder / "result.json", summary)
    return FederatedResult(summary, folder, state)


# -- engines --------------------------------------------------------------------------------------


def _run_on_ray(
    config: FederatedConfig, train_on: Callable[[Grid], FederatedResult]
) -> FederatedResult:
    require("ray", "federated")
    from flwr.simulation import run_simulation

    app = ServerApp()
    ended: list[FederatedResult | BaseException] = []

    @app.main()
    def main(grid: Grid, context: Context) -> None:  # noqa: ARG001 Flower's signature
        try:
            ended.append(train_on(grid))
        except BaseException as error:
            ended.append(error)
            raise

    cores = os.cpu_count() or 1
    backend = {
        "init_args": {
            "num_cpus": cores,
            "include_dashboard": False,
            "log_to_driver": False,
            "logging_level": logging.ERROR,
        },
        "client_resources": {"num_cpus": min(config.threads, cores), "num_gpus": 0.0},
    }
    failure: BaseException | None = None
    try:
        with warnings.catch_warnings(), _flower_settings(config.seed):
            warnings.simplefilter("ignore")  # Flower's and ray's own
            client = make_client_app(config)
            run_simulation(app, client, config.clients, backend_config=cast(Any, backend))
    except BaseException as error:
        failure = error
    for found in ended:
        if isinstance(found, BaseException):
            raise found
        return found
    raise PluginError("Flower's simulation engine ended without a result.") from failure


@contextmanager
def _flower_settings(seed: int) -> Iterator[None]:
    """Seed the sampling of clients, and keep Flower's log out of the way unless debugging.

    Flower's strategies sample with Python's global generator; it is given back as it was.
    """
    logger = logging.getLogger("flwr")
    level, state = logger.level, random.getstate()
    if not os.environ.get("CMD_PLUGIN_DEBUG"):
        logger.setLevel(logging.CRITICAL)
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)
        logger.setLevel(level)


# -- results --------------------------------------------------------------------------------------


def _round(
    number: int, score: Score, strategy: Strategy, now: Traffic, before: list[Round]
) -> Round:
    up = now.bytes_up - sum(r.bytes_up for r in before)
    down = now.bytes_down - sum(r.bytes_down for r in before)
    plain = up + down
    embedded = 0.0
    if isinstance(strategy, FrameStrategy):
        traffic = strategy.traffic
        plain = traffic.plain_up + traffic.plain_down - sum(r.fedavg_bytes for r in before)
        embedded = strategy.embedded_fraction
    return Round(number, score.accuracy, score.loss, up, down, plain, embedded)


def _check_somebody_answered(number: int, strategy: Strategy, config: FederatedConfig) -> None:
    if not isinstance(strategy, FrameStrategy):
        return
    refused = [refusal for refusal in strategy.refusals if refusal.round == number]
    if number and len(refused) >= config.clients_per_round:
        raise InputError(
            f"every client's update was refused in round {number}, the first because of "
            f"{refused[0].field}: {refused[0].reason} If values are not finite, lower --lr."
        )


def _open(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        message = f"cannot write to --out {out} ({error.strerror}): choose another folder."
        raise InputError(message) from error
    for name in ("result.json", "model.safetensors", "report.png"):
        (out / name).unlink(missing_ok=True)
    (out / "metrics.csv").write_text(",".join(_COLUMNS) + "\n", encoding="utf-8")
    return out


def _summary(
    config: FederatedConfig,
    strategy: Strategy,
    grid: OrderedGrid,
    rounds: list[Round],
    seconds: float,
) -> dict[str, Any]:
    """The content of result.json."""
    traffic, last = grid.traffic, rounds[-1]
    data = data_of(config)
    fedavg = sum(r.fedavg_bytes for r in rounds)
    framed = strategy if isinstance(strategy, FrameStrategy) else None
    return {
        "accuracy": last.accuracy,
        "loss": last.loss,
        "bytes_up": traffic.bytes_up,
        "bytes_down": traffic.bytes_down,
        "payload_up": traffic.payload_up,
        "payload_down": traffic.payload_down,
        "fedavg_bytes": fedavg,
        "bytes_of_fedavg": (traffic.bytes_up + traffic.bytes_down) / fedavg,
        "mask_bytes": strategy.mask_bytes if isinstance(strategy, APFStrategy) else 0,
        "embedded_fraction": last.embedded_fraction,
        "parameters": Packing.of(numpy_arrays(initial_arrays(config))).layout.numel,
        "rounds": [vars(r) for r in rounds],
        "refusals": [str(refusal) for refusal in framed.refusals] if framed else [],
        "resyncs": framed.resyncs if framed else 0,
        "seconds": seconds,
        "data": {
            "name": data.name,
            "train_images": len(data.train),  # type: ignore[arg-type]
            "held_out_images": len(held_out_images(config)),  # type: ignore[arg-type]
            "classes": list(data.classes),
            "images_per_client": [len(part_of(config, n)) for n in range(config.clients)],
        },
        "config": config.as_dict(),
        "versions": {
            "cmd-plugin": __version__,
            "torch": str(torch.__version__),
            "flwr": metadata.version("flwr"),
            "python": platform.python_version(),
        },
    }
