"""Test whether new embeddings are distributed as reference ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cmd_plugin.clip import domain_auc, mmd_test
from cmd_plugin.errors import InputError, ShapeError
from cmd_plugin.jobs.clip.encode import open_input
from cmd_plugin.jobs.clip.fitting import spread_rows
from cmd_plugin.jobs.clip.inputs import Rows
from cmd_plugin.jobs.clip.options import CompareOptions
from cmd_plugin.runs.job import Job, make_job
from cmd_plugin.runs.process import own_threads
from cmd_plugin.runs.result import Result

__all__ = ["run"]

_MOST = 50_000  # rows of each side held in memory, of which the tests draw theirs
_FEWEST = 10


@make_job("clip compare")
def run(job: Job, options: CompareOptions) -> Result:
    """Compare two sets of embeddings, images or captions.

    Returns:
        Metrics: the squared ``mmd`` (unbiased, may be below 0) with its kernel's ``bandwidth`` and
        ``p_value`` by permutation; whether this is an ``alarm`` at the level; the ``auc`` of a
        linear classifier that tells the sets apart, on rows that it was not fitted to, and its
        folds' (0.5 is chance); and the sets' ``mean_norm``. Data: both inputs and their ``rows``.

    Raises:
        InputError: If an input cannot be used, or holds too few rows.
        ShapeError: If their dimensions differ.
    """
    with own_threads(options.threads):
        inputs = {"reference": options.reference, "sample": options.sample}
        opened = {name: open_input(job, options, p, name=name) for name, p in inputs.items()}
        sets = {name: found.file.single(options.modality) for name, found in opened.items()}
        widths = {name: rows.dimension for name, rows in sets.items()}
        if len(set(widths.values())) > 1:
            raise ShapeError(
                f"{options.reference} has rows of {widths['reference']} values and "
                f"{options.sample} of {widths['sample']}: compare embeddings of one encoder."
            )
        metrics = job.stage("tests", lambda: _compare(job, options, sets))
    data = {name: {**found.data, "modality": options.modality} for name, found in opened.items()}
    return job.finish(metrics=metrics, data=data)


def _compare(job: Job, options: CompareOptions, sets: dict[str, Rows]) -> dict[str, Any]:
    job.report("reading", 0, 3)
    rows = {name: _finite(name, spread_rows([found], _MOST)) for name, found in sets.items()}
    norms = {name: float(x.double().norm(dim=1).mean()) for name, x in rows.items()}
    if options.normalize == "l2":
        rows = {name: torch.nn.functional.normalize(x, dim=1) for name, x in rows.items()}
    job.report("permuting", 1, 3)
    test = mmd_test(
        rows["reference"],
        rows["sample"],
        permutations=options.permutations,
        seed=options.seed,
        limit=options.most_rows,
    )
    job.report("classifying", 2, 3, f"p = {test.p_value:.4f}")
    kept = (spread(x, options.most_rows) for x in rows.values())
    auc = domain_auc(*kept, seed=options.seed)
    return {
        "p_value": test.p_value,
        "alarm": test.p_value <= options.level,
        "mmd": test.statistic,
        "bandwidth": test.bandwidth,
        "permutations": test.permutations,
        "rows": list(test.rows),
        "auc": auc.auc,
        "auc_folds": list(auc.folds),
        "mean_norm": norms,
    }


def spread(x: Tensor, most: int) -> Tensor:
    """At most so many rows, evenly spread."""
    return x[:: max(1, -(-len(x) // most))]


def _finite(name: str, x: Tensor) -> Tensor:
    good = x.isfinite().all(dim=1)
    if int(good.sum()) < _FEWEST:
        raise InputError(
            f"the {name} has {int(good.sum())} finite rows, and at least {_FEWEST} are needed."
        )
    return x[good]
