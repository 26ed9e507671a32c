"""Embedded training: what is written when, with which gradients, and what it leaves behind."""
# ruff: noqa: ARG002 - Lightning fixes the signatures of its hooks

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from callback_toys import (
    SMALL,
    Counting,
    ResumableLoader,
    Toy,
    make_module,
    make_trainer,
    same,
    toy_loader,
    weights_of,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cmd_plugin.callbacks import CMDCallback
from cmd_plugin.errors import InputError, NonFiniteError
from cmd_plugin.modes import Embedding, OnlineModes

# Snapshots 0 to 2 are the warm-up; events come with 4, 6 and 8.
EMBEDDED: dict[str, Any] = {"mode": "embedded", "embed_every": 2, "embed_percent": 30.0}
EPOCHS = 9


def embedding_of(callback: CMDCallback) -> OnlineModes:
    assert callback.modes is not None
    return callback.modes


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def line(modes: OnlineModes, weights: Tensor) -> Tensor:
    return modes.scale * weights[modes.references][modes.assignment.long()] + modes.offset


def fit(module: Any, callback: Any, loader: Any = None, **settings: Any) -> Any:
    trainer = make_trainer(callback, **{"max_epochs": EPOCHS, **settings})
    trainer.fit(module, ResumableLoader() if loader is None else loader, toy_loader(seed=2))
    return trainer


def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    loader = ResumableLoader()
    loader.set_epoch(epoch)
    return iter(loader)


def by_hand(
    module: Any, embedding: Embedding, accumulate: int = 1, clip: float | None = None
) -> OnlineModes:
    """The same training in a plain loop."""
    module.train()
    optimizer = module.configure_optimizers()
    modes = OnlineModes(module, 3, 2, 60, embedding=embedding, buffers="keep")
    for epoch in range(EPOCHS):
        for number, (points, labels) in enumerate(batches(epoch)):
            (cross_entropy(module(points), labels) / accumulate).backward()
            if (number + 1) % accumulate:
                continue
            if embedding.project == "tie":
                modes.tie_gradients()
            if clip is not None:
                nn.utils.clip_grad_norm_(module.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            if embedding.project != "epoch":
                modes.project(optimizers=[optimizer])
        modes.project(optimizers=[optimizer])
        modes.update()
    return modes


@pytest.mark.parametrize("project", ["epoch", "step", "tie", "pool"])
@pytest.mark.parametrize("slots", ["leave", "zero"])
@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (2, 0.05)])
def test_it_equals_a_loop_written_by_hand(
    project: Any, slots: Any, accumulate: int, clip: float | None
) -> None:
    module, twin = make_module(dropout=0.0), make_module(dropout=0.0)
    callback = Counting(**EMBEDDED, project=project, slots=slots, buffers="keep")
    fit(module, callback, accumulate_grad_batches=accumulate, gradient_clip_val=clip)
    modes = embedding_of(callback)
    expected = by_hand(twin, Embedding(2, 30.0, False, project, slots), accumulate, clip)
    assert modes.embedded_fraction > 0.5
    assert same(weights_of(module), weights_of(twin))
    assert same(modes.state_dict(), expected.state_dict())


def test_the_four_projections_are_four_trainings() -> None:
    results = []
    for project in ("epoch", "step", "tie", "pool"):
        module = make_module(norm=False, dropout=0.0)
        fit(module, Counting(**EMBEDDED, project=project))
        results.append(flat(module))
    module = make_module(norm=False, dropout=0.0)
    fit(module, Counting())
    results.append(flat(module))
    for number, one in enumerate(results):
        assert not any(torch.equal(one, other) for other in results[:number])


class Watching(Counting):
    """Keeps the weights at the start of every batch and at the end of every epoch."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.at_batch: list[tuple[Tensor, Tensor, Tensor]] = []
        self.at_epoch: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(self, pl_module: Any, where: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        if self.modes is not None and self.modes.ready:
            weights = flat(pl_module)
            where.append((weights, self.modes.embedded, line(self.modes, weights)))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.keep(pl_module, self.at_batch)

    def take_snapshot(self, trainer: Any, pl_module: Any, label: int) -> None:
        modes = self.modes
        before = None if modes is None or not modes.ready else (modes.embedded, modes.scale)
        super().take_snapshot(trainer, pl_module, label)
        if before is not None:
            weights = flat(pl_module)
            assert modes is not None
            self.at_epoch.append((weights, before[0], line(modes, weights)))


@pytest.mark.parametrize("project", ["epoch", "step", "tie", "pool"])
def test_embedded_weights_lie_on_their_lines(project: Any) -> None:
    callback = Watching(**EMBEDDED, project=project)
    fit(make_module(norm=False), callback)
    assert callback.at_epoch[-1][1].any()
    for weights, embedded, model in callback.at_epoch:
        assert torch.equal(weights[embedded], model[embedded])
    # Six batches an epoch, seen from epoch 3 on. The events after epochs 4 and 6 bring members that
    # the next step writes, or the end of the next epoch; in between they train like all others.
    off = [
        batch
        for batch, (weights, embedded, model) in enumerate(callback.at_batch)
        if not torch.equal(weights[embedded], model[embedded])
    ]
    if project == "epoch":
        assert off == [*range(12, 18), *range(19, 30), *range(31, 36)]
    else:
        assert off == [12, 24]


@pytest.mark.parametrize("project", ["epoch", "step", "tie", "pool"])
def test_what_it_logs(namespace: str, project: Any) -> None:
    callback = CMDCallback(**{**SMALL, **EMBEDDED}, project=project)
    trainer = make_trainer(callback, namespace=namespace, max_epochs=EPOCHS)
    trainer.fit(make_module(namespace, norm=False), toy_loader(), toy_loader(seed=2))
    modes, metrics = embedding_of(callback), trainer.callback_metrics
    count = modes.numel
    step = -(-3 * count // 10) - modes.number_of_modes
    assert metrics["cmd/embedded_fraction"] == pytest.approx(3 * step / count)
    # E after snapshots 4 to 8: one, one, two, two and three steps.
    assert metrics["cmd/saved_percent"] == pytest.approx(100 * 9 * step / (9 * count))
    assert metrics["cmd/state_bytes"] == 18 * count
    assert -1 < metrics["cmd/explained_variance"] <= 1
    assert {"val_loss", "cmd/val_loss"} <= metrics.keys()


def test_watching_embeds_nothing() -> None:
    callback = Counting()
    trainer = fit(make_module(), callback)
    assert callback.embedding is None
    assert embedding_of(callback).embedded_fraction == 0
    assert not {"cmd/embedded_fraction", "cmd/saved_percent"} & trainer.callback_metrics.keys()


@pytest.mark.parametrize("options", [{"project": "tie"}, {"embed_every": 3}, {"relative": True}])
def test_a_schedule_that_nobody_follows_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="add mode='embedded'"):
        CMDCallback(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "frozen"}, "mode must be one of online, embedded"),
        ({"embed_every": 0}, "embed_every must be a whole number"),
        ({"embed_percent": 0.0}, "percent must lie in"),
        ({"project": "batch"}, "project must be one of epoch, step, tie"),
        ({"slots": "keep"}, "slots must be one of leave, zero"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CMDCallback(**{"mode": "embedded", **options})


def test_tying_wants_references_with_gradients() -> None:
    callback = CMDCallback(**{**SMALL, **EMBEDDED}, project="tie", buffers="model")
    with pytest.raises(InputError, match="use buffers='keep'"):
        fit(make_module(norm=True), callback)


class SecondOrder(Toy):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters(), lr=0.01, max_iter=2)


def test_optimizers_with_inner_steps_cannot_tie() -> None:
    module = make_module(kind=SecondOrder, norm=False)
    with pytest.raises(InputError, match="another optimizer, or project='step'"):
        fit(module, CMDCallback(**{**SMALL, **EMBEDDED}, project="tie"))
    callback = CMDCallback(**{**SMALL, **EMBEDDED, "modes": 2}, project="step")
    fit(make_module(kind=SecondOrder, norm=False), callback)
    assert embedding_of(callback).embedded_fraction > 0.5


class TwoOptimizers(Toy):
    """Two optimizers by turns, and a look at the weights after each of their steps."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False
        self.seen: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            loss = cross_entropy(self(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.seen.append(flat(self))

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        first, last = self.net[0], self.net[-1]
        return [torch.optim.SGD(p.parameters(), lr=0.1, momentum=0.9) for p in (first, last)]


@pytest.mark.parametrize("project", ["step", "tie", "pool"])
def test_every_step_of_every_optimizer_counts(project: Any) -> None:
    module = make_module(kind=TwoOptimizers, norm=False, dropout=0.0)
    callback = Counting(**EMBEDDED, project=project)
    fit(module, callback)
    modes = embedding_of(callback)
    embedder = modes._embedder
    assert embedder is not None
    # The members of the last event are written next; all older ones lie on their lines.
    older = Watching(**EMBEDDED, project=project)
    twin = make_module(kind=TwoOptimizers, norm=False, dropout=0.0)
    fit(twin, older, max_epochs=EPOCHS - 1)
    embedded = embedding_of(older).embedded
    assert embedded.any()
    first = sum(p.numel() for p in module.net[0].parameters())
    parts = slice(0, first), slice(first, None)
    for part in parts:
        assert embedded[part].any()
    # Each optimizer writes its own weights: another's graph may be older than this step.
    for one, both in zip(module.seen[-12::2], module.seen[-11::2], strict=True):
        for weights, part in zip((one, both), parts, strict=True):
            own = torch.zeros_like(embedded)
            own[part] = embedded[part]
            assert torch.equal(weights[own], line(modes, weights)[own])
        assert torch.equal(both[parts[0]], one[parts[0]])


def test_mixed_precision() -> None:
    callback = Counting(**EMBEDDED, project="tie")
    module = make_module(norm=False)
    fit(module, callback, precision="bf16-mixed")
    assert embedding_of(callback).embedded_fraction > 0.5
    assert all(p.dtype == torch.float32 for p in module.parameters())


class Exploding(Toy):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        factor = float("inf") if self.current_epoch == 6 and batch_idx == 2 else 1.0
        return super().training_step(batch, batch_idx) * factor


@pytest.mark.parametrize("project", ["epoch", "step", "tie", "pool"])
def test_a_diverged_run_ends_with_one_sentence(project: Any) -> None:
    module = make_module(kind=Exploding, norm=False)
    callback = Counting(**EMBEDDED, project=project)
    with pytest.raises(NonFiniteError, match="the training diverged"):
        fit(module, callback)
    assert not callback._steps.handles


def hooks_of(trainer: Any) -> int:
    return sum(len(o._optimizer_step_post_hooks) for o in trainer.optimizers)


class Interrupted(Exception):
    """What ends some runs of this file."""


class Failing(Toy):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.current_epoch == 6:
            raise Interrupted
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("kind", [Toy, Failing])
def test_nothing_is_left_on_the_optimizers(namespace: str, kind: type) -> None:
    callback = Counting(**EMBEDDED, project="step")
    trainer = make_trainer(callback, namespace=namespace, max_epochs=EPOCHS)
    module = make_module(namespace, kind)
    try:
        trainer.fit(module, toy_loader(), toy_loader(seed=2))
    except Interrupted:
        assert kind is Failing
    assert not callback._steps.handles
    assert hooks_of(trainer) == 0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_leave_the_optimizers_behind(duplicate: Any) -> None:
    class Copying(Counting):
        copied: Any = None

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 40:
                assert hooks_of(trainer) == 1
                self.copied = duplicate_of(self)

    def duplicate_of(callback: Any) -> Any:
        plain = CMDCallback.__new__(CMDCallback)
        plain.__dict__.update(callback.__getstate__())
        return duplicate(plain)

    callback = Copying(**EMBEDDED, project="step")
    fit(make_module(norm=False), callback)
    assert callback.copied._steps.handles == []
    assert callback.copied.embedding == callback.embedding
    assert callback.copied.state_dict()["modes"]["embedder"]["embedded"].any()


def test_a_second_fit_goes_on_embedding() -> None:
    module, callback = make_module(norm=False), Counting(**EMBEDDED, project="step")
    fit(module, callback, max_epochs=6)
    before = embedding_of(callback).embedded
    fit(module, callback, max_epochs=6)
    after = embedding_of(callback).embedded
    assert before.any()
    assert after.sum() > before.sum()
    assert not (before & ~after).any()
