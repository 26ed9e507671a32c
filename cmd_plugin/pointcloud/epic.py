"""EPiC: an ensemble of one architecture on three kinds of partial clouds, for robustness.

Levi, Gilboa: *EPiC: Ensemble of Partial Point Clouds for Robust Classification* (ICCV 2023). Three
networks, each trained on one kind; at test four partial clouds of each kind, twelve members, and
the plain mean of their raw logits. Independent implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cmd_plugin.errors import InputError, ShapeError
from cmd_plugin.kernels.counter_random import check_seed, sample_index
from cmd_plugin.pointcloud._interception import class_scores, scores_of
from cmd_plugin.pointcloud.partials import (
    SIZES,
    VIEWS,
    View,
    anchor_points,
    partial_clouds,
)

__all__ = ["EPiC", "Votes"]


class Votes(NamedTuple):
    """What every member of an ensemble says.

    Attributes:
        logits: [B, M, C] raw scores, members of one view next to one another.
        views: M names: the view of every member, or the name of an extra one.
    """

    logits: Tensor
    views: tuple[str, ...]


class EPiC(nn.Module):
    """Classify clouds by the mean logit of networks that each see a part of them.

    A cloud's result depends on its points, the seed and its number, and not on its batch (up to the
    rounding of the networks' own matrix products): draws are counter-based, sample by sample.
    All members of a view go through their network in one pass of B x anchors partial clouds.

    Points added by a corruption come last in published files and the first point is an anchor:
    shuffle clouds before evaluating, see :func:`cmd_plugin.pointcloud.shuffle_points`.

    Args:
        networks: One network per view, by name; or a function without arguments that makes one
            (called once per view). Each maps clouds [B, n, 3] to logits [B, C], for any n;
            of several outputs the first counts.
        anchors: Partial clouds of each view, at evaluation a farthest point sample.
        sizes: Points of a partial cloud of each view; left out, those of :data:`SIZES`, which are
            meant for clouds of 1024 points. An entry for each network.
        neighbours: Nearest neighbours a curve may step to, the point itself counted.
        seed: Of the curves and subsets, in [0, 2^63).
        channels_first: The networks take [B, 3, n].
        extra: Further members by name, such as a refocused network; each gets the whole cloud
            and counts as one member.

    Raises:
        InputError: If a view, a size, the number of anchors or the seed cannot be used.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module] | Callable[[], nn.Module],
        *,
        anchors: int = 4,
        sizes: Mapping[str, int] | None = None,
        neighbours: int = 20,
        seed: int = 0,
        channels_first: bool = False,
        extra: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        made = networks if isinstance(networks, Mapping) else {view: networks() for view in VIEWS}
        unknown = [name for name in made if name not in VIEWS]
        if unknown or not made:
            raise InputError(f"networks need names out of {', '.join(VIEWS)}, got {[*made]}.")
        given: dict[str, int] = dict(SIZES) | dict(sizes or {})
        wrong = [name for name, size in given.items() if name not in VIEWS or size < 1]
        if wrong:
            raise InputError(f"sizes must be a positive number for {', '.join(VIEWS)}: {wrong}.")
        taken = [name for name in extra or {} if name in VIEWS]
        if taken:
            raise InputError(f"an extra member cannot be named {', '.join(taken)}: that is a view.")
        if anchors < 1 or neighbours < 2:
            raise InputError(
                f"anchors must be at least 1 and neighbours 2, got {anchors} and {neighbours}."
            )
        # In the order of VIEWS, however they were given: members have one order everywhere.
        self.networks = nn.ModuleDict({view: made[view] for view in VIEWS if view in made})
        self.extra = nn.ModuleDict(extra or {})
        self.anchors, self.neighbours = anchors, neighbours
        self.sizes: dict[str, int] = {view: int(given[view]) for view in self.networks}
        self.seed = check_seed(seed)
        self.channels_first = channels_first

    @property
    def views(self) -> tuple[str, ...]:
        """The view of every member, in the order of their logits."""
        parts = tuple(view for view in self.networks for _ in range(self.anchors))
        return (*parts, *self.extra)

    def parts(
        self,
        points: Tensor,
        view: View,
        *,
        index: Tensor | None = None,
        random_anchors: bool = False,
        seed: int | None = None,
        anchors: int | None = None,
    ) -> Tensor:
        """Return the partial clouds of one view.

        Args:
            points: [B, N, 3], floating point, finite.
            view: One of the networks' names.
            index: [B] sample numbers, by default 0..B-1.
            random_anchors: Draw the anchors (training) instead of spreading them.
            seed: Another seed than the ensemble's own, for training's fresh draws.
            anchors: Another number of anchors than the ensemble's own.

        Returns:
            [B, anchors, n, 3].

        Raises:
            ShapeError: If shapes or dtypes do not fit.
            NonFiniteError: If a coordinate is NaN or infinite.
        """
        if view not in self.networks:
            raise InputError(f"this ensemble has no {view!r}: it has {', '.join(self.networks)}.")
        used = self.seed if seed is None else check_seed(seed)
        count = self.anchors if anchors is None else anchors
        chosen = anchor_points(points, count, random=random_anchors, seed=used, index=index)
        return partial_clouds(
            points,
            view,
            chosen,
            self.sizes[view],
            neighbours=self.neighbours,
            seed=used,
            index=index,
        )

    def classify(self, view: str, clouds: Tensor) -> Tensor:
        """Return the logits [B, C] of a view's network for clouds [B, n, 3]."""
        logits = scores_of(self.networks[view](self._arranged(clouds)))
        if len(clouds) == 1 and logits.ndim == 1:  # a network that squeezes
            logits = logits.unsqueeze(0)
        if logits.ndim != 2 or len(logits) != len(clouds):
            raise ShapeError(
                f"the {view} network must map {len(clouds)} clouds to [{len(clouds)}, C] logits, "
                f"got {tuple(logits.shape)}."
            )
        return logits

    def votes(self, points: Tensor, index: Tensor | None = None) -> Votes:
        """Return the logits of all members, view by view.

        Args:
            points: [B, N, 3], floating point, finite.
            index: [B] sample numbers, by default 0..B-1.

        Raises:
            ShapeError: If shapes or dtypes do not fit, or a network answers in another shape.
            NonFiniteError: If a coordinate is NaN or infinite.
        """
        number = sample_index(index, len(points), points.device)
        members = []
        for view in VIEWS:
            if view in self.networks:
                parts = self.parts(points, view, index=number)
                logits = self.classify(view, parts.flatten(0, 1))
                members.append(logits.view(len(points), self.anchors, -1))
        whole = self._arranged(points)
        members += [class_scores(m(whole), len(points))[:, None] for m in self.extra.values()]
        return Votes(torch.cat(members, dim=1), self.views)

    def forward(self, points: Tensor, index: Tensor | None = None) -> Tensor:
        """Return the mean of the members' raw logits, [B, C]; arguments as for :meth:`votes`."""
        return self.votes(points, index).logits.mean(dim=1)

    def _arranged(self, clouds: Tensor) -> Tensor:
        return clouds.transpose(1, 2).contiguous() if self.channels_first else clouds
