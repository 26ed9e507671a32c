"""Embedded weights while a client trains: steps, gradients, and no hook left behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict
from torch.nn.functional import cross_entropy
from torch.optim import optimizer as torch_optimizer

from cmd_plugin.errors import StateMismatch
from cmd_plugin.federated import CMDStrategy, embedded_training
from cmd_plugin.federated.client import load_codec
from cmd_plugin.modes import Embedding
from tests.helpers.federated import client_data, fed_avg, make_app, make_grid, network, run


def trained_client(project: Any, pool: bool = False) -> tuple[Context, CMDStrategy]:
    """A client's context after some rounds, with embedded weights."""
    strategy = CMDStrategy(
        fed_avg(), Embedding(2, 30.0, project=project), modes=3, warmup=2, samples=60, pool=pool
    )
    grid = make_grid(make_app())
    run(strategy, grid, 8)
    return next(iter(grid.contexts.values())), strategy


def canonical(context: Context) -> torch.nn.Module:
    codec = load_codec(context)
    assert codec is not None
    model = network(seed=5)
    named = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    flat = codec.plan.expand(codec.packing.flatten(named).copy())
    arrays = codec.packing.unflatten(flat, {})
    model.load_state_dict({name: torch.from_numpy(a) for name, a in arrays.items()})
    return model


def flat_of(model: torch.nn.Module) -> np.ndarray:
    return np.concatenate([p.detach().numpy().reshape(-1) for p in model.parameters()])


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    inputs, labels = client_data(0)
    return cross_entropy(model(inputs), labels)


def hooks() -> tuple[int, int]:
    return (
        len(torch_optimizer._global_optimizer_pre_hooks),
        len(torch_optimizer._global_optimizer_post_hooks),
    )


@pytest.mark.parametrize("project", ["step", "tie"])
def test_embedded_weights_stay_on_their_curves_after_every_step(project: Any) -> None:
    context, _ = trained_client(project)
    model, codec = canonical(context), load_codec(context)
    assert codec is not None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    with embedded_training(context, model):
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
            flat = flat_of(model)
            gap = np.abs(codec.plan.expand(flat.copy()) - flat)
            # the kernel rounds the product before it adds: an ulp of either
            assert gap.max() <= 4e-7 * max(1.0, np.abs(flat).max())
    assert hooks() == (0, 0)


def test_tied_gradients_are_the_chain_rule() -> None:
    """Against finite differences of the loss as a function of the references."""
    context, _ = trained_client("tie")
    model, codec = canonical(context), load_codec(context)
    assert codec is not None
    plan = codec.plan
    model.double()
    flat = flat_of(model)

    def loss_at(weights: np.ndarray) -> float:
        at = 0
        with torch.no_grad():
            for p in model.parameters():
                part = weights[at : at + p.numel()].reshape(p.shape)
                p.copy_(torch.from_numpy(part))
                at += p.numel()
            inputs, labels = client_data(0)
            return float(cross_entropy(model(inputs.double()), labels))

    numeric = []
    for reference in plan.references:
        values = []
        for sign in (1, -1):
            moved = flat.copy()
            moved[reference] += sign * 1e-5
            values.append(loss_at(plan.expand(moved)))
        numeric.append((values[0] - values[1]) / 2e-5)
    loss_at(flat)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model.float()
    before = flat_of(model)
    with embedded_training(context, model):
        loss_of(model).backward()
        optimizer.step()
    step = (before - flat_of(model))[plan.references] / 1e-3
    # float32: the difference of two weights of size one, divided by the learning rate
    assert np.abs(step - numeric).max() < 2e-4 + 1e-3 * np.abs(numeric).max()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_pooled_steps_are_projected_onto_the_curves(optimizer: Any) -> None:
    """Against a dense least-squares fit of what the optimizer alone would have done."""
    context, _ = trained_client("step", pool=True)
    model, codec = canonical(context), load_codec(context)
    assert codec is not None
    plan = codec.plan
    free = canonical(context)
    loss_of(free).backward()
    optimizer(free.parameters(), lr=0.05).step()
    wanted = flat_of(free).astype(np.float64)
    with embedded_training(context, model):
        loss_of(model).backward()
        optimizer(model.parameters(), lr=0.05).step()
    found = flat_of(model)
    # columns: what a unit of each reference does to all weights of the curves
    curves = np.zeros((plan.numel, len(plan.references)))
    curves[plan.references, np.arange(len(plan.references))] = 1.0
    curves[plan.members, plan.mode] = plan.scale
    shift = np.zeros(plan.numel)
    shift[plan.members] = plan.offset
    inside = np.concatenate([plan.references, plan.members])
    best = np.linalg.lstsq(curves[inside], (wanted - shift)[inside], rcond=None)[0]
    np.testing.assert_allclose(found[plan.references], best, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        found[plan.members], (curves @ best + shift)[plan.members], 1e-5, 1e-6
    )
    others = np.setdiff1d(np.arange(plan.numel), inside)
    np.testing.assert_array_equal(found[others], flat_of(free)[others])
    # and that is not what unpooled steps do, which leave references where the optimizer put them
    assert np.abs(found[plan.references] - flat_of(free)[plan.references]).max() > 1e-4


def test_without_anything_embedded_nothing_happens() -> None:
    context = Context(1, 2, {}, RecordDict(), {})
    model = network()
    with embedded_training(context, model):
        assert hooks() == (0, 0)


def test_with_project_epoch_nothing_happens() -> None:
    context, _ = trained_client("epoch")
    with embedded_training(context, network()):
        assert hooks() == (0, 0)


def test_hooks_are_gone_after_an_exception() -> None:
    context, _ = trained_client("tie")
    seen = []

    def broken() -> None:
        with embedded_training(context, network()):
            seen.append(hooks())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    assert seen == [(1, 1)]
    assert hooks() == (0, 0)


def test_other_models_are_left_alone() -> None:
    context, _ = trained_client("tie")
    other, twin = network(seed=3), network(seed=3)
    for model, inside in ((other, True), (twin, False)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss_of(model).backward()
        if inside:
            with embedded_training(context, network()):
                optimizer.step()
        else:
            optimizer.step()
    assert np.array_equal(flat_of(other), flat_of(twin))


def test_another_model_is_refused() -> None:
    context, _ = trained_client("step")
    with pytest.raises(StateMismatch), embedded_training(context, network(norm=True)):
        pass
