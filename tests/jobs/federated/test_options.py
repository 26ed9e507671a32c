"""Options of a federated run: what is refused, and what an app's configuration may hold."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from cmd_plugin.errors import InputError
from cmd_plugin.federated.cmd_strategy import CODINGS
from cmd_plugin.federated.codec import PROJECTIONS
from cmd_plugin.federated.eden import EDEN_BITS
from cmd_plugin.federated.quantise import BITS
from cmd_plugin.jobs.federated.apps import make_strategy
from cmd_plugin.jobs.federated.options import METHODS, SimulateOptions
from cmd_plugin.runs.options import option_fields


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"method": "sgd"}, "--method must be one of fedavg, cmd, apf, a-apf, topk, fedpaq, eden"),
        ({"engine": "dask"}, "--engine must be one of inprocess, ray, got dask"),
        ({"project": "round"}, "--project must be one of epoch, step, tie"),
        ({"clients": 0}, "--clients must be at least 1, got 0"),
        ({"fraction": 0.0}, "--fraction must be above 0 and at most 1, got 0.0"),
        ({"lr": 0.0}, "--lr must be above 0, got 0.0"),
        ({"lr": float("inf")}, "--lr must be above 0, got inf"),
        ({"momentum": 1.0}, "--momentum must be at least 0 and below 1"),
        ({"warmup": 1}, "--warmup must be at least 2, got 1"),
        ({"embed_percent": 101.0}, "--embed-percent must be above 0 and at most 100"),
        ({"bits": 16}, "--bits must be 1, 2, 4 or 8, got 16"),
        ({"method": "eden", "bits": 5}, "--bits must be 1, 2, 4 or 8, got 5"),
        ({"coding": "linear", "bits": 2}, "--bits must be 4 or 8, got 2"),
        ({"method": "fedpaq", "bits": 1}, "--bits must be 4 or 8, got 1"),
        ({"coding": "zip"}, "--coding must be one of linear, eden"),
        ({"aggregate": "mean"}, "--aggregate must be one of average, median, trimmed, krum"),
        (
            {"aggregate": "krum", "malicious": 4},
            "--aggregate krum with --malicious 4 needs at least 11 clients in a round, got 10",
        ),
        (
            {"aggregate": "trimmed", "malicious": 5},
            "--aggregate trimmed with --malicious 5 needs at least 11 clients",
        ),
        ({"lr": float("nan")}, "--lr must be above 0"),
        ({"embed_percent": 0.0}, "--embed-percent must be above 0"),
        ({"rounds": 5, "warmup": 5}, r"--rounds must be above --warmup \(5\), got 5"),
        ({"topk": 1.0}, "--topk must be above 0 and below 1"),
        ({"test_limit": 0}, "--test-limit must be at least 1"),
        ({"partition": "dirichlet:0"}, "--partition must be iid or dirichlet:ALPHA"),
        ({"rounds": 8}, r"--rounds must be above --warmup \(8\), got 8"),
    ],
)
def test_out_of_range_is_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        SimulateOptions(**options)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("fedavg", {"bits": 8}),
        ("fedavg", {"max_update_ratio": 5.0}),
        ("topk", {"bits": 8}),
        ("eden", {"coding": "linear"}),
        ("fedpaq", {"memory": False}),
        ("cmd", {"topk": 0.2}),
        ("cmd", {"apf_threshold": 0.1}),
        ("topk", {"apf_decay": 0.5}),
        *(
            ("apf", {name: value})
            for name, value in {
                "warmup": 3,
                "modes": 10,
                "samples": 100,
                "embed_every": 2,
                "embed_percent": 10.0,
                "relative": False,
                "project": "tie",
                "pool": False,
            }.items()
        ),
    ],
)
def test_an_option_of_another_method_is_refused(method: str, options: dict[str, Any]) -> None:
    (name,) = options
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(InputError, match=f"{flag} has an effect only with --method .* is {method}"):
        SimulateOptions(method=method, **options)
    fields = {field.name: about for field, _, about in option_fields(SimulateOptions)}
    allowed = str(fields[name].only["method"][0])
    assert SimulateOptions(method=allowed, **options).as_dict()[name] == options[name]


def test_malicious_clients_are_counted_by_two_of_the_aggregates() -> None:
    with pytest.raises(InputError, match="--malicious has an effect only with --aggregate"):
        SimulateOptions(malicious=2)
    config = {"malicious": 2, "aggregate": "median"}
    assert SimulateOptions.from_run_config(config) == SimulateOptions(aggregate="median")
    config["aggregate"] = "krum"
    assert SimulateOptions.from_run_config(config).malicious == 2


def test_few_of_the_clients_in_a_round_remember_nothing() -> None:
    assert SimulateOptions(bits=1).remembers
    assert not SimulateOptions(bits=1, memory=False).remembers
    assert not SimulateOptions(bits=1, fraction=0.5).remembers


def test_what_may_differ_when_a_run_is_resumed() -> None:
    options = SimulateOptions()
    assert set(options.as_dict()) - set(options.deciding()) == {"data_root", "engine", "threads"}


def test_choices_are_those_of_the_room() -> None:
    fields = {field.name: about for field, _, about in option_fields(SimulateOptions)}
    assert fields["project"].choices == PROJECTIONS
    assert fields["method"].choices == METHODS
    assert fields["coding"].choices == CODINGS
    for bits in BITS:
        assert SimulateOptions(bits=bits, coding="linear").bits == bits
    for bits in EDEN_BITS:
        assert SimulateOptions(bits=bits).bits == bits
        assert SimulateOptions(bits=bits, method="eden").bits == bits


def test_an_apps_configuration() -> None:
    """Dashes, other names, empty for None, and settings of methods that were not chosen."""
    config: dict[str, Any] = {
        "data-root": "",
        "train-limit": 0,
        "bits": 0,
        "embed-every": 3,
        "apf-threshold": 0.5,
        "out": "somewhere",
    }
    assert SimulateOptions.from_run_config(config) == SimulateOptions(embed_every=3)
    config["method"] = "apf"
    expected = SimulateOptions(method="apf", apf_threshold=0.5)
    assert SimulateOptions.from_run_config(config) == expected
    with pytest.raises(InputError, match="--rounds must be at least 1"):
        SimulateOptions.from_run_config({"rounds": 0})


def test_options_from_a_flower_run_configuration() -> None:
    options = SimulateOptions.from_run_config(
        {"embed-every": 3, "bits": 0, "data-root": "", "lr": 0.1, "something-else": True}
    )
    assert options == SimulateOptions(embed_every=3, lr=0.1)
    assert SimulateOptions.from_run_config({"bits": 8}).bits == 8
    assert SimulateOptions(clients=10, fraction=0.25).clients_per_round == 2
    assert SimulateOptions(clients=3, fraction=0.01).clients_per_round == 1


def test_options_are_known_without_torch_or_flower() -> None:
    code = (
        "import sys\n"
        "from cmd_plugin.jobs.federated import SimulateOptions\n"
        "SimulateOptions(partition='dirichlet:0.3')\n"
        "print(sorted({'torch', 'flwr', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("method", METHODS[1:])
def test_the_size_of_an_update_is_bounded_as_asked(method: str) -> None:
    strategy = make_strategy(SimulateOptions(method=method, max_update_ratio=7.0))
    assert strategy.max_update_ratio == 7.0  # type: ignore[attr-defined]
