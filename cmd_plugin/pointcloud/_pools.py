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

__all__ = ["Pool", "Tap", "Watch", "first_tensor"]

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
_POOLS = _MAXIMA | _OTHERS | _SCATTERS
_FEWEST = 8  # tokens: sums over coordinates, colours and normals are no pools
_LAYERS = frozenset({"addmm", "bmm", "conv1d", "conv2d", "einsum", "linear", "matmul", "mm"})
_RECTIFIERS = frozenset({"relu", "relu6", "relu_"})
_KNOWN = _POOLS | _LAYERS | _RECTIFIERS


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
        if getattr(func, "__name__", "") in _POOLS:
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

    Args:
        cloud: [B, N, C] points of the clouds.
        mask: [B, N] bool; a forward pass may work on the real points only, joined in one axis.
        keep: Position in the list of a pool whose features are kept in any group.
        clone: Keep copies, for networks that overwrite the pooled tensor later.
    """

    def __init__(
        self,
        cloud: Tensor,
        mask: Tensor | None = None,
        keep: int | None = None,
        *,
        clone: bool = False,
    ) -> None:
        super().__init__()
        self.batch, self.points, self.mask = cloud.shape[0], cloud.shape[1], mask
        self._cloud = cloud
        self._places: Tensor | None = None
        self.keep, self.clone = keep, clone
        self.pools: list[Pool] = []
        self.coordinates: list[Tensor] = []
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
            if isinstance(result, Tensor) and result.ndim == 3 and result.shape[2] == 3:
                self._keep_coordinates(result)
        elif name in _RECTIFIERS:
            self._rectified, self._version = result, getattr(result, "_version", 0)
        elif name in _POOLS:
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
        if len(shape) == 3:  # nearly all calls
            return shape[0] == self.batch and (shape[1] <= 1 or shape[2] <= 1)
        if len(shape) < 2 or shape[0] != self.batch:
            return False
        return sum(size > 1 for size in shape[1:]) <= 1

    def _keep_coordinates(self, x: Tensor) -> None:
        # Positions of sampled tokens, for the way back from tokens to points. Loops that measure
        # distances make hundreds of this shape; only in these the first row is a point.
        batch, rows, _ = x.shape
        fits = batch == self.batch and 1 < rows < self.points
        if fits and x.dtype == self._cloud.dtype:
            if self._places is None:
                self._places = self._cloud[0, :, :3]
            x = x.detach()
            if bool((self._places == x[0, 0]).all(dim=1).any()):
                self.coordinates.append(x)

    def _forget(self) -> None:
        for number, pool in enumerate(self.pools):
            if number != self.keep:
                pool.features = None

    def _consider(
        self, name: str, args: tuple[Any, ...], kwargs: Any, result: Any, rectified: Any
    ) -> None:
        out = first_tensor(result)
        if out is None or not self._layer_seen or not args or not isinstance(args[0], Tensor):
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
            for number, pool in enumerate(self.pools):
                if not pool.is_max and number != self.keep:
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
        alone = x.ndim == 2 and self.batch == 1 and x.shape[0] == self.points
        if not alone and (x.ndim < 3 or x.shape[0] != self.batch):
            return None
        axis = _reduced_axis(x, out, args, kwargs)
        if alone:
            return (x.detach().T.unsqueeze(0), 0) if axis == 0 else None
        if axis is None or axis == 0:
            return None
        others = [a for a in range(1, x.ndim) if a != axis and x.shape[a] > 1]
        tokens = x.shape[axis]
        if len(others) > 1 or tokens > self.points:
            return None
        channels = x.shape[others[0]] if others else 1
        if tokens != self.points and (channels == self.points or tokens <= _FEWEST):
            return None  # a reduction over the channels or coordinates of every point or token
        x = x.detach()
        if x.ndim == 3 and axis == 2:
            return x, axis
        order = [0, *others, axis, *(a for a in range(1, x.ndim) if a not in (*others, axis))]
        return x.permute(order).reshape(self.batch, channels, tokens), axis

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
