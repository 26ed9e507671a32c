"""Images and captions become embeddings once, in order, and what cannot be read is listed."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cmd_plugin.clip import Preprocessing
from cmd_plugin.clip.towers import Tower
from cmd_plugin.errors import InputError, NonFiniteError
from cmd_plugin.jobs.clip import fit, score
from cmd_plugin.jobs.clip.inputs import open_embeddings
from cmd_plugin.jobs.clip.options import FitOptions, ScoreOptions
from cmd_plugin.networks import load_weights
from cmd_plugin.networks.weights import save_weights
from tests.helpers.clip_encoder import SIDE, SmallPair
from tests.helpers.image_files import noise, to_folder, to_tar

MODEL = "tests.helpers.clip_encoder:SmallPair"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Weights of the small network."""
    torch.manual_seed(5)
    save_weights(tmp_path / "small.safetensors", SmallPair().state_dict())
    return tmp_path / "small.safetensors"


def options(path: Path, weights: Path | None = None, **more: Any) -> FitOptions:
    return FitOptions(
        **{
            "input": path,
            "model": MODEL,
            "weights": weights,
            "batch_size": 4,
            "workers": 0,
            "shrinkage": "0.1",  # without a word on how few rows there are
            **more,
        }
    )


def by_hand(folder: Path, names: tuple[str, ...], weights: Path) -> torch.Tensor:
    """Embeddings of images, one at a time."""
    network = SmallPair()
    load_weights(network, weights)
    prepare = Preprocessing(size=(SIDE, SIDE))
    with torch.no_grad():
        return torch.cat(
            [network.encode_image(prepare([Image.open(folder / name)])) for name in names]
        )


def test_images_are_encoded_in_the_order_of_their_names(
    photos: Path, weights: Path, tmp_path: Path
) -> None:
    result = fit.run(options(photos, weights), tmp_path / "out")
    rows = open_embeddings(tmp_path / "out/embeddings.npy").single(None)
    assert rows.names is not None
    assert rows.names[:3] == ("0.png", "1.png", "2.png")
    assert rows.names[-1] == "more/19.jpg"
    assert (rows.modality, len(rows), rows.dimension) == ("image", 50, 8)
    torch.testing.assert_close(rows.all(), by_hand(photos, rows.names, weights))
    assert result.data["left_out"] == 2
    with (tmp_path / "out/left_out.csv").open(encoding="utf-8") as stream:
        listed = {row["file"]: row["reason"] for row in csv.DictReader(stream)}
    assert set(listed) == {"broken.png", "more/cut.png"}
    assert "not a readable image" in listed["broken.png"]
    assert rows.about is not None
    assert rows.about["weights"].startswith("sha256 ")
    assert rows.about["encoder_dtype"] == "float32"


def test_worker_processes_shards_and_archives_give_the_same_rows(
    photos: Path, weights: Path, tmp_path: Path
) -> None:
    fit.run(options(photos, weights), tmp_path / "whole")
    whole = np.load(tmp_path / "whole/embeddings.npy")
    fit.run(options(photos, weights, workers=2, threads=1), tmp_path / "workers")
    assert np.array_equal(np.load(tmp_path / "workers/embeddings.npy"), whole)
    for number in (1, 2, 3):
        fit.run(options(photos, weights, shard=f"{number}/3"), tmp_path / f"shard{number}")
    shards = [np.load(tmp_path / f"shard{number}/embeddings.npy") for number in (1, 2, 3)]
    np.testing.assert_allclose(np.concatenate(shards), whole, rtol=1e-5, atol=1e-6)
    files = {p.relative_to(photos).as_posix(): p.read_bytes() for p in photos.rglob("*.*")}
    packed = to_tar(tmp_path / "photos.tar", files, "w")
    fit.run(options(packed, weights), tmp_path / "packed")
    assert np.array_equal(np.load(tmp_path / "packed/embeddings.npy"), whole)


def test_a_stopped_encoding_goes_on_where_it_was(
    photos: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cmd_plugin.jobs.clip.encode._PART_BATCHES", 2)
    fit.run(options(photos, weights), tmp_path / "whole")
    calls: list[int] = []
    encode = Tower.encode

    def counted(tower: Tower, x: Any) -> torch.Tensor:
        calls.append(len(x))
        if sum(calls) > 30:
            raise KeyboardInterrupt
        return encode(tower, x)

    with monkeypatch.context() as patch:
        patch.setattr(Tower, "encode", counted)
        with pytest.raises(KeyboardInterrupt):
            fit.run(options(photos, weights), tmp_path / "out")
        assert len(list((tmp_path / "out/unfinished/state").glob("*.safetensors"))) == 3
        calls.clear()
        fit.run(options(photos, weights, workers=1), tmp_path / "out", resume=True)
        assert sum(calls) == 50 - 3 * 8
    for name in ("embeddings.npy", "embeddings.json", "left_out.csv", "whitening.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_captions_are_encoded_line_by_line(weights: Path, tmp_path: Path) -> None:
    words = ("cat", "dog", "red", "blue", "big", "old", "sun", "sea", "tree", "zebra", "fox", "jay")
    texts = [f"a {one} {two}" for one in words for two in words]
    (tmp_path / "texts.txt").write_text("\n".join([*texts[:5], "", *texts[5:]]) + "\n\n")
    result = fit.run(options(tmp_path / "texts.txt", weights), tmp_path / "out")
    rows = open_embeddings(tmp_path / "out/embeddings.npy").single(None)
    assert rows.names == tuple(texts)
    assert (rows.modality, result.data["kind"], result.data["left_out"]) == ("text", "texts", 1)
    assert "caption 6,is empty" in (tmp_path / "out/left_out.csv").read_text()
    network = SmallPair()
    load_weights(network, weights)
    with torch.no_grad():
        expected = network.encode_text(network.tokenizer(texts))
    torch.testing.assert_close(rows.all(), expected)
    # Encoded rows score without the encoder, under their names.
    score.run(
        ScoreOptions(input=tmp_path / "out/embeddings.npy", whitening=tmp_path / "out"),
        tmp_path / "scores",
    )
    with (tmp_path / "scores/scores.csv").open(encoding="utf-8") as stream:
        assert [row["name"] for row in csv.DictReader(stream)] == texts


def test_images_with_captions_are_pairs_and_lose_both_sides_together(
    photos: Path, weights: Path, tmp_path: Path
) -> None:
    from cmd_plugin.jobs.clip import align
    from cmd_plugin.jobs.clip.options import AlignOptions

    # Fifty-one headers can be read, one of them of an image whose pixels are cut off.
    lines = [f"picture {'abcdefghij'[n % 10] * (n + 1)}" for n in range(51)]
    (tmp_path / "c.txt").write_text("\n".join(lines), encoding="utf-8")
    align.run(
        AlignOptions(
            input=photos,
            captions=tmp_path / "c.txt",
            model=MODEL,
            weights=weights,
            batch_size=8,
            workers=0,
        ),
        tmp_path / "out",
    )
    images, texts = open_embeddings(tmp_path / "out/embeddings.npy").pair()
    assert images.names is not None
    assert texts.names is not None
    assert len(images) == len(texts) == 50
    headers = sorted([*images.names, "more/cut.png"], key=lambda n: [n == "more/cut.png", n])
    assert "more/cut.png" not in images.names
    assert set(lines) - set(texts.names) == {lines[50]}  # the last by name
    assert len(headers) == 51
    for name in ("centred", "whitened"):
        assert open_embeddings(tmp_path / f"out/{name}.npy").pair()[1].names == texts.names
    (tmp_path / "c.txt").write_text("\n".join(lines[:-1]), encoding="utf-8")
    with pytest.raises(InputError, match=r"has 50 lines, and .* has 51 images"):
        align.run(
            AlignOptions(
                input=photos, captions=tmp_path / "c.txt", model=MODEL, weights=weights, workers=0
            )
        )


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"model": None, "weights": None}, "an encoder has to turn into embeddings: give --model"),
        ({"weights": None}, "is a network without weights: give a file of them by --weights, or"),
        ({"weights": Path("nowhere.pt")}, "there is no file --weights nowhere.pt"),
        ({"model": "nothing:Here"}, "there is no module nothing"),
        ({"model": "ViT"}, "names no tower"),
        ({"model": "transformers:nowhere", "weights": None}, "there is no folder nowhere"),
    ],
)
def test_an_encoder_that_cannot_be_had_is_a_sentence(
    photos: Path, weights: Path, tmp_path: Path, more: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        fit.run(options(photos, **{"weights": weights, **more}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_random_weights_are_taken_only_when_asked_for_and_leave_the_random_state(
    photos: Path, tmp_path: Path
) -> None:
    before = torch.get_rng_state()
    result = fit.run(options(photos, None, untrained=True, seed=3), tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), before)
    assert result.data["weights"] == "random, seed 3"
    for more, sentence in (
        ({"untrained": True}, "--weights and --untrained name two kinds of weights"),
        ({"model": None}, "--weights has an effect only with --model"),
    ):
        with pytest.raises(InputError, match=sentence):
            options(photos, Path("w.pt"), **more)


def test_an_encoder_that_gives_no_numbers_is_refused(photos: Path, tmp_path: Path) -> None:
    broken = options(
        photos, None, untrained=True, model="tests.helpers.clip_encoder:NotFinite", batch_size=64
    )
    with pytest.raises(NonFiniteError, match="NaN or infinite values for 50 of 50 inputs"):
        fit.run(broken, tmp_path / "out")


def test_what_is_no_input_is_a_sentence(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b")
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "none").mkdir()
    bad = to_folder(tmp_path / "bad", {"a.png": noise(0, size=(40, 40))[:800]})
    for path, sentence in (
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "x.csv", "is no input of these commands"),
        (tmp_path / "empty.txt", "holds no captions"),
        (tmp_path / "latin.txt", "cannot be read .*: give a text file in UTF-8"),
        (tmp_path / "none", "holds no images: check the path"),
        (bad, r"nothing in .* could be read \(a.png is not a readable image"),
    ):
        with pytest.raises(InputError, match=sentence):
            fit.run(options(path, weights))


def test_embeddings_need_no_encoder(saved: Path, weights: Path) -> None:
    with pytest.raises(InputError, match="need no encoder: leave out --model"):
        fit.run(options(saved, weights))
    with pytest.raises(InputError, match="has 240 rows, too few for 300 shards"):
        fit.run(FitOptions(input=saved, shard="1/300"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as open_clip saves one, and as transformers does."""
    out = tmp_path_factory.mktemp("models")
    open_clip = pytest.importorskip("open_clip")
    transformers = pytest.importorskip("transformers")
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(0)
    model = open_clip.CLIP(8, vision, text)
    (out / "open_clip").mkdir()
    save_weights(out / "open_clip/open_clip_model.safetensors", model.state_dict())
    (out / "open_clip/open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {}})
    )
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "projection_dim": 8}
    hf = transformers.CLIPConfig(
        text_config=small,
        vision_config={**small, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    transformers.CLIPModel(hf).save_pretrained(out / "transformers")
    return out


@pytest.mark.parametrize("library", ["open_clip", "transformers"])
@pytest.mark.filterwarnings("ignore")  # of libraries whose releases nobody here decides
def test_a_saved_model_is_an_encoder(
    photos: Path, folders: Path, tmp_path: Path, library: str
) -> None:
    given = options(photos, None, model=str(folders / library), batch_size=64)
    result = fit.run(given, tmp_path / "out")
    assert (result.data["dimension"], result.data["weights"]) == (8, "of its folder")
    assert result.data["preprocessing"].startswith("32x32 bicubic")
    with pytest.raises(InputError, match="holds its own weights"):
        fit.run(options(photos, None, model=str(folders / library), untrained=True))


def test_a_model_is_built_without_the_network(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub.constants")
    before = hub.HF_HUB_OFFLINE

    def build(*_: Any, **__: Any) -> None:
        assert hub.HF_HUB_OFFLINE
        raise OSError("no connection")

    monkeypatch.setattr("cmd_plugin.jobs.clip.encoder.load_tower", build)
    with pytest.raises(InputError, match=r"cannot be built from what is on this machine \(no conn"):
        fit.run(options(photos, untrained=True, model="open_clip:roberta-ViT-B-32"))
    assert before == hub.HF_HUB_OFFLINE


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_folder_is_a_sentence(photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    pytest.importorskip("transformers")
    (tmp_path / "m").mkdir()
    (tmp_path / "m/open_clip_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"open_clip cannot load .*: check the folder"):
        fit.run(options(photos, None, model=str(tmp_path / "m")))
    (tmp_path / "m/open_clip_config.json").rename(tmp_path / "m/config.json")
    with pytest.raises(InputError, match=r"transformers cannot load .*: check the folder"):
        fit.run(options(photos, None, model=str(tmp_path / "m")))
