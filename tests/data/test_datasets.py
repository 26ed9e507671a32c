"""The one door to all data sets, and the loader behind it."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from cmd_plugin.data import (
    DATASETS,
    EpochShuffle,
    LabelledImages,
    load_dataset,
    make_loader,
)
from cmd_plugin.data.images import MemoryImages, channel_statistics
from cmd_plugin.errors import InputError


def contents(data: object) -> tuple[Tensor, Tensor]:
    assert isinstance(data, LabelledImages)
    return data.__getitems__(list(range(len(data))))


def test_digits() -> None:
    data = load_dataset("digits")
    assert data.classes == tuple("0123456789")
    assert (data.channels, data.size) == (1, (8, 8))
    images, labels = contents(data.train)
    held_out, truth = contents(data.test)
    assert len(images) + len(held_out) == 1797
    assert len(held_out) == 359
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert abs(float(images.mean())) < 1e-5
    assert abs(float(images.std()) - 1.0) < 1e-3
    shares = torch.bincount(truth) / len(truth) - torch.bincount(labels) / len(labels)
    assert shares.abs().max() < 0.005


def test_the_seed_decides_everything() -> None:
    first, again, other = (
        load_dataset("digits", seed=seed, label_noise=0.4, train_limit=300) for seed in (1, 1, 2)
    )
    for a, b in zip(contents(first.train), contents(again.train), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(contents(first.test)[0], contents(other.test)[0])


def test_noise_is_in_the_training_labels_only() -> None:
    clean, noisy = load_dataset("digits"), load_dataset("digits", label_noise=0.4)
    assert torch.equal(contents(clean.train)[0], contents(noisy.train)[0])
    changed = (contents(clean.train)[1] != contents(noisy.train)[1]).float().mean()
    assert abs(float(changed) - 0.4) < 1e-3
    assert torch.equal(contents(clean.test)[1], contents(noisy.test)[1])


def test_resizing() -> None:
    data = load_dataset("digits", image_size=12, train_limit=50)
    assert data.size == (12, 12)
    assert contents(data.train)[0].shape == (50, 1, 12, 12)


def test_unknown_name_suggests_a_near_one() -> None:
    with pytest.raises(InputError, match=r"unknown data set 'mist': did you mean 'mnist'\?"):
        load_dataset("mist")
    with pytest.raises(InputError, match=", ".join(DATASETS)):
        load_dataset("qqq")


def test_missing_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="--data-root or CMD_PLUGIN_DATA"):
        load_dataset("mnist")
    with pytest.raises(InputError, match="nowhere does not exist"):
        load_dataset("mnist", data_root=tmp_path / "nowhere")
    monkeypatch.setenv("CMD_PLUGIN_DATA", str(tmp_path))
    for name, part in (
        ("mnist", "MNIST/raw"),
        ("fashion-mnist", "FashionMNIST/raw"),
        ("cifar10", "cifar-10-batches-py"),
    ):
        with pytest.raises(InputError, match=f"no {name} data in {tmp_path}: expected .*{part}"):
            load_dataset(name)


def write_mnist(folder: Path, train: int = 30, test: int = 12) -> None:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name, count in (("train", train), ("t10k", test)):
        pixels = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = struct.pack(">IIII", 2051, count, 28, 28) + pixels.tobytes()
        (folder / f"{name}-images-idx3-ubyte").write_bytes(images)
        answers = struct.pack(">II", 2049, count) + labels.tobytes()
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(answers)


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")]
)
def test_mnist_layout(tmp_path: Path, name: str, folder: str) -> None:
    write_mnist(tmp_path / folder / "raw")
    data = load_dataset(name, data_root=tmp_path)
    assert (len(data.train), len(data.test)) == (30, 12)  # type: ignore[arg-type]
    assert (data.channels, data.size, len(data.classes)) == (1, (28, 28), 10)
    images, labels = contents(data.train)
    assert labels.tolist() == [i % 10 for i in range(30)]
    assert abs(float(images.mean())) < 1e-4


def test_damaged_mnist(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    write_mnist(raw)
    path = raw / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"mnist files in .* are incomplete or damaged"):
        load_dataset("mnist", data_root=tmp_path)


def test_cifar10_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    sums = {}
    for name in ("data_batch_1", "test_batch", "batches.meta"):
        content: dict[str, object] = {"data": np.full((20, 3072), 9, np.uint8), "labels": [1] * 20}
        if name == "batches.meta":
            content = {"label_names": [f"c{i}" for i in range(10)]}
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    data = load_dataset("cifar10", data_root=tmp_path)
    assert data.name == "cifar10"
    assert contents(data.train)[0].shape == (20, 3, 32, 32)
    assert data.classes[3] == "c3"


def test_truncated_gzip_is_not_taken_for_data(tmp_path: Path) -> None:
    folder = tmp_path / "cifar10-jpeg"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.tar.gz").write_bytes(gzip.compress(b"0" * 2000)[:20])
    with pytest.raises(InputError, match="not a readable tar archive"):
        load_dataset("cifar10", data_root=tmp_path)


def test_statistics_of_each_channel() -> None:
    pixels = torch.randint(0, 256, (50, 3, 5, 7), dtype=torch.uint8)
    pixels[:, 2] = 40
    mean, std = channel_statistics(MemoryImages(pixels), chunk=7)
    real = pixels.double() / 255
    torch.testing.assert_close(mean.double(), real.mean((0, 2, 3)))
    expected = real.std((0, 2, 3), correction=0)
    expected[2] = 1.0  # a constant channel is left unscaled
    torch.testing.assert_close(std.double(), expected)


def test_order_depends_on_seed_and_epoch_only() -> None:
    shuffle = EpochShuffle(50, seed=3)
    first = list(shuffle)
    shuffle.set_epoch(1)
    second = list(shuffle)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    torch.manual_seed(9)
    again = EpochShuffle(50, seed=3)
    again.set_epoch(1)
    assert list(again) == second
    assert list(EpochShuffle(50, seed=4)) != first


def test_loader_batches_and_leaves_the_global_random_state_alone() -> None:
    data = load_dataset("digits", train_limit=65)
    before = torch.get_rng_state()
    training = list(make_loader(data.train, 16, shuffle_seed=1))
    evaluation = list(make_loader(data.train, 16))
    assert torch.equal(before, torch.get_rng_state())
    assert [len(labels) for _, labels in training] == [16, 16, 16, 16]  # BatchNorm and one image
    assert [len(labels) for _, labels in evaluation] == [16, 16, 16, 16, 1]
    assert torch.equal(torch.cat([x for x, _ in evaluation]), contents(data.train)[0])
    assert torch.equal(data.train[7][0], contents(data.train)[0][7])


def test_loader_takes_any_dataset() -> None:
    images, labels = torch.randn(10, 1, 2, 2), torch.arange(10)
    batches = list(make_loader(TensorDataset(images, labels), 4))
    assert torch.equal(torch.cat([x for x, _ in batches]), images)
