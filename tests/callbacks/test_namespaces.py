"""The base class, whichever Lightning distributions are installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

import cmd_plugin


def load_again() -> ModuleType:
    """A second copy of the module, executed under the imports of this moment."""
    path = Path(cmd_plugin.__file__).parent / "callbacks" / "_lightning.py"
    spec = importlib.util.spec_from_file_location("lightning_again", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("hidden", "left"),
    [("lightning", "pytorch_lightning"), ("pytorch_lightning", "lightning.pytorch")],
)
def test_one_distribution_is_enough(
    monkeypatch: pytest.MonkeyPatch, hidden: str, left: str
) -> None:
    base = importlib.import_module(left).Callback
    for name in [name for name in sys.modules if name.partition(".")[0] == hidden]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, hidden, None)
    module = load_again()
    assert module.Callback.__bases__ == (base,)


def test_a_broken_installation_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: str) -> ModuleType:
        raise ModuleNotFoundError("No module named 'torchmetrics'", name="torchmetrics")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="torchmetrics"):
        load_again()
