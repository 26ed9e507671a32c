"""What a comparison found, as the metrics of its result."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from cmd_plugin.callbacks import CMDCallback
from cmd_plugin.errors import InputError
from cmd_plugin.jobs.classifier import Classifier
from cmd_plugin.jobs.compare.files import Row
from cmd_plugin.jobs.compare.recorder import Recorder
from cmd_plugin.runs.result import finite

__all__ = ["summarise", "summarise_seed"]

Seeds = Sequence[Mapping[str, Any]]


def summarise_seed(
    rows: Sequence[Row], seed: int, cmd: CMDCallback, recorder: Recorder, classifier: Classifier
) -> dict[str, Any]:
    """Return the result of one finished training, as JSON types.

    Raises:
        InputError: If CMD found nothing to model.
    """
    modes = cmd.modes
    if modes is None or not modes.ready:
        raise InputError(
            f"seed {seed}: CMD found no moving weights to model; raise --samples or --lr."
        )
    mine = [row for row in rows if row.seed == seed]
    last = {row.variant: row for row in mine if row.epoch == mine[-1].epoch}
    result = {
        "seed": seed,
        "accuracy": {name: row.accuracy for name, row in last.items()},
        "loss": {name: finite(row.loss) for name, row in last.items()},
        "explained_variance": finite(modes.explained_variance()),
        "modes": modes.number_of_modes,
        "parameters": modes.numel,
        "trainable_parameters": sum(p.numel() for p in classifier.parameters() if p.requires_grad),
        "state_bytes": modes.state_bytes,
        "peak_state_bytes": recorder.peak_state_bytes,
        "training_seconds": recorder.clock.seconds,
        "cmd_seconds": recorder.cmd_seconds,
        "evaluation_seconds": recorder.evaluation_seconds,
    }
    if cmd.embedding is not None:
        result |= {
            "embedded_fraction": modes.embedded_fraction,
            "saved_percent": modes.saved_percent,
            "volume_percent": modes.volume_percent,
            "volume_bytes": modes.volume_bytes,
            "full_bytes": modes.updates * modes.numel * modes.layout.state_dtype.itemsize,
        }
    return result


def summarise(found: Mapping[str, Seeds]) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the metrics and the seconds of a comparison.

    Args:
        found: Results of the seeds, by the kind of training.
    """
    seeds = found["online"]
    metrics: dict[str, Any] = _scores(seeds)
    if "embedded" in found:
        embedded = metrics["embedded"] = _embedded(found["embedded"])
        for measure in ("accuracy", "loss", "accuracy_std", "loss_std"):
            metrics[measure]["embedded"] = embedded[measure]["raw"]
    spent = _seconds(seeds)
    first = seeds[0]
    return {
        **metrics,
        "overhead_percent": 100.0 * spent["cmd"] / spent["training"],
        "state_bytes_per_parameter": first["state_bytes"] / first["parameters"],
        "peak_state_bytes_per_parameter": first["peak_state_bytes"] / first["parameters"],
        "parameters": first["parameters"],
        "trainable_parameters": first["trainable_parameters"],
        "modes": first["modes"],
        "explained_variance": _mean([seed["explained_variance"] for seed in seeds]),
        "per_seed": list(seeds),
    }, spent


def _embedded(seeds: Seeds) -> dict[str, Any]:
    """Return what the embedded trainings found."""
    first = seeds[0]
    means = ("embedded_fraction", "saved_percent", "volume_percent", "explained_variance")
    return {
        **_scores(seeds),
        **{name: _mean([seed[name] for seed in seeds]) for name in means},
        "volume_bytes": first["volume_bytes"],
        "full_bytes": first["full_bytes"],
        "state_bytes_per_parameter": first["state_bytes"] / first["parameters"],
        "seconds": _seconds(seeds),
        "per_seed": list(seeds),
    }


def _scores(seeds: Seeds) -> dict[str, dict[str, float | None]]:
    """Return means and deviations of all variants over the seeds."""
    scores: dict[str, dict[str, float | None]] = {}
    for measure in ("accuracy", "loss"):
        columns = {name: [s[measure][name] for s in seeds] for name in seeds[0][measure]}
        scores[measure] = {name: _mean(values) for name, values in columns.items()}
        scores[f"{measure}_std"] = {name: _deviation(values) for name, values in columns.items()}
    return scores


def _seconds(seeds: Seeds) -> dict[str, float]:
    kinds = ("training", "cmd", "evaluation")
    return {kind: sum(seed[f"{kind}_seconds"] for seed in seeds) for kind in kinds}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def _deviation(values: Sequence[float | None]) -> float | None:
    """Return the sample standard deviation; there is none of a single run."""
    known = [value for value in values if value is not None]
    return statistics.stdev(known) if len(known) == len(values) > 1 else None
