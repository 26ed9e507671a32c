"""Find the tensor that enters a network's global pool, in any network, without touching it.

The forward pass runs under a function mode that sees every torch function the network calls. That
finds pools written as ``torch.max`` or ``amax`` in ``forward``, after functional activations, where
a module hook has nothing to hold on to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["POOLS", "Pool", "Tap", "Watch", "first_tensor", "reduced_view"]

_MAXIMA = frozenset(
    {
        "adaptive_max_pool1d",
        "adaptive_max_pool1d_with_indices",
        "adaptive_max_pool2d",
        "adaptive_max_pool2d_with_indices",
        "amax",
        "max",
        "max_pool1d",
        "max_pool1d_with_indices",
        "max_pool2d",
        "max_pool2d_with_indices",
        "topk",
    }
)
_OTHERS = frozenset(
    {
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "avg_pool1d",
        "avg_pool2d",
        "logsumexp",
        "mean",
        "sum",
    }
)
_SCATTERS = frozenset({"scatter_reduce", "scatter_reduce_"})
POOLS = _MAXIMA | _OTHERS | _SCATTERS
_FEWEST = 8  # tokens: sums over coordinates, colours and normals are no pools
_LAYERS = frozenset({"addmm", "bmm", "conv1d", "conv2d", "einsum", "linear", "matmul", "mm"})
_RECTIFIERS = frozenset({"relu", "relu6", "relu_"})
# May bring rows into another order. Only results that have a row for each point matter.
_MOVERS = frozenset(
    {"__getitem__", "embedding", "flip", "gather", "index_select", "roll", "take_along_dim"}
)
# May be pools, but written so that the tensor that enters them cannot be told.
_UNREAD = frozenset({"aminmax", "cummax", "index_reduce", "msort", "segment_reduce", "sort"})
_KNOWN = POOLS | _LAYERS | _RECTIFIERS


@dataclass
class Pool:
    """One reduction over the points.

    Attributes:
        call: Its number among all pooling functions the forward pass calls.
        op: Name of the torch function.
        is_max: Whether it is a maximum.
        shape: (B, F, M): clouds, channels, tokens.
        axis: The axis that was reduced, in the shape the network gave it.
        group: Pools of one group follow each other without a head between them.
        features: [B, F, M], a view of what enters it; dropped when a later group is found.
        version: Of the tensor, to notice if it is changed in place after the pool.
        rectified: Whether a ReLU made it, so that nothing in it is negative; False says nothing.
        doubtful: Whether sizes alone do not tell the tokens from the channels.
        squeezed: Whether the axis of the clouds was missing: a single cloud without it.
    """

    call: int
    op: str
    is_max: bool
    shape: tuple[int, int, int]
    axis: int
    group: int
    features: Tensor | None
    version: int
    rectified: bool = False
    doubtful: bool = False
    squeezed: bool = False

    def __str__(self) -> str:
        _, channels, tokens = self.shape
        return f"{self.op} over {tokens} tokens of {channels} channels"


def first_tensor(value: Any) -> Tensor | None:
    """The values of a result; maxima return them first, with their indices."""
    if isinstance(value, tuple) and value:
        value = value[0]
    return value if isinstance(value, Tensor) else None


class Tap(TorchFunctionMode):
    """Keeps what enters one known pool; small enough for ``torch.compile`` to trace.

    Args:
        pool: A pool found by :class:`Watch` in the same network.
    """

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.wanted = pool.call
        self.calls = 0
        self.entered: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call the function; remember the argument of the wanted pool."""
        if getattr(func, "__name__", "") in POOLS:
            if self.calls == self.wanted:
                self.entered = args[0]
            self.calls += 1
        return func(*args, **(kwargs or {}))


class Watch(TorchFunctionMode):
    """Lists every reduction over the points, and keeps what entered the last group of them.

    A reduction counts if it takes away one axis, whose size is the number of points (or smaller,
    after a sampling), and leaves clouds and channels only. T-Nets pool over the points too, but a
    head of linear layers follows before the next pool, which starts a new group. What comes before
    the first layer (centring, scaling of the input) does not count.

    Sizes may not tell what an axis holds: such pools are listed as doubtful, and a second pass
    settles them (:mod:`cmd_plugin.pointcloud._probes`), after which ``skip`` names the false ones.

    Args:
        cloud: [B, N, C] points of the clouds.
        mask: [B, N] bool; a forward pass may work on the real points only, joined in one axis.
        keep: Call number of a pool whose features are kept in any group.
        skip: Call numbers of what is known to be no pool over the points.
        clone: Keep copies, for networks that overwrite the pooled tensor later.

    Attributes:
        pools: All reductions over the points, in their order.
        coordinates: [B, M, 3] each: points of the clouds that may be positions of tokens.
        reordered: Whether rows of points may have been brought into another order.
        unread: Names of functions called that may pool, and cannot be followed.
    """

    def __init__(
        self,
        cloud: Tensor,
        mask: Tensor | None = None,
        keep: int | None = None,
        *,
        skip: frozenset[int] = frozenset(),
        clone: bool = False,
    ) -> None:
        super().__init__()
        self.batch, self.points, self.mask = cloud.shape[0], cloud.shape[1], mask
        self._cloud = cloud
        self._places: Tensor | None = None
        self.keep, self.skip, self.clone = keep, skip, clone
        self.pools: list[Pool] = []
        self.coordinates: list[Tensor] = []
        self.reordered = False
        self.unread: dict[str, None] = {}
        self._calls = 0
        self._layer_seen = self._head_seen = False
        self._rows = self.batch * self.points if mask is None else int(mask.sum())
        self._rectified: Any = None  # what the call before returned, if that was a ReLU
        self._version = 0  # its version then: not all that changes tensors is seen here

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call the function; note pools, heads, and possible coordinates of tokens."""
        # This runs at each of the network's calls, so most of them must leave it at once.
        result = func(*args, **kwargs) if kwargs else func(*args)
        name = getattr(func, "__name__", "")
        rectified, self._rectified = self._rectified, None
        if name not in _KNOWN:
            if isinstance(result, Tensor) and result.ndim == 3 and 3 in result.shape[1:]:
                self._keep_coordinates(result)
            if name in _MOVERS or name in _UNREAD:
                self._note_order(name, args, result)
        elif name in _RECTIFIERS:
            self._rectified, self._version = result, getattr(result, "_version", 0)
        elif name in POOLS:
            self._consider(name, args, kwargs or {}, result, rectified)
            self._calls += 1
        else:
            self._layer_seen = True
            if self._is_head(args):
                self._head_seen = True
            elif self._head_seen:
                self._forget()  # points are worked on again: what was pooled before fed no output
        return result

    def _is_head(self, args: tuple[Any, ...]) -> bool:
        x = args[0] if args else None
        if not isinstance(x, Tensor):
            return False
        shape = x.shape
        if len(shape) == 1:  # a network that squeezes single clouds
            return self.batch == 1
        if len(shape) == 3:  # nearly all calls
            return shape[0] == self.batch and (shape[1] <= 1 or shape[2] <= 1)
        if len(shape) < 2 or shape[0] != self.batch:
            return False
        return sum(size > 1 for size in shape[1:]) <= 1

    def _keep_coordinates(self, x: Tensor) -> None:
        # Positions of tokens, for the way back from tokens to points. Loops that measure distances
        # make hundreds of this shape; only in these the first row is a point.
        if x.shape[2] != 3:
            x = x.transpose(1, 2)
        batch, rows, _ = x.shape
        if batch != self.batch or not 1 < rows <= self.points or x.dtype != self._cloud.dtype:
            return
        x = x.detach()
        if rows == self.points and x.data_ptr() == self._cloud.data_ptr():
            return  # a view of the clouds
        if self._places is None:
            self._places = self._cloud[0, :, :3]
        if not bool((self._places == x[0, 0]).all(dim=1).any()):
            return
        if rows < self.points:
            self.coordinates.append(x)
        elif not x.equal(self._cloud[..., :3]):
            self.coordinates.append(x)
            self.reordered = True

    def _note_order(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        """Note that rows of points may have moved, which sizes do not show."""
        out = first_tensor(result)
        if out is None or not args or not isinstance(args[0], Tensor):
            return
        if name in _UNREAD:
            if self._layer_seen and {self.points, self._rows}.intersection(args[0].shape):
                self.unread[name] = None
        elif name == "__getitem__" and not _indexes_by_tensor(args[1]):
            return
        sizes = [size for size in out.shape if size > 1]
        if len(sizes) < 4 and (self.points in sizes or self._rows in sizes):
            self.reordered = self.reordered or name in _MOVERS or out.shape == args[0].shape

    def _forget(self) -> None:
        for pool in self.pools:
            if pool.call != self.keep:
                pool.features = None

    def _consider(
        self, name: str, args: tuple[Any, ...], kwargs: Any, result: Any, rectified: Any
    ) -> None:
        out = first_tensor(result)
        if out is None or not self._layer_seen or not args or not isinstance(args[0], Tensor):
            return
        if self._calls in self.skip:
            return
        if name in _SCATTERS:
            found = self._scattered(args, kwargs, out)
            reduce = args[4] if len(args) > 4 else kwargs.get("reduce")
            is_max = reduce == "amax"
        else:
            found = self._reduced(args, kwargs, out)
            is_max = name in _MAXIMA
        if found is None:
            return
        features, axis = found
        if self._head_seen or not self.pools:
            self._forget()
            group = self.pools[-1].group + 1 if self.pools else 0
        else:
            group = self.pools[-1].group
        self._head_seen = False
        if not is_max:  # means and sums abound (norms, attention): of these the last one counts
            for pool in self.pools:
                if not pool.is_max and pool.call != self.keep:
                    pool.features = None
        if self.clone:
            features = features.clone()
        batch, channels, tokens = features.shape
        shape, version = (batch, channels, tokens), features._version
        self.pools.append(
            Pool(
                self._calls,
                name,
                is_max,
                shape,
                axis,
                group,
                features,
                version,
                rectified is args[0] and args[0]._version == self._version,
                # Channels may be points, tokens of another sampling, or the tokens themselves.
                name not in _SCATTERS and channels in (1, self.points, tokens),
                name not in _SCATTERS and args[0].ndim == 2,
            )
        )

    @property
    def overwritten(self) -> bool:
        """Whether a kept tensor was changed in place after its pool."""
        return any(p.features is not None and p.features._version != p.version for p in self.pools)

    def _reduced(
        self, args: tuple[Any, ...], kwargs: Any, out: Tensor
    ) -> tuple[Tensor, int] | None:
        """What entered, as [B, F, M], if this was a reduction over the points of each cloud."""
        x = args[0]
        if not x.is_floating_point():
            return None
        axis = _reduced_axis(x, out, args, kwargs)
        if axis is None:
            return None
        if self.batch == 1 and x.ndim == 2 and len(x) > 1 and self.points in x.shape:
            seen = reduced_view(x.detach().unsqueeze(0), axis + 1)  # squeezed, or joined clouds
        elif axis == 0 or x.ndim < 3 or x.shape[0] != self.batch:
            return None
        else:
            seen = reduced_view(x.detach(), axis)
        if seen is None:
            return None
        tokens = seen.shape[2]
        if tokens > self.points or (tokens != self.points and tokens <= _FEWEST):
            return None  # a reduction over more channels than points, or over coordinates
        return seen, axis

    def _scattered(
        self, args: tuple[Any, ...], kwargs: Any, out: Tensor
    ) -> tuple[Tensor, int] | None:
        """The same for points of all clouds in one axis, as PyTorch Geometric keeps them."""
        source = args[3] if len(args) > 3 else kwargs.get("src")
        if not isinstance(source, Tensor) or source.ndim != 2 or out.ndim != 2:
            return None
        if len(source) != self._rows or len(out) != self.batch:
            return None
        source = source.detach()
        if self.mask is None:
            return source.view(self.batch, self.points, -1).transpose(1, 2), 0
        padded = source.new_zeros(self.batch, self.points, source.shape[1])
        padded[self.mask] = source
        return padded.transpose(1, 2), 0


def _indexes_by_tensor(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor) for part in parts)


def reduced_view(x: Tensor, axis: int) -> Tensor | None:
    """[B, F, M] of a tensor that is reduced over ``axis``; None if it has more than two others.

    Args:
        x: Clouds in its first axis.
        axis: The axis of the tokens, not 0.
    """
    if x.ndim == 3 and axis == 2:
        return x
    others = [a for a in range(1, x.ndim) if a != axis and x.shape[a] > 1]
    if len(others) > 1:
        return None
    order = [0, *others, axis, *(a for a in range(1, x.ndim) if a not in (*others, axis))]
    channels = x.shape[others[0]] if others else 1
    return x.permute(order).reshape(len(x), channels, x.shape[axis])


def _reduced_axis(x: Tensor, out: Tensor, args: tuple[Any, ...], kwargs: Any) -> int | None:
    """The one axis of more than one entry that a reduction took away, if there is just one."""
    if out.ndim == x.ndim:
        gone = [a for a in range(x.ndim) if x.shape[a] > 1 and out.shape[a] == 1]
        kept = all(out.shape[a] in (1, x.shape[a]) for a in range(x.ndim))
        return gone[0] if kept and len(gone) == 1 else None
    given = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else None))
    if isinstance(given, int) and not isinstance(given, bool):
        given = (given,)
    if not isinstance(given, (tuple, list)):
        return None
    gone = [int(a) % x.ndim for a in given if x.shape[int(a)] > 1]
    return gone[0] if len(gone) == 1 else None
