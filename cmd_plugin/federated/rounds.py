"""One round of Flower's own loop, so that a training can begin at any of them."""

from __future__ import annotations

from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

__all__ = ["run_round"]


def run_round(
    strategy: Strategy, grid: Grid, number: int, arrays: ArrayRecord, *, timeout_s: float = 3600.0
) -> ArrayRecord:
    """Do what one turn of ``Strategy.start`` does: train on clients, aggregate, evaluate there.

    A run of these from round 1 on gives what ``start`` gives; one that begins later continues a
    run whose strategy and clients were given their states back.

    Args:
        strategy: The strategy.
        grid: The engine's grid.
        number: Number of the round, from 1.
        arrays: The global model.
        timeout_s: How long to wait for clients.

    Returns:
        The new global model; the same one if no update arrived.
    """
    replies = grid.send_and_receive(
        strategy.configure_train(number, arrays, ConfigRecord(), grid), timeout=timeout_s
    )
    aggregated, _ = strategy.aggregate_train(number, replies)
    arrays = arrays if aggregated is None else aggregated
    replies = grid.send_and_receive(
        strategy.configure_evaluate(number, arrays, ConfigRecord(), grid), timeout=timeout_s
    )
    strategy.aggregate_evaluate(number, replies)
    return arrays
