"""What `points explain` finds and writes: right values, users' networks, doubts about the axes."""

from __future__ import annotations

import csv
import gzip
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cmd_plugin.errors import InputError, MissingDependency, StateMismatch
from cmd_plugin.jobs.points import explain
from cmd_plugin.jobs.points.model import PointNetwork, save_point_network
from cmd_plugin.jobs.points.options import ExplainOptions
from cmd_plugin.pointcloud import build_network
from cmd_plugin.pointcloud.files import load_voxels, voxel_clouds
from cmd_plugin.runs.result import Result

CLASSES = ("ant", "bee", "cat")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A network of `points train`, for clouds of 48 points."""
    network = build_network("pointnet", 3, 0.25)
    path = tmp_path / "model.safetensors"
    save_point_network(path, PointNetwork(network, "pointnet", 0.25, 48, CLASSES))
    return path


@pytest.fixture
def cloud(tmp_path: Path) -> Path:
    np.save(tmp_path / "cloud.npy", np.random.default_rng(0).normal(size=(200, 3)))
    return tmp_path / "cloud.npy"


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


@pytest.mark.parametrize("measure", ["fbi", "critical", "critical++", "entropy"])
def test_a_page_a_picture_and_a_table_are_written(
    measure: str, weights: Path, cloud: Path, tmp_path: Path
) -> None:
    pytest.importorskip("plotly")
    out = tmp_path / "made" / "view"
    options = ExplainOptions(clouds=(cloud,), weights=weights, measure=measure, refocus=True)
    result = explain.run(options, out)
    assert result.files == ("view.csv", "view.html", "view.ply", "view.png", "result.json")
    assert Result.load(out / "result.json") == result
    found = result.metrics
    page = (out / "view.html").read_text(encoding="utf-8")
    assert "Plotly.newPlot" in page
    assert 'src="http' not in page  # self-contained
    assert (out / "view.png").read_bytes().startswith(b"\x89PNG")
    assert 0.0 <= found["refocused"]["outlier_auroc"] <= 1.0
    tells = found["refocused"]["outlier_auroc"] >= 0.7
    assert found["refocused"]["counts_tell_outliers"] == tells
    rows = table(out / "view.csv")
    assert len(rows) == result.data["points"] == 48  # as many as it was trained on
    assert sum(float(row["critical++"]) for row in rows) == 256
    assert sum(float(row["critical++"]) > 0 for row in rows) == found["critical_points"]
    if measure == "entropy":
        total = sum(float(row["entropy"]) for row in rows)
        assert total == pytest.approx(found["entropy"], rel=1e-5)
    assert found["refocused"]["kept"] == 48  # fewer points than the minimum of 64
    assert found["answer"] in CLASSES
    assert 0.0 < found["probability"] <= 1.0
    assert found["left_out"] == {}


def test_without_plotly_all_but_the_page_is_written_and_said(
    weights: Path, cloud: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise MissingDependency("'plotly' is needed")

    monkeypatch.setattr(explain, "write_view", missing)
    result = explain.run(ExplainOptions(clouds=(cloud,), weights=weights), tmp_path / "out")
    assert result.files == ("view.csv", "view.ply", "view.png", "result.json")
    assert result.metrics["left_out"] == {"view.html": "'plotly' is needed"}


def test_a_view_is_not_replaced_by_accident(weights: Path, cloud: Path, tmp_path: Path) -> None:
    options = ExplainOptions(clouds=(cloud,), weights=weights)
    first = explain.run(options, tmp_path / "out")
    other = ExplainOptions(clouds=(cloud,), weights=weights, measure="critical++")
    with pytest.raises(InputError, match="finished run: add --overwrite"):
        explain.run(other, tmp_path / "out")
    assert explain.run(options, tmp_path / "out", resume=True).metrics == first.metrics
    explain.run(other, tmp_path / "out", overwrite=True)
    assert Result.load(tmp_path / "out" / "result.json").options["measure"] == "critical++"


def test_weights_of_others_and_names_of_classes_are_taken(tmp_path: Path, cloud: Path) -> None:
    torch.save(build_network("dgcnn", 3, width=0.25).state_dict(), tmp_path / "w.pt")
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")
    common: dict[str, Any] = {"clouds": (cloud,), "weights": tmp_path / "w.pt", "points": 60}
    common |= {"axes": "xzy", "up": "y"}
    named = {"model": "dgcnn", "width": 0.25, "classes": tmp_path / "names.txt"}
    result = explain.run(ExplainOptions(**common, **named), None)
    assert result.metrics["answer"] in CLASSES
    assert "amax over 60 tokens of 256 channels" in result.metrics["pool"]
    unnamed = explain.run(ExplainOptions(**common, model="dgcnn", width=0.25), None)
    number = CLASSES.index(result.metrics["answer"])
    assert unnamed.metrics["answer"] == f"class {number}"
    with pytest.raises(InputError, match="pass --model"):
        explain.run(ExplainOptions(**common), None)
    with pytest.raises(StateMismatch):
        explain.run(ExplainOptions(**common, model="dgcnn"), None)


def test_as_many_names_as_outputs_are_needed(weights: Path, cloud: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    options = ExplainOptions(clouds=(cloud,), weights=weights, classes=names)
    with pytest.raises(InputError, match="there is no file --classes"):
        explain.run(options, None)
    names.write_text("one\n\ntwo\n")
    with pytest.raises(InputError, match="has 2 names, the network 3 outputs"):
        explain.run(options, None)
    names.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="give a text file"):
        explain.run(options, None)


def test_several_clouds_have_a_folder_each(weights: Path, cloud: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.xyz"
    np.savetxt(other, np.random.default_rng(1).normal(size=(60, 3)))
    out = tmp_path / "out"
    result = explain.run(ExplainOptions(clouds=(cloud, other), weights=weights), out)
    names = ("view.csv", "view.html", "view.ply", "view.png")
    made = {str(p.relative_to(out)) for p in out.rglob("view.*")}
    assert made >= {f"{name}/{file}" for name in ("cloud", "other") for file in names[::2]}
    assert set(result.files) == {*made, "result.json"}
    for path, name in ((cloud, "cloud"), (other, "other")):
        alone = explain.run(ExplainOptions(clouds=(path,), weights=weights), None)
        assert result.metrics["clouds"][name] == alone.metrics
    assert result.data["points"] == {"cloud": 48, "other": 48}
    with pytest.raises(InputError, match="two clouds are called cloud"):
        ExplainOptions(clouds=(cloud, tmp_path / "cloud.xyz"), weights=weights)


def test_points_are_scored_for_one_class(weights: Path, cloud: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"clouds": (cloud,), "weights": weights}
    for name in ("bee", "1"):
        out = tmp_path / name
        found = explain.run(ExplainOptions(**common, of_class=name), out).metrics
        assert found["evidence_for"] == "bee"
        rows = table(out / "view.csv")
        losers = [row for row in rows if float(row["critical++"]) == 0]
        assert any(float(row["evidence"]) != 0 for row in rows)
        # A PointNet is point-wise: without a point that wins nothing it answers as before.
        assert all(abs(float(row["evidence"])) < 1e-5 for row in losers)
    with pytest.raises(InputError, match="--of-class wasp is none of the 3 classes"):
        explain.run(ExplainOptions(**common, of_class="wasp"), None)


def test_no_cloud_is_begun_before_all_are_read(weights: Path, cloud: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.xyz").write_text("1 2\n")
    with pytest.raises(InputError, match=r"bad\.xyz"):
        explain.run(ExplainOptions(clouds=(cloud, tmp_path / "bad.xyz"), weights=weights), "out")
    assert not Path("out").exists()


def test_a_cloud_has_the_points_it_has(weights: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "c.npy", np.random.default_rng(0).normal(size=(30, 3)))
    common: dict[str, Any] = {"clouds": (tmp_path / "c.npy",), "weights": weights}
    result = explain.run(ExplainOptions(**common), None)
    assert (result.data["points"], result.data["trained_on"]) == (30, 48)
    with pytest.raises(InputError, match="has 30 points, fewer than --points 100000"):
        explain.run(ExplainOptions(**common, points=100_000), None)
    for content in (np.ones((1, 3)), np.ones((70, 3))):
        np.save(tmp_path / "c.npy", content)
        with pytest.raises(InputError, match="is a single place"):
            explain.run(ExplainOptions(**common), None)


def test_a_grid_of_many_is_chosen_by_its_number(weights: Path, tmp_path: Path) -> None:
    grids = np.random.default_rng(0).random((3, 1, 6, 6, 6)) < 0.4
    path = tmp_path / "grids.npy.gz"
    with gzip.open(path, "wb") as stream:
        np.save(stream, grids)
    explain.run(ExplainOptions(clouds=(path,), weights=weights, item=2), tmp_path / "out")
    rows = table(tmp_path / "out" / "view.csv")
    found = torch.tensor([[float(row[axis]) for axis in "xyz"] for row in rows])
    expected = voxel_clouds(load_voxels(path)[2:3], 48, 0)[0]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    with pytest.raises(InputError, match="--item must be 0 to 2, got 3"):
        explain.run(ExplainOptions(clouds=(path,), weights=weights, item=3), None)


def test_it_says_so_if_other_axes_suit_the_network_better(tmp_path: Path) -> None:
    network = build_network("pointnet", 2, width=0.25)
    with torch.no_grad():  # answers 0 the surer, the further the cloud reaches along its y
        for weight in network.parameters():
            weight.zero_()
        for number in range(1, 6):
            getattr(network.feature_model, f"conv{number}").weight[0, 1 if number == 1 else 0] = 1.0
            getattr(network.feature_model, f"bn{number}").weight.fill_(1.0)
        for number in (1, 2, 3):
            getattr(network, f"linear{number}").weight[0, 0] = 8.0 if number == 3 else 1.0
        network.bn1.weight.fill_(1.0)
        network.bn2.weight.fill_(1.0)
    torch.save(network.state_dict(), tmp_path / "w.pt")
    flat = np.random.default_rng(0).uniform(-1, 1, size=(90, 3)) * [0.1, 0.01, 1.0]
    np.save(tmp_path / "c.npy", flat)

    def axes(order: str) -> dict[str, Any]:
        options = ExplainOptions(
            clouds=(tmp_path / "c.npy",),
            weights=tmp_path / "w.pt",
            points=60,
            width=0.25,
            model="pointnet",
            axes=order,
        )
        found: dict[str, Any] = explain.run(options, None).metrics["axes"]
        return found

    given = axes("xyz")
    assert given["better"][1] == "z"
    assert 0.5 <= given["confidence"] < 0.6  # hardly surer than a coin
    assert axes(given["better"])["better"] is None
    # Proposals are to be given as they stand, whatever the order was.
    turned = axes("zxy")
    assert (turned["given"], turned["better"][1]) == ("zxy", "z")
    assert turned["better_confidence"] > 0.9 > 0.7 > turned["confidence"]


def test_files_that_are_not_there_are_named(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no file .*b\.pt|b\.pt does not exist"):
        explain.run(ExplainOptions(clouds=(tmp_path / "a.npy",), weights=tmp_path / "b.pt"), None)
    with pytest.raises(InputError, match=r"there is no file .*a\.npy"):
        explain.run(ExplainOptions(clouds=(tmp_path / "a.npy",), weights=weights), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_training_framework_is_loaded(weights: Path, cloud: Path, tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from cmd_plugin.jobs.points.explain import run
from cmd_plugin.jobs.points.options import ExplainOptions
run(ExplainOptions(clouds=(Path({str(cloud)!r}),), weights=Path({str(weights)!r}), refocus=True),
    {str(tmp_path / "out")!r})
loaded = {{name.partition(".")[0] for name in sys.modules}}
heavy = {{"lightning", "pytorch_lightning", "torchmetrics", "torchvision", "sklearn"}}
print(sorted(loaded & heavy), "matplotlib.pyplot" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] False"
