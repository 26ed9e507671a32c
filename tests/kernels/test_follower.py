"""The update that never waits: its numbers against the specification, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cmd_plugin.kernels import FlatView
from cmd_plugin.kernels.update_affine import Follower, most_squares, reference

pytestmark = pytest.mark.paths("triton")

FAR, STILL = 2.0**32, 2.0**-200


def tensors(dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Return weights in three tensors: 10 blocks, of which a program checks 8; turned; short."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (330, 30), (40, 50), (7,)
    whole, turned, short = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return [whole, turned.T, short]


def problem(dtype: torch.dtype, modes: int, members: int = 0, **options: Any) -> dict[str, Any]:
    """Return weights, a state, and a follower of references, or of means of ``members``."""
    generator = torch.Generator().manual_seed(1)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    view = FlatView(tensors(dtype), dtype=state)
    normal = [torch.randn(view.numel, generator=generator, dtype=state) for _ in range(2)]
    order = torch.randperm(view.numel, generator=generator)
    chosen = order[: members or modes]
    member_mode = torch.arange(members or modes) % modes
    weight = torch.randn(members, generator=generator) if members else torch.ones(modes)
    table = torch.rand(4, modes, generator=generator, dtype=torch.float64) + 0.1
    head = torch.tensor([5.0, 100.0, 6.0, 0.0], dtype=torch.float64)
    settings = {"decay": 1.0, "limit": most_squares(state), "far": FAR, "still": STILL}
    references = None if members else chosen
    given = (view, chosen, member_mode, weight.double(), references)
    return {
        "view": view,
        "members": (chosen, member_mode, weight.double()),
        "arrays": {
            "mode": torch.randint(modes, (view.numel,), generator=generator).to(torch.uint8),
            "slope": normal[0],
            "mean": normal[1],
            "total": torch.rand(view.numel, generator=generator, dtype=state),
        },
        "state": torch.cat([head, table.flatten()]),
        "faults": torch.tensor([0, view.numel]),
        "follower": Follower(*given, **{**settings, **options}),
    }


def follow(given: dict[str, Any]) -> Tensor:
    """Take the weights in; return the next state, and leave the one before in ``given``."""
    made: Tensor = given["state"].clone()
    given["follower"].follow(**given["arrays"], state=made, faults=given["faults"])
    return made


def expected(given: dict[str, Any], decay: float, shrink: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the next state, in float64 from the formulas, and the arrays."""
    view, (chosen, member_mode, weight) = given["view"], given["members"]
    count, summed, seen, _ = given["state"][:4].tolist()
    _, middle, squares, unit = given["state"][4:].view(4, -1)
    profile = torch.zeros_like(middle).index_add_(0, member_mode, view.gather(chosen) * weight)
    count = decay * count + 1
    step = profile - middle
    squares = decay * squares + step.square() * (1 - 1 / count)
    ratio = squares / unit
    far = ((ratio < 1 / FAR) | (ratio > FAR)) & (squares > STILL)
    factor = torch.where(far, torch.exp2(torch.frexp(ratio).exponent.double()), 1.0)
    unit = unit * factor
    arrays = {name: array.clone() for name, array in given["arrays"].items()}
    arrays["slope"] /= factor[arrays["mode"].long()].to(arrays["slope"].dtype)
    flat = torch.cat([t.reshape(-1).to(view.dtype) for t in view.tensors])
    added = reference.update_affine(
        flat,
        *(arrays[name] for name in ("mode", "slope", "mean")),
        step * (1 - 1 / count) / unit,
        1 / count,
        decay,
        arrays["total"] if shrink else None,
    )
    middle = middle + step / count
    if given["follower"]._references is not None:
        arrays["slope"][chosen] = (squares / unit).to(view.dtype)
        arrays["mean"][chosen] = middle.to(view.dtype)
        if shrink:
            arrays["total"][chosen] = squares.to(view.dtype)
    head = [count, decay * summed + (1 - 1 / count) * float(added), seen + 1, 0.0]
    table = [profile, middle, squares, unit]
    return torch.cat([torch.tensor(head, dtype=torch.float64), *table]), arrays


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("modes", "members", "decay", "shrink"),
    [(3, 0, 1.0, False), (1, 0, 0.9, True), (5, 90, 0.9, False), (256, 300, 1.0, True)],
)
def test_equals_the_formulas(
    dtype: torch.dtype, modes: int, members: int, decay: float, shrink: bool
) -> None:
    given = problem(dtype, modes, members, decay=decay)
    if not shrink:
        given["arrays"]["total"] = None
    whole = {**given, "arrays": {k: v for k, v in given["arrays"].items() if v is not None}}
    state, arrays = expected(whole, decay, shrink)
    made = follow(given)
    torch.testing.assert_close(made, state, rtol=1e-6 if dtype != torch.float64 else 1e-13, atol=0)
    exact = 1e-5 if dtype != torch.float64 else 1e-13
    for name, array in arrays.items():
        torch.testing.assert_close(given["arrays"][name], array, rtol=exact, atol=exact)
    assert given["faults"].tolist() == [0, given["view"].numel]


@pytest.mark.parametrize("size", [1e-7, 1e7])
def test_a_profile_far_from_its_unit_takes_the_slopes_along(size: float) -> None:
    given = problem(torch.float64, 3)
    given["state"][-1] *= size**2
    state, arrays = expected(given, 1.0, True)
    made = follow(given)
    torch.testing.assert_close(made, state, rtol=1e-12, atol=0)
    torch.testing.assert_close(given["arrays"]["slope"], arrays["slope"], rtol=1e-12, atol=0)
    assert 1.0 < made[-1] / made[-4] <= 2.0  # the unit is near the sum of squares again


@pytest.mark.parametrize(
    ("values", "bad"), [((math.nan,), 1), ((math.inf, math.nan, -math.inf), 3), ((1e30,), 0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_refused_leaves_every_bit(
    dtype: torch.dtype, values: tuple[float, ...], bad: int
) -> None:
    given = problem(dtype, 3)
    before = {name: array.clone() for name, array in given["arrays"].items()}
    spoilt = given["view"].tensors[1]
    for place, value in enumerate(values):
        spoilt[7 + place, 3] = value
    made = follow(given)
    assert made[3] == 1.0
    assert torch.equal(made[:3], given["state"][:3])
    assert torch.equal(made[4:], given["state"][4:])
    first = 330 * 30 + 7 * 40 + 3 if bad else given["view"].numel
    assert given["faults"].tolist() == [bad, first]
    # Sound weights are not taken in either, until somebody has looked.
    spoilt.fill_(0.0)
    given["state"] = made
    assert torch.equal(follow(given), made)
    for name, array in before.items():
        assert torch.equal(array, given["arrays"][name])
    made[3] = 0.0
    assert follow(given)[2] == made[2] + 1


def test_a_reference_that_is_not_finite_is_refused_too() -> None:
    given = problem(torch.float32, 3)
    chosen = int(given["members"][0][0])
    flat = FlatView(given["view"].tensors)
    flat.put(torch.tensor([chosen]), torch.tensor([math.nan]))
    assert follow(given)[3] == 1.0
    assert given["faults"].tolist() == [1, chosen]


def test_the_same_every_time() -> None:
    one, other = problem(torch.float32, 3), problem(torch.float32, 3)
    assert torch.equal(follow(one), follow(other))
    for name, array in one["arrays"].items():
        assert torch.equal(array, other["arrays"][name])
