"""The decomposition as one of Captum's attributions, for its metrics and its visualisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from cmd_plugin.distinction.decomposition import Decomposer, decompose
from cmd_plugin.errors import InputError, ShapeError, require

if TYPE_CHECKING:
    from captum.attr import Attribution  # type: ignore[import-untyped, unused-ignore]
else:
    Attribution = require("captum.attr", "xai").Attribution

__all__ = ["REDUCTIONS", "DecompositionAttribution"]

REDUCTIONS = ("abs_mean", "signed_sum")


class DecompositionAttribution(Attribution):  # type: ignore[misc, unused-ignore]
    """Attributes a class to the part of the image that speaks for it.

    Captum has no place for explanations that are trained, so the trained one comes with the
    constructor; the rest is Captum's contract. Attributions are the distinct part, in the units of
    the images, never rescaled; what the branches miss of the image is the convergence delta.

    Args:
        decomposer: A trained one, with its classifier if targets are to be left out.
    """

    def __init__(self, decomposer: Decomposer) -> None:
        super().__init__(decomposer.classifier or decomposer)
        self.decomposer = decomposer

    @property
    def multiplies_by_inputs(self) -> bool:
        """True: attributions are parts of the image, not its gradients."""
        return True

    @override
    def has_convergence_delta(self) -> bool:
        """True."""
        return True

    @override
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: int | list[int] | Tensor | None = None,
        additional_forward_args: None = None,
        *,
        reduce: str | None = None,
        return_convergence_delta: bool = False,
        internal_batch_size: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return what speaks for the target in each image.

        Args:
            inputs: Images [B, C, H, W], or a tuple of one such tensor.
            target: The class, for all images or for each; by default the classifier's own answer.
            additional_forward_args: Not taken: the decomposition knows images alone.
            reduce: None keeps the channels; ``abs_mean`` and ``signed_sum`` give [B, 1, H, W].
            return_convergence_delta: Whether to return the mean size of the residual, [B], as well.
            internal_batch_size: Images at a time.
            **kwargs: None is known.

        Returns:
            The attributions, as a tuple if the inputs were one; with the delta, both.

        Raises:
            InputError: If an argument has no meaning here.
            ShapeError: If the inputs are not one tensor of images.
        """
        if additional_forward_args is not None or kwargs:
            names = [*kwargs] or ["additional_forward_args"]
            raise InputError(f"{', '.join(names)} has no meaning here: leave it out.")
        if reduce is not None and reduce not in REDUCTIONS:
            raise InputError(
                f"reduce must be None or one of {', '.join(REDUCTIONS)}, got {reduce}."
            )
        several = isinstance(inputs, tuple)
        if several and len(inputs) != 1:
            raise ShapeError(f"inputs must be one tensor of images, got {len(inputs)}.")
        images: Tensor = inputs[0] if isinstance(inputs, tuple) else inputs
        split = decompose(
            self.decomposer, images.detach(), target, internal_batch_size=internal_batch_size
        )
        found = _reduced(split.distinct, reduce)
        attributions = (found,) if several else found
        if not return_convergence_delta:
            return attributions
        return attributions, split.residual.abs().flatten(1).mean(dim=1)


def _reduced(distinct: Tensor, how: str | None) -> Tensor:
    if how is None:
        return distinct
    if how == "abs_mean":
        return distinct.abs().mean(dim=1, keepdim=True)
    return torch.sum(distinct, dim=1, keepdim=True)
