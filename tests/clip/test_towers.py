"""Towers of all three libraries: raw projections, a model left alone, classifiers refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from cmd_plugin.clip import Preprocessing, image_tower, load_tower, looks_normalised, text_tower
from cmd_plugin.errors import InputError, ShapeError

PIXELS, IDS = torch.randn(3, 3, 32, 32), torch.randint(1, 90, (3, 16))


@pytest.fixture(scope="module")
def open_model() -> Any:
    pytest.importorskip("open_clip")
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=16, image_size=32)
    text = CLIPTextCfg(context_length=16, vocab_size=49408, width=32, heads=2, layers=1)
    return CLIP(24, vision, text)


def sizes(kind: str) -> dict[str, int]:
    common = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    more = {
        "text": {"vocab_size": 99, "max_position_embeddings": 16},
        "vision": {"image_size": 32, "patch_size": 16},
    }
    return {**common, **more[kind]}


@pytest.fixture(scope="module")
def hugging() -> Any:
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    tokens = {"bos_token_id": 97, "eos_token_id": 98, "pad_token_id": 0}
    config = transformers.CLIPConfig(
        text_config={**sizes("text"), **tokens}, vision_config=sizes("vision"), projection_dim=24
    )
    config.text_config.projection_dim = config.vision_config.projection_dim = 24
    torch.manual_seed(0)
    return transformers, config, transformers.CLIPModel(config).eval()


def timm_model(name: str = "vit_base_patch16_clip_quickgelu_224.openai", **options: Any) -> Any:
    import timm

    small = {"embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": 32}
    return timm.create_model(name, **{**small, **options})


def test_open_clip_gives_the_raw_projection(open_model: Any) -> None:
    image, text = image_tower(open_model), text_tower(open_model)
    open_model.eval()
    with torch.no_grad():
        raw = open_model.encode_image(PIXELS), open_model.encode_text(IDS)
        both = open_model(PIXELS, IDS)
    for tower, x, expected, unit in zip((image, text), (PIXELS, IDS), raw, both[:2], strict=True):
        found = tower.encode(x)
        assert torch.equal(found, expected)
        assert not looks_normalised(found)
        assert torch.allclose(normalize(found), unit, atol=1e-6)
        assert looks_normalised(unit)
        assert tower.library == "open_clip"
        assert tower.dtype == torch.float32
    assert torch.equal(text.encode({"input_ids": IDS}), raw[1])


def test_transformers_gives_the_raw_projection(hugging: Any) -> None:
    _, _, model = hugging
    with torch.no_grad():
        both = model(input_ids=IDS, pixel_values=PIXELS)
        raw = model.visual_projection(model.vision_model(PIXELS).pooler_output)
    found = image_tower(model).encode(PIXELS)
    assert torch.allclose(found, raw, atol=1e-6)
    assert torch.allclose(normalize(found), both.image_embeds, atol=1e-6)
    assert not looks_normalised(found)
    texts = text_tower(model).encode(IDS)
    assert torch.allclose(normalize(texts), both.text_embeds, atol=1e-6)
    assert not looks_normalised(texts)


def test_what_transformers_4_returns_is_taken_as_well() -> None:
    class Old(nn.Module):
        """Returns tensors, as version 4 did."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 5)
            self.config = type("Config", (), {"vision_config": None, "image_size": 2})()

        def get_image_features(self, pixel_values: Tensor) -> Tensor:
            return self.layer(pixel_values.flatten(1)[:, :4])

        def get_text_features(self, input_ids: Tensor) -> Tensor:
            return self.layer(input_ids[:, :4].float())

    model = Old()
    model.config.vision_config = model.config
    assert image_tower(model).encode(PIXELS).shape == (3, 5)
    assert text_tower(model).encode(IDS).shape == (3, 5)


def test_towers_of_transformers_with_their_projection(hugging: Any) -> None:
    transformers, config, model = hugging
    vision = transformers.CLIPVisionModelWithProjection(config.vision_config).eval()
    state = {k: v for k, v in model.state_dict().items() if k.startswith("vis")}
    vision.load_state_dict(state)
    assert torch.allclose(
        image_tower(vision).encode(PIXELS), image_tower(model).encode(PIXELS), atol=1e-6
    )
    text = transformers.CLIPTextModelWithProjection(config.text_config).eval()
    state = {k: v for k, v in model.state_dict().items() if k.startswith("text")}
    text.load_state_dict(state)
    assert torch.allclose(text_tower(text).encode(IDS), text_tower(model).encode(IDS), atol=1e-6)
    with pytest.raises(InputError, match="no image tower known here"):
        image_tower(transformers.CLIPVisionModel(config.vision_config))


def test_siglip_has_no_projection_of_its_own() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.SiglipConfig(text_config=sizes("text"), vision_config=sizes("vision"))
    model = transformers.SiglipModel(config).eval()
    tower = image_tower(model)
    with torch.no_grad():
        expected = model.vision_model(PIXELS).pooler_output
    assert torch.allclose(tower.encode(PIXELS), expected, atol=1e-6)
    assert tower.preprocessing == Preprocessing(
        (32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), resize="squash"
    )


def test_timm_gives_the_projection_and_refuses_classifiers() -> None:
    model = timm_model().eval()
    tower = image_tower(model)
    with torch.no_grad():
        expected = model.head(model.forward_head(model.forward_features(PIXELS), pre_logits=True))
    found = tower.encode(PIXELS)
    assert found.shape == (3, 512)
    assert torch.allclose(found, expected, atol=1e-6)
    assert tower.name == "vit_base_patch16_clip_quickgelu_224.openai"
    assert tower.preprocessing is not None
    assert tower.preprocessing.size == (32, 32)
    for name, options in (
        ("vit_base_patch16_clip_224.openai_ft_in1k", {}),
        ("vit_base_patch16_clip_224.laion2b_ft_in12k_in1k", {"num_classes": 512}),
        ("vit_base_patch16_clip_224.openai", {"num_classes": 10}),
        ("vit_base_patch16_224", {}),
    ):
        with pytest.raises(InputError, match="class scores"):
            image_tower(timm_model(name, **options))
    pooled = image_tower(timm_model("vit_base_patch16_224", num_classes=0))
    assert pooled.encode(PIXELS).shape == (3, 32)


def test_the_dtype_of_the_encoder_is_kept(open_model: Any) -> None:
    import copy

    half = copy.deepcopy(open_model).to(torch.bfloat16)
    tower = image_tower(half)
    assert tower.dtype == torch.bfloat16
    assert tower.encode(PIXELS).dtype == torch.bfloat16
    assert tower.encode(PIXELS.double()).dtype == torch.bfloat16


def test_the_model_is_found_as_it_was() -> None:
    class Noisy(nn.Module):
        """Draws random numbers and counts."""

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.drop = nn.BatchNorm2d(3), nn.Dropout(0.5)

        def encode_image(self, x: Tensor) -> Tensor:
            assert not self.training
            return self.drop(self.norm(x)).flatten(1)[:, :5] + torch.rand(())

    model = Noisy().train()
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    found = image_tower(model).encode(PIXELS)
    assert not found.requires_grad
    assert model.training
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_features_that_are_normalised_are_warned_of_once() -> None:
    class Unit(nn.Module):
        """Normalises where nobody can switch it off."""

        def encode_image(self, x: Tensor) -> Tensor:
            return normalize(x.flatten(1)[:, :5])

    tower = image_tower(Unit())
    with pytest.warns(UserWarning, match="all have norm 1"):
        tower.encode(PIXELS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tower.encode(PIXELS)


def test_a_way_of_ones_own_and_what_no_tower_does() -> None:
    model = nn.Linear(5, 4)
    tower = image_tower(model, encode=lambda x: model(x.flatten(1)[:, :5]))
    assert tower.encode(PIXELS).shape == (3, 4)
    assert (tower.library, tower.name) == ("own", "Linear")
    with pytest.raises(InputError, match="pass preprocessing="):
        tower.embed(torch.rand(2, 3, 9, 9))
    for make in (image_tower, text_tower):
        with pytest.raises(InputError, match="known here"):
            make(model)
    flat = image_tower(model, encode=lambda x: x.sum())
    with pytest.raises(ShapeError, match=r"embeddings \[B, d\]"):
        flat.encode(PIXELS)
    with pytest.raises(ShapeError, match="a tensor or a dictionary"):
        tower.encode([PIXELS])
    with pytest.raises(InputError, match="pass tokenizer="):
        text_tower(model, encode=lambda x: x).embed(["a dog"])


def test_images_and_captions_go_in_as_they_are(open_model: Any) -> None:
    import open_clip

    image = image_tower(open_model)
    pixels = Preprocessing((32, 32))
    pictures = [torch.rand(3, 40, 50), torch.rand(1, 32, 32)]
    assert torch.equal(image.embed(pictures), image.encode(pixels(pictures)))
    tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=16)
    text = text_tower(open_model, tokenizer=tokenizer)
    captions = ["a dog", "two dogs"]
    assert torch.equal(text.embed(captions), text.encode(tokenizer(captions)))


def test_captions_through_a_tokenizer_of_transformers(hugging: Any, tmp_path: Path) -> None:
    transformers, _, model = hugging
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[pad]": 0, "a": 1, "dog": 2, "cat": 3, "[eos]": 98}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[pad]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[pad]", eos_token="[eos]"
    )
    tower = text_tower(model, tokenizer=fast)
    batch = tower.prepare(["a dog", "a cat " * 20])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 16)
    assert batch["attention_mask"].sum(dim=1).tolist() == [2, 16]
    found = tower.embed(["a dog", "a cat"])
    assert found.shape == (2, 24)
    model.save_pretrained(tmp_path)
    fast.save_pretrained(tmp_path)
    again = load_tower(f"transformers:{tmp_path}", "text")
    assert torch.equal(again.embed(["a dog", "a cat"]), found)
    image = load_tower(f"transformers:{tmp_path}")
    assert torch.equal(image.encode(PIXELS), image_tower(model).encode(PIXELS))


@pytest.mark.slow
def test_towers_by_name_are_random_by_seed(tmp_path: Path) -> None:
    name = "timm:vit_xsmall_patch16_clip_224.tinyclip_yfcc15m"
    first = load_tower(name, seed=1)
    pictures = [torch.rand(3, 50, 60)]
    random = torch.get_rng_state()
    assert torch.equal(load_tower(name, seed=1).embed(pictures), first.embed(pictures))
    other = load_tower(name, seed=2)
    assert not torch.equal(other.embed(pictures), first.embed(pictures))
    torch.save(first.model.state_dict(), tmp_path / "weights.pt")
    loaded = load_tower(name, weights=str(tmp_path / "weights.pt"))
    assert torch.equal(loaded.embed(pictures), first.embed(pictures))
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("ViT-B-32", {}, "open_clip:NAME"),
        ("open_clip:none", {}, "open_clip has no model"),
        ("open_clip:RN50", {"weights": "nowhere"}, "neither a file nor a tag of RN50"),
        ("timm:none", {}, "timm has no model"),
        ("timm:hf-hub:x/y", {}, "timm has no model"),
        ("timm:resnet18", {"modality": "text"}, "image towers only"),
        ("transformers:nowhere", {}, "cannot load nowhere"),
        ("transformers:nowhere", {"weights": "x"}, "leave weights out"),
        ("nowhere:Net", {}, "no module nowhere"),
        ("timm:resnet18", {"modality": "sound"}, "image or text"),
        ("timm:resnet18", {}, "class scores"),
    ],
)
def test_names_of_nothing_are_refused(name: str, options: dict[str, Any], text: str) -> None:
    pytest.importorskip("open_clip")
    pytest.importorskip("transformers")
    with pytest.raises(InputError, match=text):
        load_tower(name, **options)
