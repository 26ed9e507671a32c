"""Train a classifier, a judge, and a decomposition around the classifier."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from cmd_plugin.data import make_loader
from cmd_plugin.distinction.artefact import save_decomposer
from cmd_plugin.distinction.decomposition import Decomposer, decompose
from cmd_plugin.distinction.explainer import DecompositionExplainer
from cmd_plugin.distinction.objectives import LossWeights
from cmd_plugin.distinction.plots import plot_decomposition
from cmd_plugin.distinction.quality import SplitReport, measure_split
from cmd_plugin.jobs.classifier import Classifier
from cmd_plugin.jobs.distinction.data import SplitData, load_split_data, pixel_range
from cmd_plugin.jobs.distinction.model import CLASSIFIER, EXPLAINER, JUDGE, read_network
from cmd_plugin.jobs.distinction.options import TrainOptions
from cmd_plugin.jobs.fitting import (
    ClockedRecorder,
    TrainingClock,
    finished_epochs,
    fit,
    make_trainer,
)
from cmd_plugin.kernels.counter_random import derived_seed
from cmd_plugin.networks import build_model, evaluate
from cmd_plugin.networks.weights import load_weights, save_weights
from cmd_plugin.runs.figures import save_figure
from cmd_plugin.runs.files import write_atomically
from cmd_plugin.runs.job import Job, make_job
from cmd_plugin.runs.process import (
    find_device,
    own_determinism,
    own_random_state,
    own_threads,
)
from cmd_plugin.runs.result import Result
from cmd_plugin.runs.table import Table

__all__ = ["run"]

_CLASSIFIER_BATCH = 64
_EVALUATION_BATCH = 128
_WATCHED = 512  # held-out images that are looked at after each epoch
_PICTURED = 6
_COLUMNS: dict[str, Any] = {
    "epoch": int,
    "psnr": float,
    "removed": float,
    "judge_removed": float,
    "specialization": float,
    "distinct_power": float,
    "shortcut": float,
}

Shape = dict[str, Any]
Report = Callable[[float, str], None]


@make_job("distinction train")
def run(job: Job, options: TrainOptions) -> Result:
    """Train a decomposition, and what it needs.

    On a CPU with an unchanged number of threads, a run that was killed and resumed ends with the
    same bits as an uninterrupted one. Torch's deterministic algorithms are used on a GPU too.

    Returns:
        The ``accuracy`` of ``classifier`` and ``judge``, the ``split`` (see
        :class:`cmd_plugin.distinction.SplitReport`), its ``warnings``, and the ``parameters``.

    Raises:
        InputError: If data, model or folder cannot be used, or the training diverges.
        KeyboardInterrupt: If the user stops the run; it can be resumed.
    """
    device = find_device(options.accelerator)
    data = load_split_data(options)
    shape: Shape = {
        "channels": data.channels,
        "classes": len(data.classes),
        "size": data.size,
    }
    names = {"classifier": options.model, "judge": options.judge}
    with own_random_state(), own_threads(options.threads), own_determinism(device):
        for name in names.values():
            build_model(name, **shape)  # fails early
        found: dict[str, Any] = {}
        for number, (role, name) in enumerate(names.items()):
            work = partial(_train_network, job, options, data, shape, role, name, number)
            found[role] = job.stage(role, work)
        work = partial(_train_explainer, job, options, data, shape, device)
        found |= job.stage("explainer", work)
        seconds = {"training": found.pop("seconds")}
        about = {
            "name": data.name,
            "classes": list(data.classes),
            "train_images": len(data.train),
            "held_out_images": len(data.test),
            "size": list(data.size),
        }
        return job.finish(metrics=found, data=about, seconds=seconds)


def _train_network(
    job: Job,
    options: TrainOptions,
    data: SplitData,
    shape: Shape,
    role: str,
    name: str,
    number: int,
) -> dict[str, Any]:
    """Train the classifier or the judge, or take the one given; keep it, and its accuracy."""
    seed = derived_seed(options.seed, number)
    torch.manual_seed(seed)
    network = build_model(name, **shape)
    if role == "classifier" and options.classifier is not None:
        load_weights(network, options.classifier)
    else:
        module = Classifier(
            network, len(data.classes), "adam", options.classifier_lr, schedule="cosine", seed=seed
        )
        loader = make_loader(data.train, _CLASSIFIER_BATCH, shuffle_seed=seed)
        job.report(role, number, None)
        trainer = make_trainer(
            options.accelerator, options.classifier_epochs, [TrainingClock()], job.folder.work
        )
        fit(trainer, module, loader, job.folder.state(f"{role}.ckpt"))
    score = evaluate(network.cpu(), make_loader(data.test, _EVALUATION_BATCH))
    place = CLASSIFIER if role == "classifier" else JUDGE
    save_weights(job.folder.path(place), network.state_dict())
    return {"model": name, "accuracy": score.accuracy, "loss": score.loss}


class _Recorder(ClockedRecorder):
    """After each epoch: measures the split, appends a row, writes the checkpoint, reports.

    Args:
        table: Where rows go.
        checkpoint: Where everything goes that the next epoch needs.
        measure: Measures the split of the module's decomposition.
        clock: The clock it starts.
        report: Called with the epochs done and a note.
    """

    def __init__(
        self,
        table: Table,
        checkpoint: Any,
        measure: Callable[[Decomposer], SplitReport],
        clock: TrainingClock,
        report: Report,
    ) -> None:
        super().__init__(clock)
        self.table, self.checkpoint, self.measure = table, checkpoint, measure
        self.report = report
        self._note = ""

    @override
    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        share = (batch_idx + 1) / trainer.num_training_batches
        self.report(trainer.current_epoch + share, self._note)
        if not trainer.is_last_batch:
            self.clock.start()

    @override
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        found = self.measure(pl_module.decomposer)
        removed, judged = _mean(found.removed), _mean(found.judge_removed)
        self._note = f"PSNR {found.psnr:.1f} dB  accuracy without the part {removed:.2f}"
        kept = found.specialization, found.distinct_power, found.shortcut
        self.table.append([(trainer.current_epoch, found.psnr, removed, judged, *kept)])
        pl_module.warn_of(found)
        # Last: what this file says is finished has to be finished.
        write_atomically(self.checkpoint, trainer.save_checkpoint)
        self.report(trainer.current_epoch + 1, self._note)


def _train_explainer(
    job: Job, options: TrainOptions, data: SplitData, shape: Shape, device: torch.device
) -> dict[str, Any]:
    """Train the decomposition, from its last checkpoint if there is one; what it found as JSON."""
    classifier = read_network(options.model, job.folder.path(CLASSIFIER), shape)
    judge = read_network(options.judge, job.folder.path(JUDGE), shape)
    pixels = pixel_range(data.mean, data.std)
    module = DecompositionExplainer(
        None if options.objective == "distinction" else classifier,
        shape["classes"],
        shape["channels"],
        shape["size"],
        objective=options.objective,
        weights=LossWeights(sparsity=options.sparsity),
        low=pixels.low.flatten().tolist(),
        high=pixels.high.flatten().tolist(),
        branches=options.branches,
        width=options.width,
        noise=options.noise,
        lr=options.lr,
        critic_lr=options.critic_lr,
        critic_width=options.critic_width,
        seed=options.seed,
    )
    watched = _first_batches(data, _WATCHED)

    def measure(decomposer: Decomposer) -> SplitReport:
        return measure_split(decomposer, watched, judge.to(module.device))

    def report(done: float, note: str) -> None:
        job.report(f"epoch {int(done)}", done, options.epochs, note)

    loader = make_loader(data.train, options.batch_size, shuffle_seed=options.seed)
    table, checkpoint = job.table("metrics.csv", _COLUMNS), job.folder.state("last.ckpt")
    finished = finished_epochs(checkpoint, loader)
    table.replace([row for row in table.rows() if row[0] < finished])
    clock = TrainingClock()
    recorder = _Recorder(table, checkpoint, measure, clock, report)
    trainer = make_trainer(
        options.accelerator,
        options.epochs,
        [clock, recorder],
        job.folder.work,
        precision=options.precision,
    )
    fit(trainer, module, loader, checkpoint)
    decomposer = module.decomposer.to(device)  # Lightning leaves it on the CPU
    held_out = make_loader(data.test, _EVALUATION_BATCH)
    found = measure_split(decomposer, held_out, judge.to(device))
    decomposer.cpu()
    about = {
        "classes": list(data.classes),
        "channels": shape["channels"],
        "size": list(shape["size"]),
        "mean": data.mean.tolist(),
        "std": data.std.tolist(),
        "objective": options.objective,
    }
    save_decomposer(job.folder.path(EXPLAINER), decomposer, about)
    _draw(job, data, decomposer)
    return {
        "split": found.as_dict(),
        "warnings": found.warnings(),
        "parameters": sum(p.numel() for p in decomposer.generator.parameters()),
        "seconds": clock.seconds,
    }


def _first_batches(data: SplitData, count: int) -> list[tuple[Tensor, Tensor]]:
    """Held-out images, evenly spread over the set, in batches that are read once."""
    where = torch.arange(min(count, len(data.test))) * len(data.test) // min(count, len(data.test))
    return [data.test.__getitems__(part.tolist()) for part in torch.split(where, _EVALUATION_BATCH)]


def _draw(job: Job, data: SplitData, decomposer: nn.Module) -> None:
    """Write a picture of the first held-out images of each class."""
    each = max(1, _PICTURED // len(data.classes))
    rows: list[int] = []
    for label in range(len(data.classes)):
        rows += (data.test.labels == label).nonzero().flatten()[:each].tolist()
    images, labels = data.test.__getitems__(rows[:_PICTURED])
    assert isinstance(decomposer, Decomposer)
    split = decompose(decomposer, images, labels)
    figure = plot_decomposition(images, split, decomposer.pixels, data.classes)
    save_figure(figure, job.folder.path("examples.png"))


def _mean(values: tuple[float, ...]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan
