"""Updates that a device has taken in, or refused, before the host has looked."""

from __future__ import annotations

from functools import partial
from operator import is_
from typing import NamedTuple

import torch
from torch import Tensor

from cmd_plugin.kernels import FlatView
from cmd_plugin.kernels.replay import Replay
from cmd_plugin.kernels.update_affine import Follower, most_squares
from cmd_plugin.kernels.update_affine.follower import HEADER
from cmd_plugin.modes.choice import ModeChoice

__all__ = ["Ahead", "Numbers", "Refused"]


class Numbers(NamedTuple):
    """What is known of the modes besides the weights' state, on the host.

    Attributes:
        weight: Effective number of snapshots n.
        total_sum: Sum of squared deviations of all weights.
        seen: Number of snapshots taken in.
        profile: [M] float64 values of the profiles; so are ``profile_mean``, ``squares``, ``unit``.
    """

    weight: float
    total_sum: float
    seen: int
    profile: Tensor
    profile_mean: Tensor
    squares: Tensor
    unit: Tensor


class Refused(NamedTuple):
    """A snapshot that was not taken in.

    Attributes:
        bad: How many weights are NaN or infinite; 0 if all are finite and some far too large.
        first: Flat position of the first of them; None if there is none.
        later: How many snapshots came after it before anyone looked, and are lost too.
    """

    bad: int
    first: int | None
    later: int = 0


class Ahead:
    """The numbers of the modes where the weights are, a few updates ahead of the host.

    Args:
        weights: The N weights, where they stay.
        choice: The modes.
        numbers: As they are now.
        exact: Whether the references' own coefficients are kept exact.
        decay: Forgetting factor.
        far: See :class:`cmd_plugin.kernels.update_affine.Follower`; so is ``still``.

    Attributes:
        weights: As given.
    """

    def __init__(
        self,
        weights: FlatView,
        choice: ModeChoice,
        numbers: Numbers,
        *,
        exact: bool,
        decay: float,
        far: float,
        still: float,
    ) -> None:
        self.weights = weights
        device = weights.device
        self._follower = Follower(
            weights,
            choice.members,
            choice.member_mode,
            choice.member_weight,
            choice.references if exact else None,
            decay=decay,
            limit=most_squares(weights.dtype),
            far=far,
            still=still,
        )
        head = torch.tensor(
            [numbers.weight, numbers.total_sum, numbers.seen, 0], dtype=torch.float64
        )
        self._state = torch.cat([head, *numbers[3:]]).to(device)
        self._modes = choice.modes
        self._faults = torch.tensor([0, weights.numel], device=device)
        self._arrays: tuple[Tensor | None, ...] = ()
        self._replay: Replay | None = None  # of the launches that update these arrays
        # The first numbers of the state reach the host when they do; nobody waits for them.
        gpu = device.type == "cuda"
        self._news = torch.zeros(HEADER, dtype=torch.float64, pin_memory=gpu)
        self._arrived = self._news.numpy()  # the same memory, read without an operator
        self._sent = torch.cuda.Event() if gpu else None  # type: ignore[no-untyped-call]

    def follow(self, mode: Tensor, slope: Tensor, mean: Tensor, total: Tensor | None) -> Tensor:
        """Take the weights in as they are now; return [M] the profiles, on the device."""
        arrays = (mode, slope, mean, total)
        if self._replay is None or not all(map(is_, arrays, self._arrays)):
            work = partial(self._follower.follow, *arrays, self._state, self._faults)
            self._arrays, self._replay = arrays, Replay(work, self.weights.device)
        self._replay()
        self._news.copy_(self._state[:HEADER], non_blocking=True)
        if self._sent is not None:
            self._sent.record()
        return self._state[HEADER : HEADER + self._modes].clone()

    @property
    def has_bad_news(self) -> bool:
        """Whether it has become known that a snapshot was refused; does not wait."""
        arrived: bool = self._sent is None or self._sent.query()  # type: ignore[no-untyped-call]
        return arrived and bool(self._arrived[HEADER - 1])

    def look(self) -> tuple[Numbers, Refused | None]:
        """Wait for the device; return the numbers, and what was refused since the last look.

        After that, snapshots are taken in again.
        """
        state = self._state.cpu()
        count, total_sum, seen, refused = state[:HEADER].tolist()
        numbers = Numbers(count, total_sum, int(seen), *state[HEADER:].view(4, -1).clone())
        if not refused:
            return numbers, None
        bad, first = self._faults.tolist()
        self._state[HEADER - 1] = 0.0
        self._faults.copy_(torch.tensor([0, self.weights.numel]))
        self._news.zero_()
        return numbers, Refused(bad, first if bad else None)
