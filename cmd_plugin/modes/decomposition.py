"""A whole training history as the profiles of M modes and nine bytes a weight."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor

from cmd_plugin.errors import InputError, PluginError
from cmd_plugin.kernels import reconstruct
from cmd_plugin.modes.fit import explained_share
from cmd_plugin.modes.layout import Layout
from cmd_plugin.runs.tensors import Schema

__all__ = ["Decomposition"]

SCHEMA = Schema("modes", 1, "a decomposition")


@dataclass(frozen=True, repr=False)
class Decomposition:
    r"""The result of Correlation Mode Decomposition (Brokman et al., ICLR 2024, Eq. 2).

    .. math:: w_i(t) \approx a_i\, r_{m(i)}(t) + b_i

    Attributes:
        layout: Names and shapes behind the flat vector of N weights.
        samples: [K] int64 flat indices of the weights that were clustered.
        references: [M] int64 flat index of each mode's reference weight; mode 0 is the largest
            cluster.
        assignment: [N] uint8 mode m(i) of each weight.
        scale: [N] slope :math:`a_i`.
        mean: [N] mean of each weight over the snapshots. Kept instead of the offset, which cancels
            against ``scale * profile`` when a reference is large against its movement.
        profiles: [M, T] float64 trajectories of the modes.
        profile_mean: [M] float64 mean of each profile over all snapshots that were fitted.
        total: Sum of squared deviations from the mean, over all weights and snapshots.
        explained: The part of ``total`` the model explains.
        layer_total: [L] float64 ``total`` of each tensor of the layout; None for a decomposition
            made online, which does not know it.
        layer_explained: [L] float64 likewise.
        epochs: T labels of the snapshots.
        unmodelled: Entries of the last snapshot that are not modelled (integer buffers, excluded
            tensors), by cleaned name, for :meth:`state_dict_at`.
    """

    layout: Layout
    samples: Tensor
    references: Tensor
    assignment: Tensor
    scale: Tensor
    mean: Tensor
    profiles: Tensor
    profile_mean: Tensor
    total: float
    explained: float
    layer_total: Tensor | None = None
    layer_explained: Tensor | None = None
    epochs: Sequence[int] = ()
    unmodelled: Mapping[str, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Return a summary of a few lines."""
        counts = torch.bincount(self.assignment.long(), minlength=max(1, self.number_of_modes))
        largest = ", ".join(f"{share:.0%}" for share in (counts[:5] / self.numel).tolist())
        more = ", ..." if self.number_of_modes > 5 else ""
        first, last = (self.epochs[0], self.epochs[-1]) if len(self.epochs) else ("?", "?")
        return (
            f"Decomposition of {self.numel:,} weights in {len(self.layout.names)} tensors over "
            f"{self.snapshots} snapshots ({first} to {last})\n"
            f"  {self.number_of_modes} modes with {largest}{more} of the weights\n"
            f"  explained variance {self.explained_variance():.1%}, {self.nbytes:,} bytes"
        )

    @property
    def numel(self) -> int:
        """Number of weights N."""
        return self.layout.numel

    @property
    def number_of_modes(self) -> int:
        """Number of modes M that were found, at most the number asked for."""
        return self.references.numel()

    @property
    def snapshots(self) -> int:
        """Number of snapshots T."""
        return self.profiles.shape[1]

    @cached_property
    def offset(self) -> Tensor:
        """[N] offset :math:`b_i` = mean - scale * mean of the profile."""
        if not self.number_of_modes:
            return self.mean
        return reconstruct(self.assignment, self.scale, self.mean, -self.profile_mean)

    def reconstruct(self, t: int) -> Tensor:
        """Return the modelled weights of one snapshot, [N] in the state's dtype.

        A weight that is its mode's profile is exact. A BatchNorm variance is never negative.

        Args:
            t: 0-based index of the snapshot; negative counts from the end.

        Raises:
            InputError: If there is no such snapshot.
        """
        if not -self.snapshots <= t < self.snapshots:
            raise InputError(f"snapshot {t} does not exist: there are {self.snapshots}.")
        if not self.number_of_modes:
            return self.mean.clone()
        step = self.profiles[:, t] - self.profile_mean
        weights = reconstruct(self.assignment, self.scale, self.mean, step)
        exact = self._profile_modes
        weights[self.references[exact].to(weights.device)] = self.profiles[exact, t].to(
            weights.device, weights.dtype
        )
        for variance in self.layout.variances():
            weights[variance].clamp_(min=0.0)
        return weights

    @cached_property
    def _profile_modes(self) -> Tensor:
        """[M] bool: the modes whose profile is their reference weight itself."""
        at = self.references.to(self.scale.device)
        own = self.assignment[at].cpu() == torch.arange(self.number_of_modes)
        mean = self.profile_mean.to(self.mean.dtype)
        return own & (self.scale[at] == 1).cpu() & (self.mean[at].cpu() == mean)

    def snapshot_of(self, epoch: int) -> int:
        """Return the index t of the snapshot labelled ``epoch``; InputError if there is none."""
        if epoch not in self.epochs:
            raise InputError(
                f"epoch {epoch} was not recorded: the snapshots are of epochs "
                f"{min(self.epochs)} to {max(self.epochs)} ({len(self.epochs)} of them)."
            )
        return list(self.epochs).index(epoch)

    def state_dict_at(self, t: int) -> dict[str, Tensor]:
        """Return the modelled state_dict of snapshot ``t``, in the tensors' shapes and dtypes.

        It has all names of tied weights. Entries that are not modelled are those of the last
        snapshot.
        """
        tensors = {
            name: value.to(getattr(torch, dtype))
            for (name, value), dtype in zip(
                self.layout.split(self.reconstruct(t)).items(), self.layout.dtypes, strict=True
            )
        }
        tensors.update({alias: tensors[name] for alias, name in self.layout.aliases.items()})
        return {**tensors, **{name: value.clone() for name, value in self.unmodelled.items()}}

    def explained_variance(self) -> float:
        """Return the share of all movement the model explains, at most 1; nan if nothing moves."""
        return explained_share(self.explained, self.total)

    def explained_variance_by_layer(self) -> dict[str, float]:
        """Return the explained share of each tensor's movement, nan where a tensor does not move.

        Raises:
            PluginError: If the decomposition was made online, where only the sum over all tensors
                is followed.
        """
        if self.layer_total is None or self.layer_explained is None:
            raise PluginError(
                "explained variance by layer is known after decompose(), not for an online run."
            )
        shares = (self.layer_explained / self.layer_total).clamp_(max=1.0)
        return dict(zip(self.layout.names, shares.tolist(), strict=True))

    def mode_share_by_layer(self) -> Tensor:
        """Return the share of each layer's weights in each mode, [L, M] float64; rows sum to 1."""
        rows = [
            torch.bincount(part.reshape(-1).long(), minlength=max(1, self.number_of_modes)).double()
            / part.numel()
            for part in self.layout.split(self.assignment).values()
        ]
        return torch.stack(rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that :meth:`save` writes."""
        return sum(t.numel() * t.element_size() for t in self._tensors().values())

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {
            "samples": self.samples,
            "references": self.references,
            "assignment": self.assignment,
            "scale": self.scale,
            "mean": self.mean,
            "profiles": self.profiles,
            "profile_mean": self.profile_mean,
            "epochs": torch.tensor(list(self.epochs), dtype=torch.int64),
        }
        if self.layer_total is not None and self.layer_explained is not None:
            tensors["layer_total"] = self.layer_total
            tensors["layer_explained"] = self.layer_explained
        tensors.update({f"unmodelled/{name}": t for name, t in self.unmodelled.items()})
        return tensors

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, with layout and schema version in its metadata.

        Raises:
            InputError: If it cannot be written.
        """
        about = {
            "layout": self.layout.to_json(),
            "sums": json.dumps([self.total, self.explained]),
        }
        SCHEMA.save(path, self._tensors(), about)

    @classmethod
    def load(cls, path: str | Path) -> Decomposition:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: If the file is missing, damaged or of another kind.
        """
        tensors, about = SCHEMA.load(path)
        prefix = "unmodelled/"
        try:
            total, explained = (float(value) for value in json.loads(about["sums"]))
            decomposition = cls(
                layout=Layout.from_json(about["layout"]),
                total=total,
                explained=explained,
                epochs=tensors.pop("epochs").tolist(),
                unmodelled={
                    name.removeprefix(prefix): tensors.pop(name)
                    for name in list(tensors)
                    if name.startswith(prefix)
                },
                **tensors,
            )
            decomposition._require_sound()
        except (KeyError, TypeError, ValueError, RecursionError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(
                f"{path} is damaged: its parts do not make a decomposition ({reason})."
            ) from error
        return decomposition

    def _require_sound(self) -> None:
        """Raise ValueError unless everything fits together, so that nothing fails later on."""
        numel, modes, layers = self.numel, self.number_of_modes, len(self.layout.names)
        state, double = (self.layout.state_dtype,), (torch.float64,)
        index, count = (torch.int64,), len(self.epochs)
        expected: dict[str, tuple[Tensor | None, tuple[int, ...], tuple[torch.dtype, ...]]] = {
            "samples": (self.samples, tuple(self.samples.shape[:1]), index),
            "references": (self.references, (modes,), index),
            "assignment": (self.assignment, (numel,), (torch.uint8,)),
            "scale": (self.scale, (numel,), state),
            "mean": (self.mean, (numel,), state),
            "profiles": (self.profiles, (modes, count), double),
            "profile_mean": (self.profile_mean, (modes,), double),
            "layer_total": (self.layer_total, (layers,), double),
            "layer_explained": (self.layer_explained, (layers,), double),
        }
        for name, (tensor, shape, dtypes) in expected.items():
            if tensor is None:
                continue
            if tensor.shape != shape or tensor.dtype not in dtypes:
                raise ValueError(
                    f"{name} is {tuple(tensor.shape)} of {tensor.dtype}, expected {shape} of "
                    f"{dtypes[0]}"
                )
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise ValueError(f"{name} holds NaN or infinite values")
        for name, indices in (("samples", self.samples), ("references", self.references)):
            if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < numel:
                raise ValueError(f"{name} point outside the {numel} weights")
        if int(self.assignment.max()) >= max(1, modes):
            raise ValueError(f"a weight is in mode {int(self.assignment.max())} of {modes}")
        if not count or (self.layer_total is None) != (self.layer_explained is None):
            raise ValueError("epochs or sums by layer are missing")
        if not (isfinite(self.total) and isfinite(self.explained) and self.total >= 0.0):
            raise ValueError("the sums of squares are not finite")
        twice = {*self.layout.names, *self.layout.aliases} & set(self.unmodelled)
        if twice:
            raise ValueError(f"{min(twice)!r} is modelled and unmodelled at once")
