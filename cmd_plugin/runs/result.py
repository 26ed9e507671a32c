"""What every job gives back, and writes as ``result.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cmd_plugin.errors import InputError
from cmd_plugin.runs.files import read_json

__all__ = ["RESULT", "Result", "finite"]

RESULT = "result.json"

_ADVICE = "replace the run with --overwrite, or choose another --out"


@dataclass(frozen=True)
class Result:
    """A finished job.

    Attributes:
        job: Its name, as on the command line: ``"points train"``.
        options: All options it ran with, as JSON types.
        data: What it ran on: names, sizes, classes.
        metrics: What it found.
        machine: Processor, versions, commit and date, see :func:`describe_machine`.
        seconds: Wall-clock seconds by what they were spent on; ``"total"`` is the whole run in the
            process that finished it.
        files: What it wrote, relative to ``out``, ``result.json`` itself included.
        out: The folder; None if nothing was kept.
    """

    job: str
    options: Mapping[str, Any]
    data: Mapping[str, Any]
    metrics: Mapping[str, Any]
    machine: Mapping[str, Any]
    seconds: Mapping[str, float]
    files: tuple[str, ...]
    out: Path | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the content of result.json."""
        content = asdict(self)
        del content["out"]
        return {**content, "files": list(self.files)}

    @classmethod
    def load(cls, path: Path, out: Path | None = None) -> Result:
        """Read a result.

        Args:
            path: A result.json.
            out: Folder its files are in; by default the one of ``path``.

        Raises:
            InputError: If it is damaged or something else.
        """
        content = read_json(path, _ADVICE)
        kinds = {"job": str, "files": list} | dict.fromkeys(
            ("options", "data", "metrics", "machine", "seconds"), dict
        )
        for name, kind in kinds.items():
            if not isinstance(content.get(name), kind):
                raise InputError(f"{path} is no result of this version (no {name!r}): {_ADVICE}.")
        known = {name: content[name] for name in kinds}
        return cls(**{**known, "files": tuple(content["files"])}, out=out or path.parent)


def finite(value: float) -> float | None:
    """Return a number that JSON can hold: None in the place of NaN and of the infinities."""
    return value if math.isfinite(value) else None
