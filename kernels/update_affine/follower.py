"""Updates that never wait for the device: what those of one network have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cmd_plugin.kernels.flat_view import FlatView

if TYPE_CHECKING:
    from cmd_plugin.kernels.update_affine._triton_follow import Scratch

__all__ = ["HEADER", "Follower"]

HEADER = 4


class Follower:
    r"""Takes snapshots of a network in without asking the device whether they are finite.

    A function that decides on the host waits for the device again and again: for the weights that
    make the profiles, for the sum that says whether all is finite, for numbers written one by one.
    Here the whole recursive update (see :func:`cmd_plugin.kernels.update_affine`) is four launches,
    and the numbers of the modes stay on the device. They are one vector, [4 + 4 M] float64: the
    count :math:`n`, the sum of squares, the number of snapshots taken in, whether one was refused
    (0 or 1), and then the profiles, their means, their sums of squares and their units
    :math:`Z`, M of each.

    A snapshot is refused for what :func:`cmd_plugin.kernels.update_affine.accepts` refuses, or if a
    profile's sum of squares overflows; the state keeps every bit then, and nothing is taken in any
    more until the fourth number is set to 0 again.

    Weights are read twice, 4 and 4 bytes, the state 9 bytes and written 8: 25 a float32 weight.

    Args:
        weights: The N weights, where they stay; every tensor :attr:`FlatView.addressable`.
        members: [P] int64, CPU, flat positions of the weights that make the profiles.
        member_mode: [P] int64, the mode of each.
        member_weight: [P] float64, its coefficient.
        references: [M] int64 flat positions of the weights whose own coefficients are kept exact;
            None for none.
        decay: Forgetting factor in (0, 1].
        limit: Sum of squares beyond which a snapshot is refused.
        far: S over Z, or Z over S, beyond which Z moves by a power of two, and the slopes with it.
        still: S below which Z stays where it is.

    Attributes:
        weights: As given.
    """

    def __init__(
        self,
        weights: FlatView,
        members: Tensor,
        member_mode: Tensor,
        member_weight: Tensor,
        references: Tensor | None,
        *,
        decay: float,
        limit: float,
        far: float,
        still: float,
    ) -> None:
        self.weights = weights
        device = weights.device
        addresses, kinds = weights.addresses_of(members)
        given = (addresses, kinds, member_mode, member_weight.double())
        self._members = [table.to(device) for table in given]
        self._references = None if references is None else references.to(device)
        settings = [decay, limit, far, still]
        self._settings = torch.tensor(settings, dtype=torch.float64, device=device)
        self._table = weights.pointer_table()
        self._scratch: Scratch | None = None

    def follow(
        self,
        mode: Tensor,
        slope: Tensor,
        mean: Tensor,
        total: Tensor | None,
        state: Tensor,
        faults: Tensor,
    ) -> None:
        """Take the weights in as they are now.

        The same launches on the same memory at every call with the same tensors, nothing else: the
        work of a :class:`cmd_plugin.kernels.replay.Replay`.

        Args:
            mode: [N] uint8.
            slope: [N], changed in place; so are ``mean`` and ``total``.
            mean: [N].
            total: [N] sums of squared deviations, or None.
            state: [4 + 4 M] float64, changed in place.
            faults: [2] int64. Of a refused snapshot it gets the number of weights that are not
                finite, added, and the flat position of the first, as the least; so it starts as
                (0, N).
        """
        from cmd_plugin.kernels.update_affine import _triton_follow

        if self._scratch is None:
            modes = (state.numel() - HEADER) // 4
            self._scratch = _triton_follow.Scratch(self._table, modes, mean)
        _triton_follow.follow(
            self._table,
            mode,
            slope,
            mean,
            total,
            state,
            self._members,
            self._references,
            faults,
            self._scratch,
            self._settings,
        )
