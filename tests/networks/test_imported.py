"""A user's own network by import string, from the current folder, and each fault in a sentence."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

from cmd_plugin.errors import InputError
from cmd_plugin.networks.imported import import_network
from tests.helpers.sentences import assert_one_sentence

CODE = """
from torch import nn

class Net(nn.Linear):
    def __init__(self, outputs=2, *, bias=True):
        super().__init__(3, outputs, bias=bias)

class Needs(nn.Module):
    def __init__(self, classes):
        super().__init__()

class Outer:
    Inner = Net

def make():
    return Net(5)

def nothing():
    return "a network"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_networks.py").write_text(CODE)
    (tmp_path / "own_broken.py").write_text("import nowhere_to_be_found\n")
    (tmp_path / "own_raising.py").write_text("raise RuntimeError('no GPU. Buy one')\n")
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]


@pytest.mark.usefixtures("folder")
def test_a_network_of_the_current_folder_is_built_with_its_arguments() -> None:
    before = list(sys.path)
    network = import_network("own_networks:Net", {"outputs": 7, "bias": False})
    assert isinstance(network, nn.Linear)
    assert (network.out_features, network.bias) == (7, None)
    assert import_network("own_networks:make").out_features == 5
    assert import_network("own_networks:Outer.Inner").out_features == 2
    assert sys.path == before
    assert isinstance(import_network("torch.nn:ReLU"), nn.ReLU)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("place", "arguments", "why"),
    [
        ("own_networks", {}, "write module:Class"),
        ("own_networks.py:Net", {}, "there is no module own_networks.py"),
        ("own networks:Net", {}, "write module:Class"),
        (":Net", {}, "write module:Class"),
        ("own_nothing:Net", {}, "there is no module own_nothing"),
        ("own_networks:Met", {}, "did you mean Net?"),
        ("own_broken:Net", {}, "needs nowhere_to_be_found"),
        ("own_raising:Net", {}, "cannot be imported"),
        ("own_networks:Needs", {}, "missing 1 required positional argument: 'classes'"),
        ("own_networks:Net", {"width": 3}, "unexpected keyword argument 'width'"),
        ("own_networks:nothing", {}, "made str, no torch.nn.Module"),
        ("math:pi", {}, "cannot be built"),
    ],
)
def test_what_is_no_network_is_refused(place: str, arguments: dict[str, object], why: str) -> None:
    with pytest.raises(InputError) as caught:
        import_network(place, arguments)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("folder")
def test_what_a_module_says_stands_in_one_sentence() -> None:
    with pytest.raises(InputError) as caught:
        import_network("own_broken:Net")
    assert_one_sentence(caught.value, "own_broken", "install it")
