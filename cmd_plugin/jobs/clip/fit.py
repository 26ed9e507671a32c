"""Fit mean and covariance of embeddings: a whitening, whose norm is a likelihood."""

from __future__ import annotations

from typing import Any

from cmd_plugin.jobs.clip.encode import open_input
from cmd_plugin.jobs.clip.fitting import (
    STATISTICS,
    WHITENING,
    describe_fit,
    fit_whitening,
    gather,
)
from cmd_plugin.jobs.clip.inputs import Rows
from cmd_plugin.jobs.clip.options import FitOptions, shard_of
from cmd_plugin.runs.job import Job, make_job
from cmd_plugin.runs.process import own_threads
from cmd_plugin.runs.result import Result

__all__ = ["run"]


@make_job("clip fit")
def run(job: Job, options: FitOptions) -> Result:
    """Fit a whitening to embeddings, images or captions, or to one shard of them.

    Returns:
        Metrics: ``rows`` used and ``skipped_rows`` (not finite), ``dimension``, ``rank``, how many
        variances were ``floored``, the ``shrinkage`` and its ``intensity``, the ``condition``
        number of the sample covariance (None if it is singular), ``mean_norm`` of the rows,
        ``mean_conformity`` (mean cosine of two rows), and the mean squared whitened norm
        ``in_sample`` and ``leave_one_out``, whose difference is the optimism of scores of the rows
        of the fit. Data: the ``input``, its ``kind``, ``first_row`` and number of ``rows``.

    Raises:
        InputError: If the input, the encoder or the folder cannot be used.
    """
    shard = (1, 1) if options.shard is None else shard_of(options.shard)
    with own_threads(options.threads):
        opened = open_input(job, options, options.input, shard=shard)
        rows = opened.file.single(options.modality)
        metrics = job.stage("whitening", lambda: _fit(job, options, rows))
    return job.finish(metrics=metrics, data={**opened.data, "modality": rows.modality})


def _fit(job: Job, options: FitOptions, rows: Rows) -> dict[str, Any]:
    statistics = gather(job, rows, options.normalize)
    whitening = fit_whitening(statistics, options, [rows])
    statistics.save(job.folder.path(STATISTICS))
    whitening.save(job.folder.path(WHITENING))
    return describe_fit(statistics, whitening, [rows])
