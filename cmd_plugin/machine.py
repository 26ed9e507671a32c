"""What a measurement says about where it comes from."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

__all__ = ["describe_machine"]

_PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "triton", "numba")
_SOURCE = Path(__file__).resolve().parent.parent


def describe_machine() -> dict[str, Any]:
    """Return processor, threads, versions, commit and date.

    The commit is None for a package that does not lie in its own repository.
    """
    own = _git("rev-parse", "--show-toplevel") == str(_SOURCE)
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "platform": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        "commit": _git("rev-parse", "--short", "HEAD") if own else None,
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")) if own else None,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(_SOURCE), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
