"""From training to maps: what the three commands find, and what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from cmd_plugin.cli.main import run as run_command
from cmd_plugin.errors import InputError, StateMismatch
from cmd_plugin.jobs.distinction.evaluate import run as evaluate
from cmd_plugin.jobs.distinction.explain import run as explain
from cmd_plugin.jobs.distinction.marks import read_marks
from cmd_plugin.jobs.distinction.model import CLASSIFIER, open_model
from cmd_plugin.jobs.distinction.options import (
    RIVAL_NAMES,
    EvaluateOptions,
    ExplainOptions,
    TrainOptions,
)
from cmd_plugin.jobs.distinction.rivals import rival_maps
from cmd_plugin.jobs.distinction.train import run as train
from tests.helpers.distinction import conv_net, images, model_folder

pytest.importorskip("captum")

TINY: dict[str, Any] = {
    "train_limit": 60,
    "image_size": 8,
    "model": "cnn:4",
    "judge": "cnn:4",
    "classifier_epochs": 1,
    "epochs": 1,
    "width": 4,
    "branches": 2,
    "threads": 1,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decomposition of planted digits."""
    folder = tmp_path_factory.mktemp("model")
    model_folder(folder, plant="cross")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images, two of them in colour, and of other sizes than the model's."""
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for name, shape in {"a": (8, 8), "b": (12, 9, 3), "c": (8, 8, 3)}.items():
        Image.fromarray(draw.integers(256, size=shape, dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


def test_a_classifier_of_ones_own_is_explained_and_kept(tmp_path: Path) -> None:
    """Weights that were trained before are those in the folder, bit for bit."""
    model_folder(tmp_path / "first", pick=("3", "8"))
    given = tmp_path / "first" / CLASSIFIER
    options = TrainOptions(**TINY, pick=("3", "8"), classifier=given, objective="uniform")
    result = train(options, tmp_path / "second")
    one, other = (load_file(path) for path in (given, tmp_path / "second" / CLASSIFIER))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert result.data["classes"] == ["3", "8"]
    assert len(result.metrics["split"]["removed"]) == 2
    assert (tmp_path / "second/examples.png").is_file()
    rows = (tmp_path / "second/metrics.csv").read_text().splitlines()
    assert rows[0].startswith("epoch,psnr,removed,judge_removed")
    assert len(rows) == 2
    opened = open_model(tmp_path / "second")
    assert opened.options.as_dict() == options.as_dict()


def test_three_classes_without_a_classifier(tmp_path: Path) -> None:
    options = TrainOptions(**TINY, pick=("1", "2", "3"), objective="distinction", sparsity=0.1)
    result = train(options, tmp_path / "out")
    assert result.metrics["split"]["removed"] == []
    assert len(result.metrics["split"]["judge_removed"]) == 3
    found = evaluate(
        EvaluateOptions(model=tmp_path / "out", images=9, limit_images=1, rival=("random",)),
        tmp_path / "evaluated",
    )
    assert found.metrics["plant"] is None
    assert len(found.metrics["judge_accuracy"]) == 3


def test_all_rivals_are_measured_like_the_decomposition(model: Path, tmp_path: Path) -> None:
    options = EvaluateOptions(model=model, images=10, limit_images=1, threads=1)
    result = evaluate(options, tmp_path / "out")
    found = result.metrics
    assert set(found["rivals"]) == set(RIVAL_NAMES)
    assert found["rivals_left_out"] == {}
    for row in (found, *found["rivals"].values()):
        assert set(row["auc"]) == {"removal", "deletion"}
        assert set(row["auc"]["removal"]) == {"classifier", "judge"}
        assert set(row["plant"]) == {"ncc", "signed", "iou", "cosine", "remainder"}
    assert len(found["judge_accuracy"]) == 2
    assert {"grey", "filled"} == set(found["limits"]["greedy"])
    json.dumps(result.as_dict(), allow_nan=False)


def test_rivals_are_the_same_twice_and_leave_the_network_alone() -> None:
    network = conv_net()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    numbers = np.random.get_state()[1].copy()  # noqa: NPY002
    x, labels = images(4), torch.tensor([0, 1, 1, 0])
    one, left_out = rival_maps(network, x, labels, RIVAL_NAMES, 0)
    other, _ = rival_maps(network, x, labels, RIVAL_NAMES, 0)
    assert left_out == {}
    for name in RIVAL_NAMES:
        assert one[name].shape[2:] == x.shape[2:]
        assert torch.equal(one[name], other[name]), name
    assert network.training
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
    assert (np.random.get_state()[1] == numbers).all()  # noqa: NPY002
    _, left_out = rival_maps(
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2)), x, labels, ("grad_cam",), 0
    )
    assert "no convolution" in left_out["grad_cam"]


def test_images_become_pictures_arrays_and_a_page(
    model: Path, pictures: Path, tmp_path: Path
) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    for name in ("a", "b", "c"):
        marked = np.zeros((8, 8), dtype=np.uint8)
        marked[:4] = 255
        Image.fromarray(marked).save(masks / f"{name}.png")
    options = ExplainOptions(images=pictures, model=model, masks=masks, threads=1)
    result = explain(options, tmp_path / "out")
    assert list(result.metrics["images"]) == ["a.png", "b.png", "c.png"]
    assert set(result.metrics["masks"]) == {"iou", "pointing", "mass", "marked"}
    assert result.metrics["masks"]["marked"] == 3
    with np.load(tmp_path / "out/maps.npz") as arrays:
        assert arrays["x_batch"].shape == (3, 1, 8, 8)
        assert arrays["a_batch"].shape == (3, 1, 8, 8)
        assert arrays["y_batch"].shape == (3,)
        assert arrays["s_batch"].shape == (3, 1, 8, 8)
        assert (arrays["a_batch"] >= 0).all()  # Quantus refuses maps below zero
        np.testing.assert_allclose(
            arrays["distinct"] + arrays["agnostic"], arrays["x_batch"], atol=1e-5
        )
    page = (tmp_path / "out/page.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64") == 3
    assert "before" in page
    for one in result.metrics["images"].values():
        assert one["before"] >= 0.5  # of two classes, the answer's
    to = ExplainOptions(images=pictures, model=model, target="with", limit=2, threads=1)
    found = explain(to, tmp_path / "to")
    assert {one["target"] for one in found.metrics["images"].values()} == {"with"}
    assert found.data["left_out"] == 1


def test_boxes_are_masks_in_pixels_of_the_images(
    model: Path, pictures: Path, tmp_path: Path
) -> None:
    """The upper half as boxes scores as the upper half as masks; an image may have no box."""
    (tmp_path / "masks").mkdir()
    upper = np.zeros((8, 8), dtype=np.uint8)
    upper[:4] = 255
    for name in ("a", "c"):
        Image.fromarray(upper).save(tmp_path / f"masks/{name}.png")
    Image.fromarray(np.zeros((12, 9), dtype=np.uint8)).save(tmp_path / "masks/b.png")
    table = tmp_path / "boxes.csv"
    table.write_text("image,left,top,right,bottom\na.png,0,0,8,4\nc,0,0,3,4\nc,3,0,8,4\n")
    found = [
        explain(
            ExplainOptions(images=pictures, model=model, masks=masks, threads=1), tmp_path / name
        ).metrics
        for name, masks in (("one", tmp_path / "masks"), ("other", table))
    ]
    assert found[0] == found[1]
    assert found[1]["masks"]["marked"] == 2
    assert found[1]["images"]["b.png"]["iou"] is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,left,top,right\na,0,0,1\n", "line 2, holds no box"),
        ("image,left,top,right,bottom\na,0,0,1,1\na,3,0,1,1\n", "line 3.*not below right"),
        ("image,left,top,right,bottom\na,0,0,nan,1\n", "line 2"),
        ("image,left,top,right,bottom\nz,0,0,1,1\n", "no box for any of the images"),
    ],
)
def test_what_is_no_box_is_refused(text: str, message: str, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "boxes.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_marks(tmp_path / "boxes.csv", pictures, ("a.png", "b.png"), (8, 8))


def test_another_classifier_is_refused(model: Path, pictures: Path, tmp_path: Path) -> None:
    weights = load_file(model / CLASSIFIER)
    weights["head.bias"] += 1e-6
    save_file(weights, tmp_path / "other.safetensors")
    options = ExplainOptions(
        images=pictures, model=model, classifier=tmp_path / "other.safetensors"
    )
    with pytest.raises(StateMismatch, match="another classifier"):
        explain(options, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_model_or_no_mask_is_refused(
    model: Path, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no finished run"):
        explain(ExplainOptions(images=pictures, model=tmp_path), tmp_path / "out")
    shutil.copytree(model, tmp_path / "copy")
    content = json.loads((model / "result.json").read_text())
    (tmp_path / "copy/result.json").write_text(json.dumps(content | {"job": "train"}))
    with pytest.raises(InputError, match="a run of `train`"):
        explain(ExplainOptions(images=pictures, model=tmp_path / "copy"), tmp_path / "out")
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(tmp_path / "masks/a.png")
    with pytest.raises(InputError, match=r"no mask for b \(2 missing\)"):
        explain(
            ExplainOptions(images=pictures, model=model, masks=tmp_path / "masks"),
            tmp_path / "out",
        )
    model_folder(tmp_path / "free", objective="distinction", pick=("3", "8"))
    with pytest.raises(InputError, match="give --target"):
        explain(ExplainOptions(images=pictures, model=tmp_path / "free"), tmp_path / "out")


def test_results_are_printed_in_tables(
    model: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed(*words: str) -> str:
        with pytest.raises(SystemExit) as ended:
            run_command(["distinction", *words, "--threads", "1", "--quiet"])
        assert ended.value.code == 0
        return capsys.readouterr().out

    shown = printed(
        *("evaluate", "--model", str(model), "--images", "8", "--limit-images", "1"),
        *("--rival", "saliency", "--out", str(tmp_path / "e")),
    )
    assert "saliency" in shown
    assert "NCC" in shown
    assert "warning: the distinct branch has collapsed" in shown
    shown = printed("explain", str(pictures), "--model", str(model), "--out", str(tmp_path / "x"))
    assert "a.png" in shown
