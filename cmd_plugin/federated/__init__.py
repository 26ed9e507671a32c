"""Federated learning that sends less: embedded CMD between Flower's clients and server.

:class:`ModeCodec` and :func:`partition_indices` need nothing but this package; everything else
needs Flower (``pip install "cmd-plugin[federated]"``). Every name is imported when it is first
used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmd_plugin.federated.baselines import APFStrategy as APFStrategy
    from cmd_plugin.federated.baselines import FedPAQStrategy as FedPAQStrategy
    from cmd_plugin.federated.baselines import TopKStrategy as TopKStrategy
    from cmd_plugin.federated.client import cmd_mod as cmd_mod
    from cmd_plugin.federated.client import project_mod as project_mod
    from cmd_plugin.federated.cmd_strategy import CMDStrategy as CMDStrategy
    from cmd_plugin.federated.codec import ModeCodec as ModeCodec
    from cmd_plugin.federated.frame import FrameError as FrameError
    from cmd_plugin.federated.inprocess import InProcessGrid as InProcessGrid
    from cmd_plugin.federated.lightning import fit_round as fit_round
    from cmd_plugin.federated.partition import partition_indices as partition_indices
    from cmd_plugin.federated.traffic import MeteredGrid as MeteredGrid
    from cmd_plugin.federated.training import embedded_training as embedded_training

__all__ = [
    "APFStrategy",
    "CMDStrategy",
    "FedPAQStrategy",
    "FrameError",
    "InProcessGrid",
    "MeteredGrid",
    "ModeCodec",
    "TopKStrategy",
    "cmd_mod",
    "embedded_training",
    "fit_round",
    "partition_indices",
    "project_mod",
]

_WITHOUT_FLOWER = {
    "FrameError": "frame",
    "ModeCodec": "codec",
    "partition_indices": "partition",
}
_WITH_FLOWER = {
    "APFStrategy": "baselines",
    "CMDStrategy": "cmd_strategy",
    "FedPAQStrategy": "baselines",
    "InProcessGrid": "inprocess",
    "MeteredGrid": "traffic",
    "TopKStrategy": "baselines",
    "cmd_mod": "client",
    "embedded_training": "training",
    "fit_round": "lightning",
    "project_mod": "client",
}


def __getattr__(name: str) -> Any:
    if name in _WITH_FLOWER:
        importlib.import_module(f"{__name__}._flower")  # says which extra is missing, if one is
    elif name not in _WITHOUT_FLOWER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _WITH_FLOWER.get(name) or _WITHOUT_FLOWER[name]
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
