"""The explainer for ``lightning.pytorch``, whose trainers refuse ``pytorch_lightning``'s modules.

One class cannot be both, as callbacks are: Lightning asks which hooks a module overrides by
comparing it with its own base class, and would take the other distribution's for overridden ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cmd_plugin.distinction.explainer import ExplainerTraining

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule
else:
    from lightning.pytorch import LightningModule

__all__ = ["DecompositionExplainer"]


class DecompositionExplainer(ExplainerTraining, LightningModule):
    """Learns to split images into what speaks for a class and the rest, in ``lightning.pytorch``.

    Its arguments are those of :class:`cmd_plugin.distinction.explainer.ExplainerTraining`.
    """
