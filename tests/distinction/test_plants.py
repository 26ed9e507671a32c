"""Planted evidence, and what is found of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cmd_plugin.distinction import plant, plant_recovery, plant_remainder
from cmd_plugin.errors import InputError, ShapeError
from tests.helpers.distinction import images

LABELS = torch.arange(40) % 2


def test_a_cross_is_nine_pixels_at_a_place_of_its_own() -> None:
    made = plant(images(40, size=16), LABELS, "cross", seed=5)
    assert not made[LABELS == 0].any()
    wanted = torch.eye(5).bool() | torch.eye(5).flip(0).bool()
    places = set()
    for one in made[LABELS == 1, 0]:
        rows, columns = one.nonzero(as_tuple=True)
        top, left = int(rows.min()), int(columns.min())
        places.add((top, left))
        assert torch.equal(one[top : top + 5, left : left + 5] != 0, wanted)
        torch.testing.assert_close(one[one != 0], torch.full((9,), 0.8))
    assert len(places) > 10


@pytest.mark.parametrize("kind", ["cross", "noise", "tint"])
def test_a_plant_depends_on_the_seed_and_the_number_alone(kind: str) -> None:
    x = images(40, channels=3)
    made = plant(x, LABELS, kind, seed=1)
    assert torch.equal(plant(x[:10], LABELS[:10], kind, seed=1), made[:10])
    if kind != "tint":
        assert not torch.equal(plant(x, LABELS, kind, seed=2), made)


def test_noise_and_tint_have_their_sizes() -> None:
    noise = plant(images(40, size=16), LABELS, "noise")[LABELS == 1]
    assert noise.std().item() == pytest.approx(0.25, rel=0.05)
    tint = plant(images(40, channels=3), LABELS, "tint")[LABELS == 1]
    assert tint[:, 0].unique().tolist() == [0.25]
    assert not tint[:, 1:].any()


@pytest.mark.parametrize("kind", ["cross", "noise", "tint"])
def test_the_plant_itself_is_a_perfect_map(kind: str) -> None:
    made = plant(images(40, channels=3), LABELS, kind)
    found = plant_recovery(made, made)
    assert found.iou == pytest.approx(1.0)
    assert found.cosine == pytest.approx(1.0)
    assert found.signed == pytest.approx(1.0)
    assert found.ncc == pytest.approx(0.0 if kind == "tint" else 1.0)  # a constant has no pattern


def test_recovery_is_numpys_correlation() -> None:
    made = plant(images(40), LABELS, "cross")
    maps = torch.randn(40, 1, 8, 8)
    found = plant_recovery(maps, made)
    rows = [(m.flatten().numpy(), p.flatten().numpy()) for m, p in zip(maps, made, strict=True)]
    rows = [(m, p) for m, p in rows if p.any()]
    assert found.ncc == pytest.approx(
        np.mean([np.corrcoef(abs(m), abs(p))[0, 1] for m, p in rows]), rel=1e-6
    )
    assert found.signed == pytest.approx(np.mean([np.corrcoef(m, p)[0, 1] for m, p in rows]))
    assert plant_recovery(-maps, made).signed == pytest.approx(-found.signed)


def test_what_remains_of_a_plant_is_measured_in_its_own_units() -> None:
    """Without the part the images are as far from clean ones as the numbers here say."""
    x = images(40)
    made = plant(x, LABELS, "noise")
    assert plant_remainder(made, made) == 0.0
    assert plant_remainder(torch.zeros_like(made), made) == 1.0
    assert plant_remainder(0.5 * made, made) == pytest.approx(0.25)
    part = 0.1 * torch.randn(40, 1, 8, 8)
    left = (x + made - part - x)[LABELS == 1].square().mean()
    before = (x + made - x)[LABELS == 1].square().mean()
    assert plant_remainder(part, made) == pytest.approx((left / before).item(), rel=1e-5)


def test_what_cannot_be_planted_or_found_is_refused() -> None:
    with pytest.raises(InputError, match="choose one of cross"):
        plant(images(40), LABELS, "tree")
    with pytest.raises(InputError, match="5x5"):
        plant(images(40, size=4), LABELS, "cross")
    with pytest.raises(InputError, match="three colours"):
        plant(images(40), LABELS, "tint")
    with pytest.raises(InputError, match="nothing to recover"):
        plant_recovery(images(), torch.zeros_like(images()))
    with pytest.raises(ShapeError):
        plant_recovery(images(), images(channels=3)[:2])
