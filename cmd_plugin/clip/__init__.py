"""Embeddings of CLIP and of other networks: whitening as a likelihood, ellipsoids as geometry."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cmd_plugin._face import lazy_face

if TYPE_CHECKING:
    from cmd_plugin.clip.statistics import Gaussian as Gaussian
    from cmd_plugin.clip.statistics import GaussianStatistics as GaussianStatistics
    from cmd_plugin.clip.wclip import import_wclip as import_wclip
    from cmd_plugin.clip.whitening import Whitening as Whitening

_MODULES = {
    "Gaussian": "statistics",
    "GaussianStatistics": "statistics",
    "Whitening": "whitening",
    "import_wclip": "wclip",
}

__all__ = list(_MODULES)

__getattr__, __dir__ = lazy_face(__name__, _MODULES)
