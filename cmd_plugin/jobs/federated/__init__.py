"""``cmd-plugin federated simulate``, and the same two Flower apps to deploy.

``simulate.run(options, out)`` is the job, ``simulate.train`` gives the trained model as well;
:func:`make_client_app` and :func:`make_server_app` are what a Flower app needs. Importing this
package loads nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmd_plugin.jobs.federated.apps import make_client_app as make_client_app
    from cmd_plugin.jobs.federated.options import SimulateOptions as SimulateOptions
    from cmd_plugin.jobs.federated.simulate import make_server_app as make_server_app

__all__ = ["SimulateOptions", "make_client_app", "make_server_app"]

_HOMES = {
    "SimulateOptions": "options",
    "make_client_app": "apps",
    "make_server_app": "simulate",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name != "SimulateOptions":
        importlib.import_module("cmd_plugin.federated._flower")  # names the extra if one is missing
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
