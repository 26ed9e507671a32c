"""What `federated simulate` prints, from the result alone, in a terminal of 80 columns."""

from __future__ import annotations

from typing import Any

import pytest

from cmd_plugin.cli.show_federated import show
from cmd_plugin.runs.result import Result


def result(rounds: int, **metrics: Any) -> Result:
    """A run of so many rounds, each with a tenth of FedAvg's bytes."""
    rows = [
        {
            "round": number,
            "accuracy": number / 100,
            "loss": 2.0,
            "bytes_up": 1_000_000 * bool(number),
            "bytes_down": 2_000_000 * bool(number),
            "fedavg_bytes": 30_000_000 * bool(number),
            "embedded_fraction": 0.25,
        }
        for number in range(rounds + 1)
    ]
    found = {
        "accuracy": rounds / 100,
        "bytes_up": 1_000_000 * rounds,
        "bytes_down": 2_000_000 * rounds,
        "fedavg_bytes": 30_000_000 * rounds,
        "bytes_of_fedavg": 0.1,
        "refusals": [],
        "rounds": rows,
        **metrics,
    }
    options = {"method": "cmd", "clients": 10, "partition": "dirichlet:0.3"}
    return Result(
        job="federated simulate",
        options=options,
        data={"name": "cifar10-jpeg"},
        metrics=found,
        machine={},
        seconds={},
        files=(),
    )


def test_it_says_what_was_sent_and_what_it_gave(capsys: pytest.CaptureFixture[str]) -> None:
    show(result(40))
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].strip() == "cmd with 10 clients on cifar10-jpeg, dirichlet:0.3"
    assert lines[-2] == "accuracy 0.4000 with 120.00 MB (40.00 up, 80.00 down)"
    assert lines[-1] == "10.0% of FedAvg's 1200.00 MB"
    shown = [line.split()[1] for line in lines if line.startswith("│")]
    assert shown == ["4", "8", "12", "16", "20", "24", "28", "32", "36", "40"]
    assert "│    40 │   0.4000 │ 2.0000 │ 1000.0 │  2000.0 │     10.0% │    25.0% │" in lines


def test_refusals_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    show(result(2, refusals=["round 1: client 7 refused"]))
    assert capsys.readouterr().out.endswith("1 updates were refused, see result.json\n")
