"""The images of a decomposition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cmd_plugin.errors import InputError
from cmd_plugin.jobs.distinction.data import find_class, load_split_data, pixel_range
from cmd_plugin.jobs.distinction.options import EvaluateOptions, TrainOptions


def test_digits_are_taken_at_sixteen_pixels_and_planted_exactly() -> None:
    plain = load_split_data(TrainOptions(train_limit=50, random_labels=True))
    planted = load_split_data(TrainOptions(train_limit=50, plant="cross"))
    assert planted.size == (16, 16)
    assert planted.classes == ("without", "with")
    assert torch.equal(plain.test.labels, planted.test.labels)
    assert planted.plants is not None
    where = list(range(len(planted.test)))
    shown = [
        pixel_range(data.mean, data.std).to_unit(data.test.__getitems__(where)[0])
        for data in (plain, planted)
    ]
    torch.testing.assert_close(shown[1] - shown[0], planted.plants, atol=1e-5, rtol=0.0)
    has = planted.plants.flatten(1).any(dim=1)
    assert torch.equal(has.long(), planted.test.labels)
    assert 0.4 < planted.test.labels.float().mean() < 0.6


def test_a_tint_makes_grey_images_coloured() -> None:
    data = load_split_data(TrainOptions(train_limit=50, plant="tint", image_size=8))
    assert data.channels == 3
    images, labels = data.test.__getitems__(list(range(40)))
    unit = pixel_range(data.mean, data.std).to_unit(images)
    redder = unit[:, 0] - unit[:, 1]
    wanted = 0.25 * labels[:, None, None].float().expand_as(redder)
    torch.testing.assert_close(redder, wanted, atol=1e-5, rtol=0.0)


def test_training_and_held_out_images_have_other_plants() -> None:
    options = TrainOptions(train_limit=400, plant="noise")
    data = load_split_data(options)
    assert not torch.equal(data.train.labels[:100], data.test.labels[:100])
    again = load_split_data(options)
    assert torch.equal(again.plants, data.plants)  # type: ignore[arg-type]
    other = load_split_data(TrainOptions(train_limit=400, plant="noise", seed=1))
    assert not torch.equal(other.plants, data.plants)  # type: ignore[arg-type]


def test_classes_are_picked_in_the_order_given() -> None:
    data = load_split_data(TrainOptions(train_limit=200, pick=("8", "3"), image_size=8))
    assert data.classes == ("8", "3")
    everything = load_split_data(TrainOptions(train_limit=200, image_size=8))
    counts = torch.bincount(everything.test.labels)
    assert torch.bincount(data.test.labels).tolist() == [int(counts[8]), int(counts[3])]
    with pytest.raises(InputError, match="--pick zebra is none of the 10 classes"):
        load_split_data(TrainOptions(pick=("zebra", "3")))


def test_a_folder_of_a_users_own_is_taken(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for name in ("cat", "dog", "emu"):
        (tmp_path / name).mkdir()
        for number in range(5):
            pixels = draw.integers(256, size=(9, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    given = {"data": "folder", "data_root": str(tmp_path), "image_size": 8}
    data = load_split_data(TrainOptions(**given, pick=("dog", "emu")))  # type: ignore[arg-type]
    assert (data.classes, data.channels, data.size) == (("dog", "emu"), 3, (8, 8))


def test_names_and_numbers_name_a_class() -> None:
    assert find_class("dog", ("cat", "dog"), "--target") == 1
    assert find_class("0", ("cat", "dog"), "--target") == 0
    with pytest.raises(InputError, match="--target 2 is none of the 2 classes"):
        find_class("2", ("cat", "dog"), "--target")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plant": "cross", "random_labels": True}, "leave one out"),
        ({"pick": ("3",)}, "two classes or more"),
        ({"pick": ("3", "8"), "plant": "noise"}, "two classes or more"),
        ({"classifier": "c.safetensors", "plant": "noise"}, "--classifier is for"),
        ({"objective": "gan"}, "--objective must be one of"),
    ],
)
def test_options_that_contradict_one_another_are_refused(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        TrainOptions(**options)  # type: ignore[arg-type]


def test_rivals_are_those_that_there_are() -> None:
    with pytest.raises(InputError, match="--rival must be one of"):
        EvaluateOptions(model=Path("m"), rival=("lime",))
