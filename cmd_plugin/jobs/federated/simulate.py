"""A whole federation on this machine: train, count what was sent, write table and picture."""

from __future__ import annotations

import logging
import os
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, cast

import cmd_plugin.federated._flower  # noqa: F401 names the extra where Flower is missing

# isort: split
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from torch import Tensor

from cmd_plugin.errors import InputError, PluginError, require
from cmd_plugin.federated.inprocess import InProcessGrid
from cmd_plugin.jobs.federated.apps import (
    data_of,
    held_out_images,
    initial_arrays,
    make_client_app,
    part_of,
)
from cmd_plugin.jobs.federated.federation import COLUMNS, Federation
from cmd_plugin.jobs.federated.options import SimulateOptions
from cmd_plugin.jobs.federated.report import draw_report
from cmd_plugin.jobs.federated.saving import load_state, save_state
from cmd_plugin.runs.figures import save_figure
from cmd_plugin.runs.job import Job
from cmd_plugin.runs.progress import ReportProgress
from cmd_plugin.runs.result import Result

__all__ = ["Trained", "make_server_app", "run", "train"]

_MODEL = "model.safetensors"


@dataclass(frozen=True)
class Trained:
    """What a federated run gave.

    Attributes:
        result: What it found.
        state_dict: The final global model.
    """

    result: Result
    state_dict: dict[str, Tensor]


def run(
    options: SimulateOptions,
    out: str | Path | None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: ReportProgress | None = None,
) -> Result:
    """Run a federation on this machine, and return what it found; see :func:`train`."""
    return train(options, out, resume=resume, overwrite=overwrite, progress=progress).result


def train(
    options: SimulateOptions,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: ReportProgress | None = None,
) -> Trained:
    """Run a federation on this machine, with the ServerApp and ClientApp that also deploy.

    Clients run in this process, or with ``engine="ray"`` on Flower's simulation engine; the results
    are the same, bit for bit, as long as all clients take part. (With a ``fraction`` below 1
    Flower draws from Python's global generator, which ray's threads use as well.)
    ``method="fedavg"`` is Flower's FedAvg, unwrapped.

    After every round the model, and all that the next rounds depend on, are written. A run that was
    stopped anywhere and is resumed ends with the same bits as an uninterrupted one, as long as the
    number of threads stays. On ray nothing but the model and the table is kept, because its clients
    cannot be asked for what they remember.

    Args:
        options: The options.
        out: Folder for metrics.csv, result.json, model.safetensors and report.png; None keeps
            nothing.
        resume: Go on with the unfinished run in ``out``.
        overwrite: Replace what lies in ``out``, once this run is complete.
        progress: Called after every round, and for the initial model as round 0.

    Returns:
        The result, and the final global model.

    Raises:
        InputError: If data, model or folder cannot be used, the training diverges, or a run is to
            go on with ``engine="ray"``. What was finished stays in ``out``.
        MissingDependency: If ray is needed and missing.
    """
    _check(options)
    with Job(
        "federated simulate", options, out, resume=resume, overwrite=overwrite, progress=progress
    ) as job:
        if job.result is not None:
            return Trained(job.result, _read_model(job.folder.out / _MODEL))
        if options.engine == "ray":
            if job.folder.resumed:
                raise InputError(
                    "--engine ray cannot go on with a run, because its clients' memory is gone: "
                    "resume with --engine inprocess, which gives the same results, or start again "
                    "with --overwrite."
                )
            federation = _on_ray(options, lambda grid: _run_rounds(grid, options, job))
        else:
            nodes = [
                {"partition-id": number, "num-partitions": options.clients}
                for number in range(options.clients)
            ]
            grid = InProcessGrid(make_client_app(options), nodes)
            federation = _run_rounds(grid, options, job, grid)
        return _finish(job, options, federation)


def make_server_app() -> ServerApp:
    """Return the server of a deployed federation; its options are in Flower's run configuration.

    They are those of :class:`SimulateOptions` with dashes for underscores, ``out``, the folder for
    results on the server's machine (empty for none), and ``overwrite``, whether to replace a run
    that lies there.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        given = context.run_config
        options = SimulateOptions.from_run_config(given)
        out, overwrite = str(given.get("out", "")) or None, bool(given.get("overwrite", False))
        with Job("federated deployment", options, out, overwrite=overwrite) as job:
            _finish(job, options, _run_rounds(grid, options, job))

    return app


def _check(options: SimulateOptions) -> None:
    """Let engine, data, partition and model fail before anything is written."""
    if options.engine == "ray":
        require("ray", "federated")
    held_out_images(options)
    for number in range(options.clients):
        part_of(options, number)
    initial_arrays(options)


# -- rounds ---------------------------------------------------------------------------------------


def _run_rounds(
    grid: Grid, options: SimulateOptions, job: Job, clients: InProcessGrid | None = None
) -> Federation:
    """Train on an engine's grid to the last round, and keep what each one gave."""
    with _flower_settings(options.seed):
        federation = Federation(options, grid, clients)
        saved = job.folder.state("rounds.safetensors")
        if saved.exists():
            try:
                federation.load_state_dict(load_state(saved))
            except InputError as error:
                reason = str(error).rstrip(".")
                raise InputError(
                    f"the run in {job.out} cannot go on ({reason}): start again with --overwrite."
                ) from error
        table = job.table("metrics.csv", COLUMNS)
        table.replace([astuple(ended) for ended in federation.rounds])
        while len(federation.rounds) <= options.rounds:
            ended = federation.advance()
            if job.out is not None:
                _write_model(job, federation)
            table.append([astuple(ended)])
            if job.out is not None and federation.can_be_saved:
                # Last: what a kill leaves of a round without it is made again.
                save_state(job.folder.state(saved.name), federation.state_dict())
            sent = federation.grid.traffic.bytes_up + federation.grid.traffic.bytes_down
            note = f"accuracy {ended.accuracy:.3f}  {sent / 1e6:.1f} MB"
            job.report(f"round {ended.round}", ended.round, options.rounds, note)
    return federation


def _finish(job: Job, options: SimulateOptions, federation: Federation) -> Trained:
    metrics, data = federation.metrics(), _describe(options)
    if job.out is not None:
        figure = draw_report(options, metrics, data)
        save_figure(figure, job.folder.path("report.png"), options.as_dict())
    return Trained(job.finish(metrics=metrics, data=data), federation.model())


def _describe(options: SimulateOptions) -> dict[str, Any]:
    data = data_of(options)
    return {
        "name": data.name,
        "train_images": len(data.train),  # type: ignore[arg-type]
        "held_out_images": len(held_out_images(options)),  # type: ignore[arg-type]
        "classes": list(data.classes),
        "images_per_client": [len(part_of(options, n)) for n in range(options.clients)],
    }


def _write_model(job: Job, federation: Federation) -> None:
    from safetensors.torch import save_file

    state = federation.model()
    job.folder.write(job.folder.path(_MODEL), lambda path: save_file(state, path, {"format": "pt"}))


def _read_model(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is damaged ({error}): start again with --overwrite.") from error


# -- engines --------------------------------------------------------------------------------------


def _on_ray(options: SimulateOptions, train_on: Callable[[Grid], Federation]) -> Federation:
    from flwr.simulation import run_simulation

    app = ServerApp()
    ended: list[Federation | BaseException] = []

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
        "client_resources": {"num_cpus": min(options.threads, cores), "num_gpus": 0.0},
    }
    failure: BaseException | None = None
    try:
        with warnings.catch_warnings(), _flower_settings(options.seed):
            warnings.simplefilter("ignore")  # Flower's and ray's own
            client = make_client_app(options)
            run_simulation(app, client, options.clients, backend_config=cast(Any, backend))
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
