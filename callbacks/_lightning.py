"""One ``Callback`` base that both Lightning distributions accept.

``lightning.pytorch.Callback`` and ``pytorch_lightning.Callback`` are unrelated classes, and
``LightningCLI`` refuses a callback of the other distribution. Inheriting from every installed one
makes a callback at home in both, without two copies of it. The type checker only sees
``pytorch_lightning``, which is the distribution this package depends on.

Code that uses this base must never test ``isinstance(x, Trainer)`` against one of the
distributions: use the objects that Lightning hands in.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__all__ = ["Callback"]


def _installed_callbacks() -> tuple[type, ...]:
    found: list[type] = []
    for namespace in ("lightning.pytorch", "pytorch_lightning"):
        try:
            module = importlib.import_module(namespace)
        except ModuleNotFoundError as error:
            # Only "this distribution is absent" may pass; a broken installation has to be seen.
            if error.name is None or not namespace.startswith(error.name):
                raise
            continue
        found.append(module.Callback)
    return tuple(found)


if TYPE_CHECKING:
    from pytorch_lightning import Callback
else:
    Callback = type(
        "Callback",
        _installed_callbacks(),
        {
            "__doc__": "A subclass of the ``Callback`` of every installed Lightning distribution.",
            "__module__": __name__,
        },
    )
