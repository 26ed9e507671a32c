"""What lets a client's update into a round: bounds on what it says, and on it beside the others."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from flwr.app import Message

from cmd_plugin.errors import InputError
from cmd_plugin.federated._flower import FRAME_TYPE
from cmd_plugin.federated.frame import FrameError
from cmd_plugin.federated.packing import Arrays, Flat, Packing, is_statistic

__all__ = [
    "NO_FRAME",
    "Refusal",
    "check_bounds",
    "check_metrics",
    "explain_no_update",
    "find_lacks",
    "find_large_updates",
    "find_odd_metrics",
    "update_norm",
]

NO_FRAME = "there is none: the client needs cmd_mod."
"""Reason of a reply without a frame."""
_MAX_EXAMPLES = 2.0**53
"""Largest bound on a weight: no sum of such can overflow, and counts up to it are exact."""


@dataclass(frozen=True)
class Refusal:
    """An update that was left out of a round.

    Attributes:
        round: Number of the round.
        node: Flower's number of the client.
        field: What was wrong with it: a tensor, a part of the frame, a metric.
        reason: Why it was refused.
    """

    round: int
    node: int
    field: str
    reason: str

    def __str__(self) -> str:
        """One line for the log."""
        return f"round {self.round}: client {self.node} refused, {self.field}: {self.reason}"


def check_bounds(max_examples: float, max_update_ratio: float | None) -> None:
    """Refuse bounds that bound nothing.

    Raises:
        InputError: If one is out of range.
    """
    if not 0.0 < max_examples <= _MAX_EXAMPLES:
        raise InputError(f"max_examples must be above 0 and at most 2**53, got {max_examples!r}.")
    if max_update_ratio is not None and not 1.0 < max_update_ratio < math.inf:
        raise InputError(f"max_update_ratio must be above 1 or None, got {max_update_ratio!r}.")


def check_metrics(reply: Message, weight: str | None, max_examples: float) -> None:
    """Refuse a reply whose metrics cannot be averaged, or that asks for too large a weight.

    Args:
        reply: The reply.
        weight: Name of the metric that weights the average; None if there is none.
        max_examples: Its largest value.

    Raises:
        FrameError: Naming the metric.
    """
    records = reply.content.metric_records
    if len(records) != 1:
        raise FrameError("metrics", f"{len(records)} MetricRecords, expected one.")
    (metrics,) = records.values()
    for name, value in metrics.items():
        numbers = value if isinstance(value, list) else [value]
        if not all(math.isfinite(number) for number in numbers):
            raise FrameError(repr(name), "it is NaN or infinite.")
        if name != weight:
            continue
        if isinstance(value, list) or not value > 0:
            raise FrameError(repr(name), f"a weight above 0 is needed, got {value!r}.")
        if value > max_examples:
            raise FrameError(repr(name), f"{value!r} is above max_examples={max_examples:g}.")
    if weight is not None and weight not in metrics:
        raise FrameError(repr(weight), "it is missing.")


def find_odd_metrics(replies: Mapping[int, Message]) -> dict[int, FrameError]:
    """Return the replies with other metrics than most, by node: Flower's averages end there.

    A metric may be a list, as long as it has the same length for all.

    Args:
        replies: Node -> reply with one MetricRecord; of two equally frequent kinds the first wins.
    """
    kinds = {node: _kind(reply) for node, reply in replies.items()}
    usual = Counter(kinds.values()).most_common(1)
    return {
        node: _difference(kind, usual[0][0]) for node, kind in kinds.items() if kind != usual[0][0]
    }


Kind = tuple[tuple[str, ...], tuple[tuple[str, int | None], ...]]


def _kind(reply: Message) -> Kind:
    """Names of the records; name and length of each metric, None for a number."""
    ((record, metrics),) = reply.content.metric_records.items()
    lengths = ((n, len(v) if isinstance(v, list) else None) for n, v in sorted(metrics.items()))
    return (record, *reply.content.array_records), tuple(lengths)


def _difference(kind: Kind, usual: Kind) -> FrameError:
    (records, lengths), (usual_records, usual_lengths) = kind, usual
    if records == usual_records and dict(lengths).keys() == dict(usual_lengths).keys():
        for (name, length), (_, wanted) in zip(lengths, usual_lengths, strict=True):
            if length != wanted:
                return FrameError(
                    repr(name), f"{_said(length)}, most clients sent {_said(wanted)}."
                )
    return FrameError("metrics", "other names than the other clients'.")


def _said(length: int | None) -> str:
    return "one number" if length is None else f"a list of {length}"


def update_norm(packing: Packing, arrays: Arrays, flat: Flat, raw: Arrays) -> float:
    """Return the Euclidean norm of an update: of all weights, without BatchNorm's statistics.

    Args:
        packing: Where each array lies.
        arrays: The client's model.
        flat: [N] the global model's modelled weights.
        raw: Its other arrays.
    """
    total, at = 0.0, 0
    for name, size in zip(packing.layout.names, packing.layout.sizes, strict=True):
        total += _square(arrays[name].reshape(-1) - flat[at : at + size])
        at += size
    for name, before in raw.items():
        if np.issubdtype(before.dtype, np.floating) and not is_statistic(name):
            total += _square(arrays[name].astype(np.float64) - before)
    return math.sqrt(total)


def _square(moved: Any) -> float:
    return float(np.square(moved, out=moved).sum(dtype=np.float64))


def find_large_updates(norms: Mapping[int, float], ratio: float | None) -> dict[int, FrameError]:
    """Return the updates that are more than ``ratio`` times as large as their median, by node.

    Args:
        norms: Node -> norm of its update.
        ratio: As said; None bounds nothing. Neither does a median of 0.
    """
    usual = median(norms.values()) if norms and ratio is not None else 0.0
    if ratio is None or not usual:
        return {}
    return {
        node: FrameError(
            "update",
            f"its norm is {norm:.3g}, {norm / usual:.3g} times the round's median, above "
            f"max_update_ratio={ratio:g}.",
        )
        for node, norm in norms.items()
        if norm > ratio * usual
    }


# -- what a client's app lacks --------------------------------------------------------------------

_ADD_MOD = "put cmd_mod of cmd_plugin.federated first, app = ClientApp(mods=[cmd_mod, ...])."


def _lacks_mod(refusal: Refusal) -> bool:
    """Whether a client saw a frame where its mod would have shown it arrays, or sent none."""
    return FRAME_TYPE in refusal.reason or refusal.reason == NO_FRAME


def find_lacks(refused: Sequence[Refusal], unprojected: int, project: str) -> dict[str, str]:
    """Return what the clients' app lacks after a round of training: its name -> what to add.

    Args:
        refused: The round's refusals.
        unprojected: Number of replies that were not trained as the server asked.
        project: What it asked for.
    """
    found = {}
    lacking = sum(map(_lacks_mod, refused))
    if lacking:
        found["cmd_mod"] = f"{lacking} clients were refused because they lack cmd_mod: {_ADD_MOD}"
    if unprojected:
        found["embedded_training"] = (
            f"{unprojected} clients trained outside of embedded_training, which project="
            f"{project!r} needs: put their training into 'with embedded_training(context, model):'."
        )
    return found


def explain_no_update(refusals: Sequence[Refusal]) -> str:
    """Return the sentence for a run in which no update was accepted."""
    if not refusals:
        return "no client ever answered, so there is no trained model: see the clients' logs."
    first = refusals[0]
    reason = f"{first.field}: {first.reason.rstrip('.')}"
    remedy = _ADD_MOD if any(map(_lacks_mod, refusals)) else "see the clients' logs."
    return (
        f"no client's update was ever accepted, so there is no trained model; the first was "
        f"refused because of {reason}: {remedy}"
    )
