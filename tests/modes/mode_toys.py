"""Trajectories with known modes, brute-force least squares, and a small network that trains."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cmd_plugin.modes import Embedding, Layout, OnlineModes
from cmd_plugin.modes.layout import find_weights

EMBEDDING_OPTIONS: dict[str, Any] = {"modes": 3, "warmup": 4, "samples": 60, "buffers": "model"}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def orthogonal_profiles(modes: int, snapshots: int, seed: int = 0) -> Tensor:
    """[M, T] zero-mean, mutually orthogonal trajectories of unit norm."""
    noise = torch.randn(snapshots, modes, generator=generator(seed), dtype=torch.float64)
    ones = torch.ones(snapshots, 1, dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.cat([ones, noise], dim=1))
    return basis[:, 1:].T.contiguous()


def planted(
    modes: int,
    snapshots: int = 21,
    numel: int = 4000,
    seed: int = 0,
    *,
    stretch: float = 1.0,
    offset: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Weights s c q_m + d: ([T, N] float64, [N] mode of each)."""
    random = generator(seed)
    profiles = stretch * orthogonal_profiles(modes, snapshots, seed)
    mode = torch.randint(modes, (numel,), generator=random)
    size = 0.2 + 1.8 * torch.rand(numel, generator=random, dtype=torch.float64)
    sign = 2.0 * torch.randint(2, (numel,), generator=random).double() - 1
    shift = offset * torch.randn(numel, generator=random, dtype=torch.float64)
    return profiles[mode].T * size * sign + shift, mode


def walks(snapshots: int, numel: int, seed: int = 0) -> Tensor:
    """Independent random walks, [T, N] float64."""
    noise = torch.randn(snapshots, numel, generator=generator(seed), dtype=torch.float64)
    start = torch.randn(numel, generator=generator(seed + 1), dtype=torch.float64)
    return start + 0.2 * noise.cumsum(dim=0)


def least_squares(
    rows: Tensor, profiles: Tensor, mode: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and offset of every row against its own profile, one ``lstsq`` a mode, float64.

    Args:
        rows: [T, N].
        profiles: [M, T].
        mode: [N].
        weights: [T] weights of the snapshots; None for equal ones.
    """
    rows, profiles = rows.double(), profiles.double()
    root = torch.ones(len(rows), dtype=torch.float64) if weights is None else weights.sqrt()
    scale, offset = torch.zeros(rows.shape[1]).double(), torch.zeros(rows.shape[1]).double()
    for k, profile in enumerate(profiles):
        # Centring conditions the problem and changes no solution.
        middle = (root**2 * profile).sum() / (root**2).sum()
        design = torch.stack([profile - middle, torch.ones_like(profile)], dim=1)
        mine = mode == k
        solution = torch.linalg.lstsq(design * root[:, None], rows[:, mine] * root[:, None])
        scale[mine] = solution.solution[0]
        offset[mine] = solution.solution[1] - solution.solution[0] * middle
    return scale, offset


def correlation(rows: Tensor, profiles: Tensor) -> Tensor:
    """|Pearson correlation| [M, N] of profiles [M, T] with rows [T, N]; 0 where undefined."""
    centred = rows.double() - rows.double().mean(dim=0)
    leaders = profiles.double() - profiles.double().mean(dim=1, keepdim=True)
    product = (leaders / leaders.norm(dim=1, keepdim=True)) @ centred
    return (product / centred.norm(dim=0)).abs().nan_to_num(0.0)


def same_partition(one: Tensor, other: Tensor) -> bool:
    """Whether two labellings group alike, whatever the labels are called."""
    pairs = set(zip(one.tolist(), other.tolist(), strict=True))
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def follow(rows: Tensor, **options: Any) -> OnlineModes:
    """Feed rows [T, N] to an OnlineModes without a model."""
    modes = OnlineModes(Layout.of_vector(rows.shape[1], rows.dtype), **options)
    for row in rows:
        modes.update(row)
    return modes


class Net(nn.Module):
    """Convolution, BatchNorm, linear layers, a scalar parameter; dropout draws random numbers."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(4 * 4 * 4, 5)
        self.gain = nn.Parameter(torch.tensor(1.0))
        torch.set_rng_state(state)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.conv(images)))
        return self.gain * self.fc(self.drop(hidden.flatten(1)))


def images(count: int = 16, seed: int = 5) -> Tensor:
    return torch.randn(count, 1, 6, 6, generator=generator(seed))


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> float:
    """One step on random images of given labels; uses the global generator through dropout."""
    dtype = next(p for p in model.parameters() if p.requires_grad).dtype
    batch = images(16, seed).to(dtype)
    labels = torch.randint(5, (16,), generator=generator(seed))
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(batch).float(), labels)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr=0.1, momentum=0.9)


def training(model: nn.Module, modes: OnlineModes | None, epochs: int, start: int = 0) -> None:
    """Train and follow; epoch numbers seed batches and dropout, so that two runs are equal."""
    optimizer = sgd(model)
    for epoch in range(start, start + epochs):
        torch.manual_seed(epoch)
        train_step(model, optimizer, epoch)
        if modes is not None:
            modes.update()


def fitted(model: nn.Module | None = None, epochs: int = 7, **options: Any) -> OnlineModes:
    """An OnlineModes of a network that has trained beyond its fit."""
    model = Net() if model is None else model
    settings = {"modes": 3, "warmup": 4, "samples": 60, "buffers": "model", **options}
    modes = OnlineModes(model, **settings)
    model.train()
    training(model, modes, epochs)
    return modes


def momentum_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def flat_weights(model: nn.Module, modes: OnlineModes) -> Tensor:
    tensors = find_weights(modes.layout, model, "the model").values()
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def on_the_line(modes: OnlineModes, weights: Tensor) -> Tensor:
    """a r + b for every weight, with r as it is in ``weights``."""
    return modes.scale * weights[modes.references][modes.assignment.long()] + modes.offset


def train_embedded(net: nn.Module, modes: OnlineModes, epochs: int, start: int = 0) -> None:
    optimizer = momentum_sgd(net)
    for epoch in range(start, start + epochs):
        torch.manual_seed(epoch)
        train_step(net, optimizer, epoch)
        modes.project()
        modes.update()


def embedding_run(net: nn.Module, epochs: int = 14, **options: Any) -> OnlineModes:
    """A network with about half of its weights embedded."""
    settings = {"embedding": Embedding(3, 20), **EMBEDDING_OPTIONS, **options}
    modes = OnlineModes(net, **settings)
    net.train()
    train_embedded(net, modes, epochs)
    return modes


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Bit for bit, dtypes and names included (NaN equals NaN)."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and one[name]
        .contiguous()
        .view(-1)
        .view(torch.uint8)
        .equal(other[name].contiguous().view(-1).view(torch.uint8))
        for name in one
    )


def same_state(one: Any, other: Any) -> bool:
    """Whether two nested states are equal bit for bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same_state(one[k], other[k]) for k in one)
    if isinstance(one, Sequence) and not isinstance(one, str):
        return len(one) == len(other) and all(map(same_state, one, other))
    return type(one) is type(other) and one == other


def history(model: nn.Module, epochs: int) -> list[dict[str, Tensor]]:
    """The state_dict after each epoch of a training run."""
    optimizer = sgd(model)
    states = []
    for epoch in range(epochs):
        train_step(model, optimizer, epoch)
        states.append(copy.deepcopy(dict(model.state_dict())))
    return states


def assert_one_sentence(error: BaseException, *parts: str) -> None:
    """One line, one sentence, and everything in ``parts`` in it."""
    text = str(error)
    assert "\n" not in text, text
    assert text.endswith("."), text
    assert not re.search(r"[.!?]\s+[A-Z]", text), text
    for part in parts:
        assert part in text, text
