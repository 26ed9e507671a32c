"""The problems the kernels are measured on, each beside its specification."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cmd_plugin import kernels
from cmd_plugin.kernels.apply_embedding import reference as apply_reference
from cmd_plugin.kernels.assign_and_fit import reference as assign_reference
from cmd_plugin.kernels.coefficient_drift import reference as drift_reference
from cmd_plugin.kernels.fold_gradients import reference as fold_reference
from cmd_plugin.kernels.reconstruct import reference as reconstruct_reference
from cmd_plugin.kernels.select_smallest import reference as select_reference
from cmd_plugin.kernels.snapshot_delta import reference as delta_reference
from cmd_plugin.kernels.swap import reference as swap_reference
from cmd_plugin.kernels.update_affine import reference as update_reference

__all__ = ["CASES", "Case", "Problem"]

MODES, SNAPSHOTS = 10, 21
_TENSORS = 62  # tensors the weights are cut into, as many as ResNet-18 has


class Problem:
    """The state of online CMD for N weights, and a snapshot, in float32.

    Args:
        numel: Number of weights N.
        device: Where they lie.
        seed: Seed of the numbers.
        dtype: float32, or float64 for the specification on the same numbers.
    """

    def __init__(
        self, numel: int, device: torch.device, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        self.numel = numel
        self.weights, self.slope, self.mean = (normal(numel) for _ in range(3))
        self.mode = torch.randint(MODES, (numel,), generator=generator, device=device).byte()
        self.flags = torch.rand(numel, generator=generator, device=device) < 0.5
        self.out = torch.zeros_like(self.mean)
        tables = torch.randn(3, MODES, generator=torch.Generator().manual_seed(seed)).double()
        self.gain, self.step, self.profile = tables * 0.1
        size = -(-numel // _TENSORS // 16) * 16 or numel  # at least one, in steps of 16
        self.view = kernels.FlatView(torch.split(self.weights, size))
        self.backup = torch.zeros_like(self.weights)
        self.backup_view = kernels.FlatView(torch.split(self.backup, size))
        self.delta = torch.zeros(numel, dtype=torch.bfloat16, device=device)
        self._normal = normal

    def walk(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return (differences [T-1, N] bfloat16, profiles [M, T], base [N]) of random walks."""
        rows = torch.empty(SNAPSHOTS - 1, self.numel, dtype=torch.bfloat16, device=self.mean.device)
        position = torch.zeros(self.numel, device=self.mean.device)
        for row in rows:
            position += self._normal(self.numel).float()
            row.copy_(position)
        return rows, _profiles(), self.mean


@dataclass(frozen=True)
class Case:
    """One kernel.

    Attributes:
        name: Its public name.
        bytes_per_weight: What it has to read and write, for float32 weights.
        prepare: Makes, from a problem, the call of the kernel with a backend, and the call of its
            specification on the same tensors. Both return the tensors they made or changed.
        comparable: What of these tensors the specification fixes.
    """

    name: str
    bytes_per_weight: float
    prepare: Callable[[Problem], tuple[Callable[[Any], tuple[Tensor, ...]], Callable[[], Any]]]
    comparable: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = lambda tensors: tensors


def _snapshot_delta(p: Problem) -> Any:
    def run(backend: Any) -> tuple[Tensor, ...]:
        return (kernels.snapshot_delta(p.view, p.mean, out=p.delta, backend=backend),)

    return run, lambda: (delta_reference.snapshot_delta(p.weights, p.mean),)


def _assign_and_fit(p: Problem) -> Any:
    rows, profiles, base = p.walk()

    def run(backend: Any) -> tuple[Tensor, ...]:
        return kernels.assign_and_fit(rows, profiles, base, backend)

    def specification() -> tuple[Tensor, ...]:
        on_device = profiles.to(rows.device)
        return assign_reference.assign_and_fit(rows, on_device, base, base.dtype)

    return run, specification


def _projections(fit: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return what does not depend on which of two modes that fit alike was taken."""
    mode, scale, mean, total = fit
    return mean, total, scale.abs() * _profiles().std(dim=1).to(scale)[mode.long()]


def _profiles() -> Tensor:
    steps = torch.randn(MODES, SNAPSHOTS, generator=torch.Generator().manual_seed(1))
    return steps.double().cumsum(1)


def _update_affine(p: Problem) -> Any:
    def run(backend: Any) -> tuple[Tensor, ...]:
        kernels.update_affine(p.view, p.mode, p.slope, p.mean, p.gain, 0.05, backend=backend)
        return p.slope, p.mean

    def specification() -> tuple[Tensor, ...]:
        gain = p.gain.to(p.mean.device)
        update_reference.update_affine(p.weights, p.mode, p.slope, p.mean, gain, 0.05)
        return p.slope, p.mean

    return run, specification


def _reconstruct(p: Problem) -> Any:
    state = (p.mode, p.slope, p.mean)

    def run(backend: Any) -> tuple[Tensor, ...]:
        return (kernels.reconstruct(*state, p.step, out=p.out, backend=backend),)

    return run, lambda: (reconstruct_reference.reconstruct(*state, p.step.to(p.mean.device)),)


def _swap_in(p: Problem) -> Any:
    state = (p.mode, p.slope, p.mean)

    def run(backend: Any) -> tuple[Tensor, ...]:
        kernels.swap_in(p.view, p.backup_view, *state, p.step, backend=backend)
        return p.weights, p.backup

    def specification() -> tuple[Tensor, ...]:
        swap_reference.swap_in(p.weights, p.backup, *state, p.step.to(p.mean.device))
        return p.weights, p.backup

    return run, specification


def _swap_out(p: Problem) -> Any:
    def run(backend: Any) -> tuple[Tensor, ...]:
        # Its PyTorch path is a copy: there is nothing for a compiler of loops to add.
        kernels.swap_out(p.view, p.backup_view, "torch" if backend == "numba" else backend)
        return (p.weights,)

    def specification() -> tuple[Tensor, ...]:
        swap_reference.swap_out(p.weights, p.backup)
        return (p.weights,)

    return run, specification


def _coefficient_drift(p: Problem) -> Any:
    arrays = (p.slope, p.mean, p.weights, p.backup)

    def run(backend: Any) -> tuple[Tensor, ...]:
        return (kernels.coefficient_drift(*arrays, out=p.out, backend=backend),)

    return run, lambda: (drift_reference.coefficient_drift(*arrays),)


def _select_smallest(p: Problem) -> Any:
    values, num = p.weights.abs(), p.numel // 10

    def run(backend: Any) -> tuple[Tensor, ...]:
        return (kernels.select_smallest(values, num, backend),)

    return run, lambda: (select_reference.select_smallest(values, num),)


def _apply_embedding(p: Problem) -> Any:
    state = (p.flags, p.mode, p.slope, p.mean)

    def run(backend: Any) -> tuple[Tensor, ...]:
        kernels.apply_embedding(p.view, *state, p.profile, backend)
        return (p.weights,)

    def specification() -> tuple[Tensor, ...]:
        apply_reference.apply_embedding(p.weights, *state, p.profile.to(p.mean.device))
        return (p.weights,)

    return run, specification


def _fold_gradients(p: Problem) -> Any:
    state = (p.weights, p.flags, p.mode, p.slope, MODES)

    def run(backend: Any) -> tuple[Tensor, ...]:
        return kernels.fold_gradients(*state, backend), p.weights

    return run, lambda: (fold_reference.fold_gradients(*state), p.weights)


CASES = [
    Case("snapshot_delta", 10, _snapshot_delta),
    # T - 1 differences of 2 bytes, the base, and 13 bytes of result.
    Case("assign_and_fit", 2 * (SNAPSHOTS - 1) + 4 + 13, _assign_and_fit, _projections),
    Case("update_affine", 25, _update_affine),
    Case("reconstruct", 13, _reconstruct),
    Case("swap_in", 21, _swap_in),
    Case("swap_out", 8, _swap_out),
    Case("coefficient_drift", 20, _coefficient_drift),
    Case("select_smallest", 3 * 4 + 5, _select_smallest),  # three passes that count, one that marks
    Case("apply_embedding", 14, _apply_embedding),  # half of all weights, so in every cache line
    Case("fold_gradients", 14, _fold_gradients),
]
