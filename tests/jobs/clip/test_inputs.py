"""Embeddings on disk: every layout gives the same rows, and what is none is a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cmd_plugin.errors import InputError, ShapeError
from cmd_plugin.jobs.clip.inputs import open_embeddings, write_about
from cmd_plugin.jobs.clip.options import shard_of


@pytest.mark.parametrize("kind", ["<f2", "<f4", "<f8", ">f4", ">f8", "columns"])
def test_any_float_array_is_read(rows: np.ndarray, tmp_path: Path, kind: str) -> None:
    stored = np.asfortranarray(rows) if kind == "columns" else rows.astype(kind)
    np.save(tmp_path / "x.npy", stored)
    found = open_embeddings(tmp_path / "x.npy").single(None)
    assert (len(found), found.dimension) == rows.shape
    assert found.all().dtype == (torch.float64 if kind.endswith("8") else torch.float32)
    assert np.array_equal(found.all().numpy(), stored.astype(found.all().numpy().dtype))
    pieces = list(found.pieces(100))
    assert [len(piece) for piece in pieces] == [100, 100, 40]
    assert torch.equal(torch.cat(pieces), found.all())


@pytest.mark.parametrize(
    ("tensors", "parts"),
    [
        ({"anything": (5, 4)}, 1),
        ({"embeddings": (5, 4), "labels": (5,)}, 1),
        ({"image": (5, 4), "text": (5, 4), "labels": (5,)}, 2),
        ({"image_embeds": (5, 4), "text_embeds": (5, 4)}, 2),
        ({"pairs": (2, 5, 4)}, 2),
    ],
)
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_safetensors_are_read(
    tmp_path: Path, tensors: dict[str, tuple[int, ...]], parts: int, kind: torch.dtype
) -> None:
    values = {name: torch.randn(shape).to(kind) for name, shape in tensors.items()}
    save_file(values, tmp_path / "x.safetensors")
    file = open_embeddings(tmp_path / "x.safetensors")
    wanted = [value for value in values.values() if value.ndim > 1]
    wanted = list(wanted[0]) if wanted[0].ndim == 3 else wanted
    assert len(file.parts) == parts
    for found, value in zip(file.parts, wanted, strict=True):
        assert torch.equal(found.all(), value.to(found.all().dtype))
        assert torch.equal(found.between(1, 4).read(1, 2), value[2:3].to(found.all().dtype))


def test_pairs_are_images_then_texts(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
    np.save(tmp_path / "pairs.npy", values)
    file = open_embeddings(tmp_path / "pairs.npy")
    for rows, value, name in zip(file.pair(), values, ("image", "text"), strict=True):
        assert rows.modality == name
        assert np.array_equal(rows.all().numpy(), value)
        assert np.array_equal(file.single(name).all().numpy(), value)
    with pytest.raises(InputError, match="no distribution in common: choose one by --modality"):
        file.single(None)


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "large.npy"
    with path.open("wb") as stream:  # 400 GB, of which a sparse file holds nothing
        about = {"descr": "<f4", "fortran_order": False, "shape": (100_000_000, 1000)}
        np.lib.format.write_array_header_1_0(stream, about)
        stream.truncate(stream.tell() + 400_000_000_000)
    found = open_embeddings(path).single(None)
    assert len(found) == 100_000_000
    assert not found.read(99_999_990, 99_999_999).any()


def test_names_come_along_with_the_rows(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((3, 4), np.float32))
    assert open_embeddings(tmp_path / "x.npy").single(None).name_of(2) == "2"
    write_about(tmp_path / "x.json", {"image": ["a.png", "b.png", "c.png"]}, {"encoder": "mine"})
    found = open_embeddings(tmp_path / "x.npy").single(None)
    assert (found.modality, found.name_of(1), found.about) == (
        "image",
        "b.png",
        {"encoder": "mine"},
    )
    assert found.between(1, 3).names == ("b.png", "c.png")
    assert found.between(1, 3).first == 1
    with pytest.raises(InputError, match=r"embeddings of images, not of texts: leave out"):
        open_embeddings(tmp_path / "x.npy").single("text")
    np.save(tmp_path / "x.npy", np.ones((4, 4), np.float32))
    with pytest.raises(InputError, match=r"x\.json does not belong to .*x\.npy"):
        open_embeddings(tmp_path / "x.npy")


@pytest.mark.parametrize("content", ["[1, 2]", '{"schema": "other"}', "no json", '{"a": 1}'])
def test_a_file_of_somebody_elses_beside_it_is_left_alone(tmp_path: Path, content: str) -> None:
    np.save(tmp_path / "x.npy", np.ones((3, 4), np.float32))
    (tmp_path / "x.json").write_text(content)
    assert open_embeddings(tmp_path / "x.npy").single(None).names is None


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (np.ones((3, 4), int), r"holds values of type int64: embeddings are floats"),
        (np.ones((3, 4), complex), "holds values of type complex128"),
        (np.ones(4), r"an array of shape \[4\]: embeddings are \[N, d\], pairs \[2, N, d\]"),
        (np.ones((3, 4, 5)), r"an array of shape \[3, 4, 5\]"),
        (np.ones((3, 1)), "holds 3 rows of 1 values"),
        (np.array([{}]), "is not a readable .npy file"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, array: Any, sentence: str) -> None:
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(InputError, match=sentence):
        open_embeddings(tmp_path / "x.npy")


def test_damaged_files_are_sentences(rows: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", rows)
    save_file({"x": torch.from_numpy(rows)}, tmp_path / "x.safetensors")
    for path in (tmp_path / "x.npy", tmp_path / "x.safetensors"):
        whole = path.read_bytes()
        for part in (b"", whole[:20], whole[:-7], b"\0" * 200):
            path.write_bytes(part)
            with pytest.raises(InputError, match=r"is not a readable|holds 0 rows"):
                open_embeddings(path)
    np.savez(tmp_path / "z.npz", rows)
    (tmp_path / "z.npz").rename(tmp_path / "z.npy")
    with pytest.raises(InputError, match="is an archive of arrays"):
        open_embeddings(tmp_path / "z.npy")
    with pytest.raises(InputError, match="there is no file"):
        open_embeddings(tmp_path / "nowhere.npy")


def test_other_safetensors_are_refused(tmp_path: Path) -> None:
    for tensors, sentence in (
        ({"a": torch.ones(3, 4), "b": torch.ones(3, 4)}, "holds the tensors a, b: embeddings are"),
        ({"a": torch.ones(3, 4).int()}, "embeddings are floats"),
        ({"image": torch.ones(3, 4), "text": torch.ones(4, 4)}, "3 images of 4 values and 4 texts"),
        ({"image": torch.ones(3), "text": torch.ones(3)}, r"an array of shape \[3\]"),
    ):
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(InputError, match=sentence):
            open_embeddings(tmp_path / "x.safetensors")
    save_file({"a": torch.ones(2, 2, 2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(ShapeError, match="embeddings are"):
        open_embeddings(tmp_path / "x.safetensors")


def test_shards_are_written_as_parts_of_a_whole() -> None:
    assert shard_of("2/8") == (2, 8)
    for text in ("0/2", "3/2", "2", "a/b", "1/0", "-1/2", "1/2/3"):
        with pytest.raises(InputError, match="--shard is written NUMBER/COUNT"):
            shard_of(text)


def test_what_is_written_beside_embeddings_is_json(tmp_path: Path) -> None:
    write_about(tmp_path / "x.json", {"text": ["ä cat"]}, {})
    content = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert content == {
        "schema": "cmd-plugin/embeddings/1",
        "about": {},
        "names": {"text": ["ä cat"]},
    }
