"""The helpers of this folder."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def _load_helpers() -> None:
    # With --import-mode=importlib a test folder is not on the path.
    path = Path(__file__).parents[1] / "helpers" / "image_files.py"
    spec = importlib.util.spec_from_file_location("image_files", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["image_files"] = module
    spec.loader.exec_module(module)


_load_helpers()
