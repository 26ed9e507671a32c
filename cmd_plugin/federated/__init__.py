"""Federated learning that sends less: embedded CMD between Flower's clients and server.

:class:`ModeCodec` and the options of a run need nothing but this package; everything else needs
Flower (``pip install "cmd-plugin[federated]"``) and is imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cmd_plugin.federated.codec import ModeCodec
from cmd_plugin.federated.config import FederatedConfig
from cmd_plugin.federated.frame import FrameError
from cmd_plugin.federated.partition import partition_indices

if TYPE_CHECKING:
    from cmd_plugin.federated.apps import make_client_app as make_client_app
    from cmd_plugin.federated.baselines import APFStrategy as APFStrategy
    from cmd_plugin.federated.baselines import FedPAQStrategy as FedPAQStrategy
    from cmd_plugin.federated.baselines import TopKStrategy as TopKStrategy
    from cmd_plugin.federated.client import cmd_mod as cmd_mod
    from cmd_plugin.federated.client import project_mod as project_mod
    from cmd_plugin.federated.cmd_strategy import CMDStrategy as CMDStrategy
    from cmd_plugin.federated.inprocess import InProcessGrid as InProcessGrid
    from cmd_plugin.federated.lightning import fit_round as fit_round
    from cmd_plugin.federated.simulation import FederatedResult as FederatedResult
    from cmd_plugin.federated.simulation import make_server_app as make_server_app
    from cmd_plugin.federated.simulation import simulate as simulate
    from cmd_plugin.federated.traffic import MeteredGrid as MeteredGrid
    from cmd_plugin.federated.training import embedded_training as embedded_training

__all__ = [
    "APFStrategy",
    "CMDStrategy",
    "FedPAQStrategy",
    "FederatedConfig",
    "FederatedResult",
    "FrameError",
    "InProcessGrid",
    "MeteredGrid",
    "ModeCodec",
    "TopKStrategy",
    "cmd_mod",
    "embedded_training",
    "fit_round",
    "make_client_app",
    "make_server_app",
    "partition_indices",
    "project_mod",
    "simulate",
]

_WITH_FLOWER = {
    "APFStrategy": "baselines",
    "CMDStrategy": "cmd_strategy",
    "FedPAQStrategy": "baselines",
    "FederatedResult": "simulation",
    "InProcessGrid": "inprocess",
    "MeteredGrid": "traffic",
    "TopKStrategy": "baselines",
    "cmd_mod": "client",
    "embedded_training": "training",
    "fit_round": "lightning",
    "make_client_app": "apps",
    "make_server_app": "simulation",
    "project_mod": "client",
    "simulate": "simulation",
}


def __getattr__(name: str) -> Any:
    if name not in _WITH_FLOWER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module(f"{__name__}._flower")  # says which extra is missing, if one is
    return getattr(importlib.import_module(f"{__name__}.{_WITH_FLOWER[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
