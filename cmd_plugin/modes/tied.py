"""Tied weights: those that follow their mode for good, and what a training does with them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor, nn

from cmd_plugin.errors import InputError, NonFiniteError, ShapeError
from cmd_plugin.kernels import FlatView, apply_embedding, fold_gradients
from cmd_plugin.modes.choice import ModeChoice
from cmd_plugin.modes.layout import Layout

__all__ = ["Owned", "TiedWeights", "moved_by"]

Owned = Sequence[bool] | None
"""Which tensors of a layout take part, in its order; None for all of them.

Where it is given, the weights are a view of these tensors and not of one flat vector.
"""


def moved_by(
    optimizers: Iterable[torch.optim.Optimizer], layout: Layout, tensors: Sequence[Tensor]
) -> Owned:
    """Return which tensors of a layout a step of these optimizers moves.

    Running statistics, which no optimizer holds, go with the parameters of their module. To move
    all parameters is to move everything.
    """
    held = {id(p) for optimizer in optimizers for g in optimizer.param_groups for p in g["params"]}
    moved = [id(tensor) in held for tensor in tensors]
    buffers = [not isinstance(tensor, nn.Parameter) for tensor in tensors]
    if all(own or buffer for own, buffer in zip(moved, buffers, strict=True)):
        return None
    modules = [name.rpartition(".")[0] for name in layout.names]
    mine = {module for module, own in zip(modules, moved, strict=True) if own}
    return [
        own or (buffer and module in mine)
        for own, buffer, module in zip(moved, buffers, modules, strict=True)
    ]


class TiedWeights:
    r"""The set E of weights that follow their mode for good, :math:`w_i = a_i\, r_{m(i)} + b_i`.

    What makes a profile r is never tied: the references, or all samples when a mode follows their
    mean.

    Args:
        layout: Layout of the N weights.
        choice: The modes.
        mode: [N] uint8 mode of each weight.
        scale: [N] float32 or float64, a; of a free weight whatever its owner keeps there.
        offset: [N] of the same dtype, b, likewise.
        mask: [N] bool, the tied weights; None for none.

    Attributes:
        layout: As given; so are ``choice``, ``mode``, ``scale``, ``offset`` and ``mask``, which are
            not copied: the last three change in place.
        count: Number of tied weights.
    """

    def __init__(
        self,
        layout: Layout,
        choice: ModeChoice,
        mode: Tensor,
        scale: Tensor,
        offset: Tensor,
        mask: Tensor | None = None,
    ) -> None:
        self.layout, self.choice = layout, choice
        self.mode, self.scale, self.offset = mode, scale, offset
        self.mask = torch.zeros_like(mode, dtype=torch.bool) if mask is None else mask
        self.count = int(self.mask.sum())
        self._equation: tuple[Tensor, Tensor] | None = None

    def seen_by(self, weights: FlatView, layout: Layout) -> TiedWeights:
        """Return the same set for a model's weights: with their layout, on their device."""
        device, dtype = weights.device, weights.dtype
        scale, offset = self.scale.to(device, dtype), self.offset.to(device, dtype)
        mode, mask = self.mode.to(device), self.mask.to(device)
        return TiedWeights(layout, self.choice, mode, scale, offset, mask)

    def move(self, mode: Tensor) -> None:
        """Move to where ``mode``, the table of the modes, lies now, and share it."""
        self.scale, self.offset, self.mask = (
            array.to(mode.device) for array in (self.scale, self.offset, self.mask)
        )
        self.mode = mode

    def add(self, chosen: Tensor) -> None:
        """Tie more weights, [N] bool, for good; what makes a profile stays free."""
        self.mask |= chosen
        self.mask[self.choice.members.to(self.mask.device)] = False
        self.count = int(self.mask.sum())
        self._equation = None

    def renew(self, scale: Tensor, offset: Tensor) -> None:
        """Give the free weights other coefficients, [N] each; the tied ones keep theirs."""
        torch.where(self.mask, self.scale, scale, out=self.scale)
        torch.where(self.mask, self.offset, offset, out=self.offset)

    # -- values ------------------------------------------------------------------------------------

    def write(self, weights: FlatView, profile: Tensor, own: Owned = None) -> None:
        """Put the tied weights on their curves, in place; all others keep their bits.

        Args:
            weights: The N weights, read in the dtype of the coefficients.
            profile: [M] values of the profiles.
            own: The tensors that may be written.
        """
        for part, at in self._parts(weights, own) if self.count else ():
            mask, mode = self.mask[at], self.mode[at]
            apply_embedding(part, mask, mode, self.scale[at], self.offset[at], profile)

    def project(self, weights: FlatView, profile: Tensor, own: Owned = None) -> int:
        """As :meth:`write`, for a model in training: refuse bad profiles, and clamp variances.

        Args:
            weights: The N weights.
            profile: [M] values of the profiles.
            own: The tensors that may be written.

        Returns:
            Number of weights written.

        Raises:
            ShapeError: If ``profile`` is not [M].
            NonFiniteError: If a profile is NaN or infinite; nothing is written then.
        """
        if profile.shape != self.choice.references.shape:
            raise ShapeError(
                f"profile must be [{self.choice.modes}], one value a mode, got "
                f"{tuple(profile.shape)}."
            )
        if not bool(profile.isfinite().all()):
            raise NonFiniteError(
                "a reference weight is NaN or infinite and would spread to the weights embedded "
                "in its mode: the training diverged."
            )
        self.write(weights, profile, own)
        for number, name in enumerate(self.layout.names):
            if name.endswith("running_var") and (own is None or own[number]):
                first, size = self.layout.offsets[number], self.layout.sizes[number]
                at = first + self.mask[first : first + size].nonzero()[:, 0].cpu()
                values = weights.gather(at)
                if bool((values < 0).any()):
                    weights.put(at, values.clamp(min=0.0))
        if own is None:
            return self.count
        tensors = self.layout.split(self.mask).values()
        return sum(int(mask.sum()) for mask, mine in zip(tensors, own, strict=True) if mine)

    def pool(self, weights: FlatView, own: Owned = None) -> Tensor:
        """Move the references to :meth:`nearest`, in place.

        Args:
            weights: The N weights; if the fit is not finite nothing is moved.
            own: The tensors whose weights pull, and whose references move.

        Returns:
            [M] float64 values of the references: as stored, or the fit that is not finite.
        """
        references = self.choice.references
        fitted = self.nearest(weights, own)
        if not bool(fitted.isfinite().all()):
            return fitted
        if own is None:
            weights.put(references, fitted)
        else:
            here = torch.tensor(own)[self._owner]
            weights.put(references[here], fitted[here])
        return weights.gather(references)

    def nearest(self, weights: FlatView, own: Owned = None, *, differences: bool = False) -> Tensor:
        r"""Return the references whose curves come nearest to the weights, [M] float64.

        The least-squares fit of each mode, :math:`r_m = (w_m + \sum_i a_i (w_i - b_i)) / (1 +
        \sum_i a_i^2)` over its reference m and the weights tied to it.

        Args:
            weights: The N weights.
            own: The tensors that take part, beside the references.
            differences: Whether ``weights`` are differences between two sets of weights on the
                curves, in which b has cancelled; the result is one too.
        """
        parts = self._parts(weights, own)
        equation = self._equation
        if equation is None or own is not None:
            squares, shift = (
                self._fold([(FlatView([array[at]], dtype=array.dtype), at) for _, at in parts])
                for array in (self.scale, self.offset)
            )
            equation = 1.0 + squares, shift
            if own is None:
                self._equation = equation
        weight, shift = equation
        pull = weights.gather(self.choice.references) + self._fold(parts)
        return (pull if differences else pull - shift) / weight

    def _fold(self, parts: Iterable[tuple[FlatView, slice]]) -> Tensor:
        """Return the sum of a times value over the tied weights of each mode, [M] float64, CPU."""
        sums = torch.zeros(self.choice.modes, dtype=torch.float64, device=self.mask.device)
        for values, where in parts:
            scratch = values.scratch()
            for number, start, stop in values.blocks():
                at = slice(where.start + start, where.start + stop)
                block = values.read(number, scratch).clone()  # folding zeroes what it has summed
                sums += fold_gradients(
                    block, self.mask[at], self.mode[at], self.scale[at], len(sums)
                )
        return sums.cpu()

    def _parts(self, weights: FlatView, own: Owned) -> list[tuple[FlatView, slice]]:
        """Return views of the tensors that take part, neighbours in one, and where each lies.

        Others are not even written with the bits they have: a graph that holds them would notice.
        """
        if own is None:
            return [(weights, slice(0, weights.numel))]
        ends = [*self.layout.offsets, self.layout.numel]
        parts = []
        for mine, run in groupby(range(len(own)), own.__getitem__):
            numbers = list(run)
            if mine:
                first, end = numbers[0], numbers[-1] + 1
                view = FlatView(weights.tensors[first:end], dtype=weights.dtype)
                parts.append((view, slice(ends[first], ends[end])))
        return parts

    @cached_property
    def _owner(self) -> Tensor:
        """[P] int64 number of the tensor that holds each weight that makes a profile."""
        starts = torch.tensor(self.layout.offsets)
        return torch.searchsorted(starts, self.choice.members, right=True) - 1

    # -- gradients and optimizers ------------------------------------------------------------------

    def tie_gradients(self, tensors: Sequence[Tensor], own: Owned = None) -> None:
        r"""Hand the gradients of the tied weights to what makes their modes' profiles.

        By the chain rule these gain :math:`\sum_i a_i g_i` over the weights tied to the mode, whose
        own gradients become zero.

        Args:
            tensors: The layout's tensors, in its order. A tensor without a gradient gets one if it
                makes a profile.
            own: The tensors that take part.

        Raises:
            InputError: If a gradient is sparse.
        """
        if not self.count:
            return
        layout, choice, device = self.layout, self.choice, self.mask.device
        own = [True] * len(tensors) if own is None else own
        for name, tensor, mine in zip(layout.names, tensors, own, strict=True):
            if mine and tensor.grad is not None and tensor.grad.layout != torch.strided:
                raise InputError(
                    f"{name!r} has a sparse gradient, which project='tie' cannot read: exclude it "
                    "from the modes."
                )
        sums = torch.zeros(choice.modes, dtype=torch.float64, device=device)
        for tensor, mine, start, size in zip(
            tensors, own, layout.offsets, layout.sizes, strict=True
        ):
            if mine and tensor.grad is not None:
                at = slice(start, start + size)
                flat = tensor.grad.reshape(-1)
                sums += fold_gradients(
                    flat, self.mask[at], self.mode[at], self.scale[at], len(sums)
                )
                _write_back(flat, tensor.grad)
        shares = choice.member_weight.to(device) * sums[choice.member_mode.to(device)]
        for index in sorted(set(self._owner.tolist())):
            tensor = tensors[index]
            if not own[index] or not tensor.requires_grad:
                continue
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
            chosen = self._owner == index
            inside = (choice.members[chosen] - layout.offsets[index]).to(device)
            flat = tensor.grad.reshape(-1)
            flat[inside] += shares[chosen.to(device)].to(flat.dtype)
            _write_back(flat, tensor.grad)

    def clear_slots(self, optimizer: torch.optim.Optimizer, tensors: Sequence[Tensor]) -> None:
        """Zero what an optimizer remembers about the tied weights: momenta, second moments.

        Args:
            optimizer: The optimizer.
            tensors: The layout's tensors, in its order.
        """
        for tensor, start, size in zip(
            tensors, self.layout.offsets, self.layout.sizes, strict=True
        ):
            if tensor not in optimizer.state:
                continue
            mask = self.mask[start : start + size].view(tensor.shape)
            for name, slot in optimizer.state[tensor].items():
                # A counter of steps has the shape of a scalar weight, but is none of its slots.
                if name != "step" and isinstance(slot, Tensor) and slot.shape == tensor.shape:
                    slot.masked_fill_(mask, 0.0)


def _write_back(flat: Tensor, gradient: Tensor) -> None:
    if not gradient.is_contiguous():  # then reshape(-1) made a copy
        gradient.copy_(flat.view(gradient.shape))
