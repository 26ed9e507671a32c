"""The shared helpers that this folder uses."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def _load_helper(name: str) -> None:
    # With --import-mode=importlib a folder of tests is not on the path.
    path = Path(__file__).parents[1] / "helpers" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


_load_helper("sentences")
