"""The ground floor of every long job: options, folder, stages, progress, result, files, figures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cmd_plugin._face import lazy_face

if TYPE_CHECKING:
    from cmd_plugin.runs.folder import RunFolder as RunFolder
    from cmd_plugin.runs.job import Job as Job
    from cmd_plugin.runs.options import JobOptions as JobOptions
    from cmd_plugin.runs.options import option as option
    from cmd_plugin.runs.progress import Progress as Progress
    from cmd_plugin.runs.result import Result as Result
    from cmd_plugin.runs.table import Table as Table
    from cmd_plugin.runs.tensors import Schema as Schema

_MODULES = {
    "Job": "job",
    "JobOptions": "options",
    "Progress": "progress",
    "Result": "result",
    "RunFolder": "folder",
    "Schema": "tensors",
    "Table": "table",
    "option": "options",
}

__all__ = list(_MODULES)

__getattr__, __dir__ = lazy_face(__name__, _MODULES)
