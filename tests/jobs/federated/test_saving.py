"""A nested state on disk: what comes back is what was written, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from cmd_plugin.errors import InputError
from cmd_plugin.jobs.federated.saving import load_state, save_state

STATE: dict[str, Any] = {
    "numbers": [1, 2.5, True, None, 2**64 - 1, float("inf"), -0.0],
    "list": ["tensor", "list", [], {}],
    "nested": {"a": {"": torch.arange(6.0).reshape(2, 3)}, "é": "ü"},
    "empty": torch.empty(0, dtype=torch.uint8),
    "scalar": torch.tensor(7),
    "bool": torch.tensor([True, False]),
    "double": torch.tensor([0.1], dtype=torch.float64),
    "strided": torch.arange(8).reshape(2, 4).t(),
}


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(same(found[k], expected[k]) for k in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, torch.Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    return type(found) is type(expected) and repr(found) == repr(expected)


def test_everything_comes_back(tmp_path: Path) -> None:
    save_state(tmp_path / "state.safetensors", STATE)
    assert same(load_state(tmp_path / "state.safetensors"), STATE)
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


def test_equal_tensors_are_stored_once(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    plan = torch.arange(1000)
    state = {"clients": [plan.clone() for _ in range(50)], "other": plan.float()}
    save_state(path, state)
    with safe_open(path, framework="pt") as file:
        assert len(file.keys()) == 2
    assert same(load_state(path), state)


def test_damage_anywhere_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    state = {"round": 17, "weights": torch.arange(40.0)}
    save_state(path, state)
    whole = path.read_bytes()
    accepted = []
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            assert same(load_state(path), state), at
        except InputError as error:
            assert "state.safetensors" in str(error)  # noqa: PT017
        else:
            accepted.append(at)
    # The name and value of an entry that every safetensors file has, and the end of the header.
    assert len(accepted) < 40
    for length in (0, 10, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match="is damaged"):
            load_state(path)
    path.unlink()
    with pytest.raises(InputError, match="there is no file"):
        load_state(path)
