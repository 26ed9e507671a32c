"""``cmd-plugin federated simulate``, and the same two Flower apps to deploy.

``simulate.run(options, out)`` is the job, ``simulate.train`` gives the trained model as well;
:func:`make_client_app` and :func:`make_server_app` are what a Flower app needs. Importing this
package loads nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cmd_plugin._face import lazy_face

if TYPE_CHECKING:
    from cmd_plugin.jobs.federated.apps import make_client_app as make_client_app
    from cmd_plugin.jobs.federated.options import SimulateOptions as SimulateOptions
    from cmd_plugin.jobs.federated.simulate import make_server_app as make_server_app

_MODULES = {
    "SimulateOptions": "options",
    "make_client_app": "apps",
    "make_server_app": "simulate",
}

__all__ = sorted(_MODULES)

_find, __dir__ = lazy_face(__name__, _MODULES)


def __getattr__(name: str) -> Any:
    if name in ("make_client_app", "make_server_app"):
        # Says which extra is missing, if one is.
        importlib.import_module("cmd_plugin.federated._flower")
    return _find(name)
