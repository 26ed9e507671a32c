"""Tied weights: those that follow their mode for good, and what a training does with them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from cmd_plugin.errors import InputError, NonFiniteError, ShapeError
from cmd_plugin.kernels import FlatView, apply_embedding, fold_gradients
from cmd_plugin.modes.choice import ModeChoice
from cmd_plugin.modes.layout import Layout

__all__ = ["Owned", "TiedWeights", "moved_by"]

Owned = Sequence[bool] | None
"""Which tensors of a layout take part, in its order; None for all of them."""


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
        layout: As given; so are ``choice``, ``mode``, ``scale``, ``offset`` and ``mask``. None is
            copied; scale, offset and mask change in place.
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
        if self.count:
            mask = self._among(own)
            apply_embedding(weights, mask, self.mode, self.scale, self.offset, profile)

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
        mask = self._among(own)
        for variance in self.layout.variances():
            at = variance.start + mask[variance].nonzero()[:, 0].cpu()
            values = weights.gather(at)
            if bool((values < 0).any()):
                weights.put(at, values.clamp(min=0.0))
        return self.count if own is None else int(mask.sum())

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
        mask = self._among(own)
        equation = self._equation
        if equation is None or own is not None:
            arrays = (FlatView([array], dtype=array.dtype) for array in (self.scale, self.offset))
            squares, shift = (self._fold(array, mask) for array in arrays)
            equation = 1.0 + squares, shift
            self._equation = equation if own is None else self._equation
        weight, shift = equation
        pull = weights.gather(self.choice.references) + self._fold(weights, mask)
        return (pull if differences else pull - shift) / weight

    def _fold(self, values: FlatView, mask: Tensor) -> Tensor:
        """Return the sum of a times value over the tied weights of each mode, [M] float64, CPU."""
        sums = torch.zeros(self.choice.modes, dtype=torch.float64, device=values.device)
        scratch = values.scratch()
        for number, start, stop in values.blocks():
            at = slice(start, stop)
            block = values.read(number, scratch).clone()  # folding zeroes what it has summed
            sums += fold_gradients(block, mask[at], self.mode[at], self.scale[at], len(sums))
        return sums.cpu()

    def _among(self, own: Owned) -> Tensor:
        """Return which weights are tied and lie in the tensors that take part, [N] bool."""
        if own is None:
            return self.mask
        mask = self.mask.clone()
        for start, size, mine in zip(self.layout.offsets, self.layout.sizes, own, strict=True):
            if not mine:
                mask[start : start + size] = False
        return mask

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
