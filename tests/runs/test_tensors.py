"""Files of tensors say what they are; nothing else is taken for them."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import pytest
import torch

from cmd_plugin.errors import InputError
from cmd_plugin.runs.tensors import Schema, read_schema

MODES = Schema("modes", 1, "a decomposition")


def test_tensors_come_back_bit_for_bit_also_where_they_share_memory(tmp_path: Path) -> None:
    base = torch.randn(4, 4)
    given = {"a": base, "b": base, "c": base.T, "d": torch.tensor(1, dtype=torch.uint8)}
    MODES.save(tmp_path / "m.safetensors", given, {"sums": "[1, 2]"})
    found, about = MODES.load(tmp_path / "m.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in given.items())
    assert about["sums"] == "[1, 2]"
    assert read_schema(tmp_path / "m.safetensors") == "cmd-plugin/modes/1"


def test_equal_tensors_make_equal_files(tmp_path: Path) -> None:
    about = {name: f'{name}: "\u00e9\u2028\n\x01" </x>' for name in ("z", "a", "k", "m", "b")}
    for number in range(8):
        MODES.save(tmp_path / f"{number}", {"b": torch.ones(3), 'a"\u00e9': torch.ones(2)}, about)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    found, metadata = MODES.load(tmp_path / "0")
    assert set(found) == {"b", 'a"\u00e9'}
    assert {name: metadata[name] for name in about} == about


def test_another_schema_or_version_is_refused(tmp_path: Path) -> None:
    MODES.save(tmp_path / "m.safetensors", {"a": torch.zeros(1)}, {})
    for other in (Schema("modes", 2, "a decomposition"), Schema("plan", 1, "a plan")):
        with pytest.raises(InputError, match=r"m\.safetensors is not a .* of this version"):
            other.load(tmp_path / "m.safetensors")


def test_damaged_files_are_refused_with_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with pytest.raises(InputError, match="there is no file"):
        MODES.load(path)
    MODES.save(path, {"a": torch.arange(50.0), "b": torch.zeros(3)}, {"text": "x" * 20})
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(bytes(data[: draw.choice([len(data), draw.randrange(len(data))])]))
        with contextlib.suppress(InputError):  # any other exception fails the test
            MODES.load(path)
