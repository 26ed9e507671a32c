"""What a point network looks at: scores of every point from one forward pass.

Nothing of the network is edited: the tensor that enters its global pool is caught on the way, see
:mod:`cmd_plugin.pointcloud._interception`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from cmd_plugin.errors import InputError, NonFiniteError, ShapeError
from cmd_plugin.kernels import entropy_parts, normalised_entropy
from cmd_plugin.kernels import point_importance as score_features
from cmd_plugin.pointcloud._interception import (
    Forward,
    as_it_is,
    as_points,
    choose_pool,
    inner_module,
    intercept,
    layer_features,
    listed,
    scores_of,
)
from cmd_plugin.pointcloud._pools import Pool, Tap, Watch
from cmd_plugin.pointcloud._tokens import in_order, way_back
from cmd_plugin.pointcloud.names import MEASURES, Measure

__all__ = ["ImportanceHead", "PointImportance", "point_importance"]

_FEW = 16  # channels
_AXES, _WIDEST = 9, 16  # fewer points than that with more channels than this are channels first


@dataclass(frozen=True)
class PointImportance:
    """Scores of points, and where they come from.

    Attributes:
        scores: [B, N] the measure asked for; 0 for points masked out.
        norm: [B, N] FBI: norm over channels of each point's feature vector.
        wins: [B, N] channels of the global maximum that each point wins; None if the pool is no
            maximum, or with ``measure="fbi"``.
        entropy: [B] normalised entropy H of the counts over the tokens, in [0, 1]; None like
            ``wins``.
        entropy_bits: [B] the same in bits, not divided by log2 of the number of tokens.
        output: What the network returned (its first tensor).
        mask: [B, N] bool, True for real points; None if all are.
        pool: What reduces the tokens, in words, or the name of the layer.
        channels: Number F of channels.
        tokens: Number M of tokens; below N if the network samples, and then each point has the
            scores of the token nearest to it.
        signed: Whether features can be negative (no activation before the pool).
        candidates: All reductions over the points that were seen, in their order.
    """

    scores: Tensor
    norm: Tensor
    wins: Tensor | None
    entropy: Tensor | None
    entropy_bits: Tensor | None
    output: Tensor
    mask: Tensor | None
    pool: str
    channels: int
    tokens: int
    signed: bool
    candidates: tuple[str, ...]

    def display(self) -> Tensor:
        """Scores divided by the largest of each cloud, [B, N] in [0, 1], for a colour map."""
        return self.scores / (self.scores.amax(dim=1, keepdim=True) + 1e-9)


def point_importance(
    model: nn.Module,
    points: Tensor,
    measure: Measure = "fbi",
    *,
    norm: float = 1.0,
    ties: Literal["first", "split"] = "first",
    mask: Tensor | None = None,
    forward: Forward = as_it_is,
    layer: str | nn.Module | None = None,
    pool: int | None = None,
    token_axis: int | None = None,
    tokens: Tensor | None = None,
) -> PointImportance:
    r"""Score every point by what it brings to the global pool; one forward pass, any network.

    With X [B, F, M] the features that enter the pool and n the number of channels a token wins:

    - ``"fbi"``: :math:`s_i = \lVert X_{\cdot i} \rVert_1`, Feature Based Interpretability, which is
      also the soft measure of Critical Points++. It needs no maximum, and is not class specific.
    - ``"critical"``: 1 for the critical points, those with :math:`n_i > 0`, else 0. With a
      point-wise network and nothing but a maximum they alone reproduce the output exactly; with
      neighbourhoods or [max ; mean] heads they do not.
    - ``"critical++"``: :math:`n_i` itself, the discrete measure of Critical Points++.
    - ``"entropy"``: :math:`-p_i \log_2 p_i / \log_2 M` with p the smoothed share of the wins: each
      token's part of the normalised entropy H. (The papers define H only; its parts are ours.)

    The network runs in evaluation mode, without gradients and uncompiled; afterwards it is as it
    was. If it samples M < N tokens, their coordinates are recognised among the tensors of the
    forward pass, and each point gets the score of its nearest token; H stays the entropy over the M
    tokens. Where sizes coincide (as many channels as points, as many tokens as points) further
    passes on points in another order or place settle what is what; the rest costs one pass.

    Args:
        model: Any network, also compiled, data-parallel, or under autocast.
        points: [B, N, C] floating, a tensor or an array; the first three channels are coordinates.
            What is float64 is converted for a float32 network.
        measure: What ``scores`` shall be.
        norm: Order of the norm of FBI: 1 (published), 2 or inf.
        ties: What happens to a channel's win if several tokens share the maximum:
            ``"first"`` or, independent of the order of the points, ``"split"``.
        mask: [B, N] bool, True for real points of ragged clouds. How the network learns of it is
            up to ``forward``.
        forward: How to call the network, by default ``model(points)``. See
            :func:`channels_first` for networks that take [B, C, N].
        layer: Name of a module (or the module) whose output is one vector per token, for heads
            without a pool, such as attention. Counts then need a maximum that was seen as well.
        pool: Which pool to take if several feed the head: the error lists them.
        token_axis: Which axis of the layer's output counts the tokens, if that is ambiguous.
        tokens: [B, M, 3] coordinates of the tokens, if they are not recognised.

    Raises:
        InputError: If no pool was found, several feed the head, the measure needs a maximum and the
            pool is none, or it cannot be told which token is which point.
        ShapeError: If points, mask, tokens or the layer's output do not fit, or the network takes
            [B, C, N] and ``forward`` does not say so.
        NonFiniteError: If points or features hold NaN or infinite values.
    """
    if measure not in MEASURES:
        raise InputError(f"unknown measure {measure!r}: choose one of {', '.join(MEASURES)}.")
    points = as_points(model, points)
    _check_points(points, mask)

    def entering(clouds: Tensor) -> tuple[Any, Watch, Tensor, str, bool]:
        output, watch, hooked = intercept(
            model, clouds, forward=forward, mask=mask, layer=layer, pool=pool
        )
        chosen = _chosen_pool(watch, pool, layer, counting)
        if hooked is not None:
            name = layer if isinstance(layer, str) else type(layer).__name__
            features = layer_features(hooked, len(clouds), clouds.shape[1], token_axis)
            return output, watch, features, f"layer {name}", False
        assert chosen is not None  # or _chosen_pool had raised
        assert chosen.features is not None
        return output, watch, chosen.features, str(chosen), chosen.rectified

    counting = measure != "fbi"
    output, watch, features, source, rectified = entering(points)

    def again(clouds: Tensor) -> tuple[Tensor, Watch]:
        _, seen, entered, _, _ = entering(clouds)
        return entered, seen

    way = way_back(features, points, mask, watch, tokens, again)
    token_mask = mask if way is None else way.mask
    signed = not rectified and _signed(features, token_mask)
    scored = score_features(
        features,
        token_mask,
        order=norm,
        ties=ties,
        wins=counting,
        # With a mask, what it hides may be negative all the same.
        nonnegative=not signed and (rectified or token_mask is None),
    )
    _check_features(scored.norm, source)
    entropy = bits = parts = None
    if scored.wins is not None:
        parts = entropy_parts(scored.wins, token_mask)
        entropy = parts.sum(dim=1)
        bits = normalised_entropy(scored.wins, token_mask, bits=True)
    spread = (lambda x: x) if way is None else way.spread
    by_point = spread(scored.norm)
    wins = None if scored.wins is None else spread(scored.wins)
    scores = by_point
    if measure == "critical++" and wins is not None:
        scores = wins.to(by_point.dtype)
    elif measure == "critical" and wins is not None:
        scores = (wins > 0).to(by_point.dtype)
    elif measure == "entropy" and parts is not None:
        scores = spread(parts).to(by_point.dtype)
    return PointImportance(
        scores=scores,
        norm=by_point,
        wins=wins,
        entropy=entropy,
        entropy_bits=bits,
        output=scores_of(output).detach(),
        mask=mask,
        pool=source,
        channels=features.shape[1],
        tokens=features.shape[2],
        signed=signed,
        candidates=tuple(str(candidate) for candidate in watch.pools),
    )


def _check_points(points: Tensor, mask: Tensor | None) -> None:
    if points.ndim == 3 and 3 <= points.shape[1] <= _AXES and points.shape[2] > _WIDEST:
        raise ShapeError(
            f"points look like [B, C, N], {tuple(points.shape)}: pass [B, N, C], and "
            "forward=channels_first (of cmd_plugin.pointcloud) if the network takes [B, C, N]."
        )
    if points.ndim != 3 or points.shape[2] < 3 or 0 in points.shape:
        raise ShapeError(f"points must be [B, N, C] with C at least 3, got {tuple(points.shape)}.")
    if not points.is_floating_point():
        raise ShapeError(f"points must be floating point numbers, got {points.dtype}.")
    if mask is not None and (mask.shape != points.shape[:2] or mask.dtype != torch.bool):
        raise ShapeError(
            f"mask must be {tuple(points.shape[:2])} bool, got {tuple(mask.shape)} {mask.dtype}."
        )
    if _surely_finite(points):
        return
    real = points if mask is None else points[mask]
    wrong = int((~torch.isfinite(real)).sum())
    if wrong:
        raise NonFiniteError(f"points hold {wrong} NaN or infinite numbers: remove those points.")


def _surely_finite(x: Tensor) -> bool:
    """Whether the sum is finite, and with it all numbers; large finite ones may add up to inf."""
    return math.isfinite(float(x.sum()))


def _chosen_pool(
    watch: Watch, wanted: int | None, layer: str | nn.Module | None, counting: bool
) -> Pool | None:
    """The pool that scores come from; None if a layer stands in for it."""
    if layer is not None and not counting:
        return None
    chosen = choose_pool(watch.pools, wanted)
    if counting and (chosen is None or not chosen.is_max):
        found = "no pool over the points" if chosen is None else f"a {chosen}"
        raise InputError(
            f"this network has {found} where its head begins, not a maximum: no point wins "
            "anything there, so counts, critical points and entropy mean nothing. Use "
            "measure='fbi'" + ("." if chosen is not None else ", with layer=NAME.")
        )
    if chosen is None:
        unread = f" (it calls {', '.join(watch.unread)}, which may be one)" if watch.unread else ""
        raise InputError(
            f"no global pool over the points was found{unread}: heads with attention, a class "
            "token or a pool by sorting have none that can be followed. For measure='fbi', name "
            "the layer that holds one vector for each point by layer=NAME."
        )
    if chosen.features is None:
        raise InputError(
            "the network works on points again after its last pool, so none is the global one: "
            f"choose one by pool=NUMBER: {listed(watch.pools)}."
        )
    return chosen


def _check_features(norm: Tensor, source: str) -> None:
    wrong = 0 if _surely_finite(norm) else int((~torch.isfinite(norm)).sum())
    if wrong:
        raise NonFiniteError(
            f"the features of {wrong} tokens are NaN or infinite ({source}): check the weights, "
            "and pass mask= if the network hides points behind infinite values."
        )


def _signed(features: Tensor, mask: Tensor | None) -> bool:
    if mask is not None:
        features = features.masked_fill(~mask.unsqueeze(1), 0.0)
    # Where features can be negative, a few channels tell, and the rest need not be read.
    return any(bool(part.amin() < 0) for part in (features[:, :_FEW], features))


class ImportanceHead(nn.Module):
    """A network that also returns scores; the way to have them inside ``torch.compile``.

    Finds the global pool once, on an example, then taps that pool in every forward pass. Compiles
    with ``fullgraph=True``; hooks registered after compilation would be missed silently. Gradients
    flow to the network's output as always, and not through the scores.

    Args:
        model: Any network whose tokens are the points.
        example: [B, N, C] points of the kind the network will see.
        norm: Order of the norm: 1, 2 or inf.
        forward: How to call the network.
        pool: Which pool to take if several feed the head.

    Raises:
        InputError: If there is no pool, or several feed the head.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Tensor,
        *,
        norm: float = 1.0,
        forward: Forward = as_it_is,
        pool: int | None = None,
    ) -> None:
        super().__init__()
        self.model = inner_module(model)
        self.norm, self.call = norm, forward
        example = as_points(self.model, example)
        _check_points(example, None)

        def entering(clouds: Tensor) -> tuple[Pool, Watch]:
            _, watch, _ = intercept(self.model, clouds, forward=forward, pool=pool)
            found = _chosen_pool(watch, pool, None, False)
            assert found is not None  # or it raised
            return found, watch

        def again(clouds: Tensor) -> tuple[Tensor, Watch]:
            found, watch = entering(clouds)
            assert found.features is not None
            return found.features, watch

        chosen, watch = entering(example)
        assert chosen.features is not None
        moved = watch.reordered and chosen.shape[2] == example.shape[1]
        if moved:
            moved = not in_order(chosen.features, example, None, again)
        if chosen.shape[2] != example.shape[1] or chosen.axis == 0 or moved:
            raise InputError(
                f"the network pools by {chosen}, not over the {example.shape[1]} points in their "
                "order: use point_importance, which brings tokens back to points."
            )
        self._pool = chosen
        chosen.features = None

    @override
    def forward(self, points: Tensor) -> tuple[Any, Tensor]:
        """The network's output, and FBI scores [B, N] float32."""
        tap = Tap(self._pool)
        with tap:
            output = self.call(self.model, points)
        entered = tap.entered
        assert entered is not None
        rest = [a for a in range(1, entered.ndim) if a != self._pool.axis]
        wide = entered.detach().float()
        return output, torch.linalg.vector_norm(wide, self.norm, dim=rest)
