"""Federated learning that sends less: embedded CMD between Flower's clients and server.

:class:`ModeCodec`, :func:`partition_indices` and the adapters need nothing but this package;
everything else needs Flower (``pip install "cmd-plugin[federated]"``). Every name is imported when
it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cmd_plugin._face import lazy_face

if TYPE_CHECKING:
    from cmd_plugin.federated.adapters import add_adapters as add_adapters
    from cmd_plugin.federated.adapters import fold_adapters as fold_adapters
    from cmd_plugin.federated.baselines import APFStrategy as APFStrategy
    from cmd_plugin.federated.baselines import EDENStrategy as EDENStrategy
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

_WITH_FLOWER = {
    "APFStrategy": "baselines",
    "CMDStrategy": "cmd_strategy",
    "EDENStrategy": "baselines",
    "FedPAQStrategy": "baselines",
    "InProcessGrid": "inprocess",
    "MeteredGrid": "traffic",
    "TopKStrategy": "baselines",
    "cmd_mod": "client",
    "embedded_training": "training",
    "fit_round": "lightning",
    "project_mod": "client",
}
_MODULES = {
    **_WITH_FLOWER,
    "FrameError": "frame",
    "ModeCodec": "codec",
    "add_adapters": "adapters",
    "fold_adapters": "adapters",
    "partition_indices": "partition",
}

__all__ = sorted(_MODULES)

_find, __dir__ = lazy_face(__name__, _MODULES)


def __getattr__(name: str) -> Any:
    if name in _WITH_FLOWER:
        importlib.import_module(f"{__name__}._flower")  # says which extra is missing, if one is
    return _find(name)
