"""A refused snapshot changes nothing, in the warm-up or later; others leave a sound state."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from mode_toys import assert_one_sentence, follow, generator, same_state, walks
from torch import nn

from cmd_plugin.errors import NonFiniteError
from cmd_plugin.modes import Embedding, OnlineModes

SMALL, LARGE = 420, 90_300  # on both sides of where weights are copied together to be read twice
OPTIONS = {"modes": 3, "warmup": 4, "samples": 60}


def run(numel: int, updates: int, **options: object) -> OnlineModes:
    return follow(walks(updates, numel).float(), **{**OPTIONS, **options})


def spoilt(numel: int, size: float, share: str) -> torch.Tensor:
    weights = torch.randn(numel, generator=generator(3))
    if share == "all":
        return torch.full_like(weights, size)
    if share == "spread":  # some squares overflow and some do not
        return weights * size
    weights[-1] = size
    return weights


@pytest.mark.parametrize("size", [1e17, 1e18, 1.5e19, 1e20, 3e38, math.inf, math.nan])
@pytest.mark.parametrize("share", ["all", "spread", "one"])
@pytest.mark.parametrize("updates", [3, 8])
@pytest.mark.parametrize("numel", [SMALL, LARGE])
def test_what_is_refused_changes_no_bit(numel: int, updates: int, share: str, size: float) -> None:
    modes = run(numel, updates)
    before = modes.state_dict()
    with pytest.raises(NonFiniteError) as caught:
        modes.update(spoilt(numel, size, share))
    assert_one_sentence(caught.value, f"snapshot {updates}", "keep what they knew")
    assert same_state(modes.state_dict(), before)


def test_the_linear_layer_whose_weights_explode() -> None:
    net = nn.Linear(20, 20)
    modes = OnlineModes(net, **OPTIONS)  # type: ignore[arg-type]
    for row in walks(8, SMALL).float():
        nn.utils.vector_to_parameters(row, net.parameters())
        modes.update()
    known = modes.reconstruct()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(1.5e19)
    with pytest.raises(NonFiniteError, match="so large"):
        modes.update()
    assert torch.equal(modes.reconstruct(), known)


@pytest.mark.filterwarnings("ignore:only")  # a jump in the warm-up is all that is seen
@pytest.mark.parametrize("options", [{}, {"shrink": True}, {"embedding": Embedding(2, 20)}])
@pytest.mark.parametrize("size", [1e6, 1e10, 1e13])
@pytest.mark.parametrize("updates", [3, 8])
def test_what_is_taken_in_leaves_a_finite_state(
    updates: int, size: float, options: dict[str, object]
) -> None:
    modes = run(SMALL, updates, **options)
    rows = walks(6, SMALL, 9).float()
    for row in (rows[0] * size, *rows):
        modes.update(row)
    for values in (modes.reconstruct(), modes.scale, modes.offset):
        assert bool(values.isfinite().all())
    assert 0.0 <= modes.explained_variance() <= 1.0


def test_a_profile_that_jumps_far_beyond_the_warm_up_is_fitted_as_well() -> None:
    """The slopes' unit moves, which costs no accuracy: the same least squares as in one unit."""
    rows = walks(9, 60).double()
    rows[5:] *= 2.0**40
    modes = follow(rows, **OPTIONS)
    at, mode = modes.references, modes.assignment.long()
    profile = rows[:, at] - rows[:, at].mean(dim=0)
    centred = rows - rows.mean(dim=0)
    expected = (centred * profile[:, mode]).sum(dim=0) / profile.square().sum(dim=0)[mode]
    torch.testing.assert_close(modes.scale, expected, rtol=1e-9, atol=1e-12)
    assert 2.0**-33 < float((modes.tracker.squares / modes.tracker.unit).max()) < 2.0**33


@pytest.mark.parametrize("still", range(150, 260, 5))
def test_a_standstill_under_forgetting_leaves_finite_scales(still: int) -> None:
    rows = walks(8, 60).float()
    modes = follow(rows, forgetting=0.5, **OPTIONS)
    for _ in range(still):
        modes.update(rows[-1])
    assert bool(modes.scale.isfinite().all())
    assert bool(modes.decomposition().scale.isfinite().all())
    share = modes.explained_variance()
    assert math.isnan(share) or 0.0 <= share <= 1.0


def test_resuming_around_a_change_of_unit_is_exact() -> None:
    rows = walks(14, 60).float()
    rows[6:] *= 2.0**30
    whole, parts = follow(rows[:7], **OPTIONS), follow(rows[:6], **OPTIONS)
    parts = copy.deepcopy(parts)
    again = OnlineModes(parts.layout, **OPTIONS)  # type: ignore[arg-type]
    again.load_state_dict(parts.state_dict())
    again.update(rows[6])
    assert same_state(again.state_dict(), whole.state_dict())
