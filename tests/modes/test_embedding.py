"""Who is embedded when, and with which coefficients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from mode_toys import assert_one_sentence, follow, least_squares, planted, walks
from torch import Tensor

from cmd_plugin.errors import InputError
from cmd_plugin.modes import Embedding, Layout, OnlineModes

OPTIONS: dict[str, Any] = {"modes": 4, "warmup": 9, "samples": 80, "storage": "fp32"}


def simulate(rows: Tensor, modes: OnlineModes) -> list[Tensor]:
    """Section 2.3 by brute force: the masks after every snapshot, from fits of whole histories."""
    embedding, warmup = modes.settings.embedding, modes.settings.warmup
    assert embedding is not None
    count = rows.shape[1]
    profiles, mode = rows.T[modes.references], modes.assignment.long()
    embedded = torch.zeros(count, dtype=torch.bool)
    masks = [embedded] * (warmup + 1)
    old = torch.stack(least_squares(rows[: warmup + 1], profiles[:, : warmup + 1], mode))
    old[:, modes.references] = torch.tensor([[1.0], [0.0]]).double()
    for t in range(warmup + 1, len(rows)):
        if t % embedding.every == 0:
            new = torch.stack(least_squares(rows[: t + 1], profiles[:, : t + 1], mode))
            new[:, modes.references] = torch.tensor([[1.0], [0.0]]).double()
            drift = (new - old).square().sum(dim=0).sqrt()
            old = new
            drift[embedded] = drift.max() + 1
            total = count - int(embedded.sum()) if embedding.relative else count
            embedded = embedded.clone()
            embedded[drift.argsort(stable=True)[: math.ceil(total * embedding.percent / 100)]] = (
                True
            )
            embedded[modes.references] = False
        masks.append(embedded)
    return masks


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize(("every", "percent"), [(4, 10), (5, 25.0), (1, 3.0), (30, 100)])
def test_equal_the_rule_by_brute_force(relative: bool, every: int, percent: float) -> None:
    rows = walks(40, 300)
    embedding = Embedding(every, percent, relative)
    modes = OnlineModes(Layout.of_vector(300, torch.float64), **OPTIONS, embedding=embedding)
    masks = []
    for row in rows:
        modes.update(row)
        masks.append(modes.embedded)
    expected = simulate(rows, modes)
    assert len(masks) == len(expected)
    for t, (one, other) in enumerate(zip(masks, expected, strict=True)):
        assert torch.equal(one, other), t
        assert t == 0 or not (masks[t - 1] & ~one).any()  # nobody leaves
        assert not one[modes.references].any()
    counts = torch.stack(expected).sum(dim=1)
    assert modes.embedded_fraction == counts[-1] / 300
    assert modes.saved_percent == pytest.approx(100 * float(counts.sum()) / (300 * 40))
    before = float(counts[:-1].sum())
    assert modes.volume_percent == pytest.approx(100 - 100 * before / (300 * 40))
    events = len([t for t in range(10, 40) if t % every == 0])
    news = events * math.ceil(300 / 8) + 9 * int(counts[-1])
    assert modes.volume_bytes == 8 * (300 * 40 - int(before)) + news


@pytest.mark.parametrize(
    ("relative", "snapshots", "saved"),
    [(False, 150, 48.10), (True, 150, 35.26), (False, 100, 26.60), (True, 100, 21.98)],
)
def test_small_case(relative: bool, snapshots: int, saved: float) -> None:
    """N = 1000, M = 5, F = 20, L = P = 10; the numbers come from the authors' selection rule."""
    modes = OnlineModes(
        Layout.of_vector(1000), 5, 20, 200, embedding=Embedding(10, 10, relative=relative)
    )
    counts = []
    for row in walks(snapshots, 1000).float():
        modes.update(row)
        counts.append(int(modes.embedded.sum()))
    assert modes.number_of_modes == 5
    assert modes.saved_percent == pytest.approx(saved, abs=0.005)
    assert counts[:30] == [0] * 30
    if not relative:  # each event takes 100 weights, five of them references
        assert counts == [min(995, 95 * max(0, t // 10 - 2)) for t in range(snapshots)]


@pytest.mark.parametrize(("relative", "saved"), [(False, 23.3), (True, 19.2)])
def test_many_weights(relative: bool, saved: float) -> None:
    embedding = Embedding(every=5, percent=10, relative=relative)
    rows = walks(60, 20000).float()
    modes = follow(rows, modes=2, warmup=20, samples=100, embedding=embedding)
    assert modes.saved_percent == pytest.approx(saved, abs=0.05)
    if not relative:  # section 3.3: the code counts one round early
        assert modes.volume_percent == pytest.approx(77.9, abs=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "extra", [{}, {"shrink": True}, {"profile": "mean"}, {"forgetting": 0.9}], ids=str
)
def test_coefficients_freeze_at_the_event(dtype: torch.dtype, extra: dict[str, Any]) -> None:
    rows = walks(40, 300).to(dtype)
    free = OnlineModes(Layout.of_vector(300, dtype), **OPTIONS, **extra)
    modes = OnlineModes(
        Layout.of_vector(300, dtype), **OPTIONS, **extra, embedding=Embedding(5, 10)
    )
    scale = offset = torch.empty(0)
    embedded = torch.zeros(300, dtype=torch.bool)
    for t, row in enumerate(rows):
        free.update(row)
        modes.update(row)
        if not modes.ready:
            continue
        now = modes.embedded
        news = now & ~embedded
        assert news.any() == (t >= 10 and t % 5 == 0)
        if embedded.any():
            assert torch.equal(modes.scale[embedded], scale[embedded])
            assert torch.equal(modes.offset[embedded], offset[embedded])
        scale, offset, embedded = modes.scale, modes.offset, now
        # Free weights are fitted as if nobody were embedded, and so were new members until now.
        fresh = [free.tracker.scale(shrunk=True), free.tracker.offset(shrunk=True)]
        for mine, theirs in zip((scale, offset), fresh, strict=True):
            assert torch.equal(mine[news], theirs[news])
        assert torch.equal(scale[~now], free.scale[~now])
        assert torch.equal(offset[~now], free.offset[~now])
        model = modes.reconstruct()
        assert torch.equal(model[~now], free.reconstruct()[~now])
        values = modes.tracker.profile.to(dtype)[modes.assignment.long()]
        assert torch.equal(model[now], (scale * values + offset)[now])
    assert embedded.sum() > 80
    assert not embedded[modes.tracker.choice.members].any()


def test_references_have_no_drift() -> None:
    rows = walks(40, 300).float()
    modes = follow(rows, **OPTIONS, embedding=Embedding(5, 10))
    embedder = modes._embedder
    assert embedder is not None
    assert (embedder.tied.scale[modes.references] == 1).all()
    assert not embedder.tied.offset[modes.references].any()


@pytest.mark.parametrize("extra", [{}, {"shrink": True}, {"forgetting": 0.9}], ids=str)
def test_explained_variance_of_frozen_coefficients(extra: dict[str, Any]) -> None:
    rows = walks(40, 200)
    modes = OnlineModes(
        Layout.of_vector(200, torch.float64), **OPTIONS, **extra, embedding=Embedding(5, 10)
    )
    history = []
    for row in rows:
        modes.project(row)
        modes.update(row)
        history.append(row)
    rows = torch.stack(history)
    factor = extra.get("forgetting", 1.0)
    age = torch.tensor([30.0] * 10 + list(range(29, -1, -1)), dtype=torch.float64)
    weights = (factor**age)[:, None]
    decomposition = modes.decomposition()
    model = torch.stack([decomposition.reconstruct(t) for t in range(40)])
    mean = (weights * rows).sum(dim=0) / weights.sum()
    residual = (weights * (rows - model).square()).sum()
    share = 1 - float(residual / (weights * (rows - mean).square()).sum())
    assert modes.explained_variance() == pytest.approx(share, rel=1e-9)
    assert decomposition.explained_variance() == pytest.approx(share, rel=1e-9)
    assert 0 < share < 1


def test_the_decomposition_holds_frozen_coefficients() -> None:
    rows = walks(40, 300).float()
    modes = follow(rows, **OPTIONS, embedding=Embedding(5, 10))
    result = modes.decomposition()
    at = modes.embedded
    assert torch.equal(result.scale[at], modes.scale[at])
    reach = 1 + rows.abs().max() * modes.scale.abs().max()
    assert (result.reconstruct(-1) - modes.reconstruct()).abs().max() <= 8 * 2**-24 * reach


def test_planted_modes_are_embedded_without_loss() -> None:
    rows, _ = planted(5, snapshots=60)
    modes = follow(rows.float(), modes=5, warmup=20, storage="fp32", embedding=Embedding(5, 20))
    assert modes.embedded_fraction == (4000 - 5) / 4000
    # float32 rounds b = mean - a * mean of the reference at the size of its terms.
    assert (modes.reconstruct().double() - rows[-1]).abs().max() < 5e-6


def test_nine_more_bytes_a_weight() -> None:
    rows = walks(30, 500).float()
    plain, embedding = follow(rows, **OPTIONS), follow(rows, **OPTIONS, embedding=Embedding())
    assert plain.state_bytes == 9 * 500
    assert embedding.state_bytes == 18 * 500


def test_before_the_first_event() -> None:
    rows = walks(12, 50).float()
    options = {**OPTIONS, "samples": 40, "embedding": Embedding(15, 10)}
    for count in (0, 5, 10, 12):
        modes = OnlineModes(Layout.of_vector(50), **options)
        for row in rows[:count]:
            modes.update(row)
        assert not modes.embedded.any()
        assert modes.embedded.shape == (50,)
        assert modes.embedded_fraction == modes.saved_percent == 0
        assert modes.volume_percent == 100
        assert modes.volume_bytes == count * 50 * 4
        row = rows[0].clone()
        assert modes.project(row) == 0
        assert torch.equal(row, rows[0])


def test_without_embedding_nothing_is_embedded() -> None:
    modes = follow(walks(30, 50).float(), **{**OPTIONS, "samples": 40})
    assert not modes.embedded.any()
    assert modes.embedded_fraction == modes.saved_percent == 0
    assert (modes.volume_percent, modes.volume_bytes) == (100, 30 * 50 * 4)
    assert modes.project(torch.zeros(50)) == 0


def test_a_run_that_stands_still_embeds_nothing() -> None:
    modes = OnlineModes(Layout.of_vector(50), modes=3, warmup=2, embedding=Embedding(1, 50))
    modes.update(torch.ones(50))
    modes.update(torch.ones(50))
    with pytest.warns(UserWarning, match="nothing is modelled"):
        modes.update(torch.ones(50))
    modes.update(torch.ones(50))
    assert not modes.embedded.any()
    assert modes.project(torch.ones(50)) == 0


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_coefficients_that_overflowed_are_never_embedded(bad: float) -> None:
    rows = walks(40, 300).float()
    modes = follow(rows[:12], **OPTIONS, embedding=Embedding(5, 50))
    spoilt = next(i for i in range(300) if i not in modes.references)
    modes.tracker.slope[spoilt] = bad
    for row in rows[12:]:
        modes.update(row)
    expected = torch.ones(300, dtype=torch.bool)
    expected[modes.references] = expected[spoilt] = False
    assert torch.equal(modes.embedded, expected)
    row = rows[-1].clone()
    modes.project(row)
    assert row.isfinite().all()


def test_a_quota_is_exact() -> None:
    """7 % of 100 weights are 7, though 100 * 0.07 is more than that in floats."""
    modes = follow(walks(11, 100), modes=1, warmup=4, samples=50, embedding=Embedding(10, 7.0))
    assert int(modes.embedded.sum()) == 7 - 1


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"every": 0}, "every"),
        ({"every": 2.0}, "every"),
        ({"every": True}, "every"),
        ({"percent": 0}, "percent"),
        ({"percent": 101}, "percent"),
        ({"percent": math.nan}, "percent"),
        ({"percent": "ten"}, "percent"),
        ({"relative": 1}, "relative"),
        ({"project": "batch"}, "epoch, step, tie"),
        ({"slots": "keep"}, "leave, zero"),
    ],
)
def test_bad_settings(settings: dict[str, Any], part: str) -> None:
    with pytest.raises(InputError) as caught:
        Embedding(**settings)
    assert_one_sentence(caught.value, part)
