"""UNets and pipelines of diffusers against calls of theirs written out, and what is refused."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cmd_plugin.diffusion import (
    LatentCodec,
    ManifoldBiasDetector,
    MemorizationScore,
    ScoreModel,
    clip_embedding,
    codec_of,
    lid_flipd,
    p_laplace,
)
from cmd_plugin.diffusion.diffusers_models import schedule_of
from cmd_plugin.diffusion.references import vector_jacobian
from cmd_plugin.errors import InputError, ShapeError
from tests.helpers.tiny_diffusers import autoencoder, fingerprint, text_pipeline, text_unet, unet

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def pixel_unet() -> Any:
    return unet().eval()


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return text_pipeline()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_a_ddpm_pipeline_is_its_unet_at_the_times_of_its_scheduler(pixel_unet: Any) -> None:
    scheduler = diffusers.DDPMScheduler()
    pipe = diffusers.DDPMPipeline(unet=pixel_unet, scheduler=scheduler)
    model = ScoreModel.from_diffusers(pipe)
    assert model.shape == (1, 8, 8)
    clean, noise = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    t = torch.tensor([50, 400])
    x = scheduler.add_noise(clean, noise, t)
    with torch.no_grad():
        expected = pixel_unet(x, t).sample
    found = model.noise(x, t.double())
    torch.testing.assert_close(found, expected)
    a, s = model.schedule.level(400)
    torch.testing.assert_close(x[1], a * clean[1] + s * noise[1], rtol=1e-5, atol=1e-6)


def test_prediction_types_are_read_from_the_scheduler(pixel_unet: Any) -> None:
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([100.0, 100.0])
    with torch.no_grad():
        m = pixel_unet(x, t.long()).sample
    for kind in ("epsilon", "v_prediction", "sample"):
        scheduler = diffusers.DDIMScheduler(prediction_type=kind)
        model = ScoreModel.from_diffusers(pixel_unet, scheduler)
        a, s = model.schedule.level(100)
        expected = {"epsilon": m, "v_prediction": a * m + s * x, "sample": (x - a * m) / s}[kind]
        torch.testing.assert_close(model.noise(x, t), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_edm_preconditioning_is_that_of_diffusers(pixel_unet: Any, kind: str) -> None:
    scheduler = diffusers.EDMEulerScheduler(prediction_type=kind)
    model = ScoreModel.from_diffusers(pixel_unet, scheduler)
    sigma = torch.tensor([0.7])
    y = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        raw = pixel_unet(
            scheduler.precondition_inputs(y, sigma), scheduler.precondition_noise(sigma)
        ).sample
    clean = scheduler.precondition_outputs(y, raw, sigma)
    size = float((1 + sigma**2).sqrt())
    found = model.noise(y / size, sigma.double())
    torch.testing.assert_close(found, (y - clean) / sigma, rtol=1e-4, atol=1e-5)


def test_flow_matching_takes_the_share_of_noise_as_its_time(pixel_unet: Any) -> None:
    model = ScoreModel.from_diffusers(pixel_unet, diffusers.FlowMatchEulerDiscreteScheduler())
    tau = 0.3
    y = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        velocity = pixel_unet(y, torch.tensor([tau * 1000])).sample
    size = (tau**2 + (1 - tau) ** 2) ** 0.5
    found = model.noise(y / size, torch.tensor([tau]))
    torch.testing.assert_close(found, y + (1 - tau) * velocity, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of their own use of numpy
@pytest.mark.parametrize(
    "name",
    [
        "PNDMScheduler",
        "DPMSolverMultistepScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_every_usual_scheduler_has_the_same_levels(name: str) -> None:
    options = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    schedule, prediction = schedule_of(getattr(diffusers, name)(**options))
    assert prediction == "epsilon"
    assert schedule.level(10)[0] ** 2 == pytest.approx(0.99043, abs=1e-5)


def test_learned_variances_are_dropped_only_when_asked() -> None:
    both = unet(out=2)
    with pytest.raises(ShapeError, match="split_variance"):
        ScoreModel.from_diffusers(both, diffusers.DDPMScheduler())
    model = ScoreModel.from_diffusers(both, diffusers.DDPMScheduler(), split_variance=True)
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([5.0])
    with model.measuring():
        torch.testing.assert_close(model.noise(x, t), both(x, t.long()).sample[:, :1])
    with pytest.raises(ShapeError, match="3 channels"):
        ScoreModel.from_diffusers(unet(out=3), diffusers.DDPMScheduler())


def test_what_is_unknown_is_refused(pixel_unet: Any) -> None:
    with pytest.raises(InputError, match="no scheduler"):
        ScoreModel.from_diffusers(pixel_unet)
    scheduler = diffusers.DDPMScheduler()
    with pytest.raises(InputError, match="neither a UNet"):
        ScoreModel.from_diffusers(torch.nn.Linear(2, 2), scheduler)
    odd = SimpleNamespace(config={"prediction_type": "noise"}, alphas_cumprod=torch.tensor([0.5]))
    with pytest.raises(InputError, match="'noise'"):
        ScoreModel.from_diffusers(pixel_unet, odd)
    bare = SimpleNamespace(config={"prediction_type": "epsilon"})
    with pytest.raises(InputError, match="no alphas_cumprod"):
        ScoreModel.from_diffusers(pixel_unet, bare)
    with pytest.raises(InputError, match="takes no condition"):
        ScoreModel.from_diffusers(pixel_unet, scheduler, condition=torch.zeros(1))
    with pytest.raises(InputError, match="is conditional"):
        ScoreModel.from_diffusers(text_unet(), scheduler)
    with pytest.raises(ShapeError, match=r"resize"):
        p_laplace(ScoreModel.from_diffusers(pixel_unet, scheduler), torch.zeros(1, 1, 9, 9), 5)


def test_a_text_pipeline_is_its_unet_under_each_prompt(pipeline: Any) -> None:
    prompts, empty = torch.randn(2, 7, 16), torch.randn(1, 7, 16)
    model = ScoreModel.from_diffusers(
        pipeline, condition=prompts[:1], unconditional=empty, mode="gap"
    )
    assert model.shape == (4, 8, 8)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([10, 700])
    with model.measuring():
        conditional = pipeline.unet(x, t, encoder_hidden_states=prompts).sample
        nothing = pipeline.unet(x, t, encoder_hidden_states=empty.expand(2, -1, -1)).sample
        found = model.noise(x, t.double(), prompts)
    torch.testing.assert_close(found, conditional - nothing, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="tokenizer"):
        ScoreModel.from_diffusers(pipeline, condition="a prompt")


def test_prompts_are_encoded_once_by_the_pipelines_own_parts(pipeline: Any) -> None:
    calls: list[list[str]] = []

    class Tokenizer:
        model_max_length = 7

        def __call__(self, prompts: list[str], **_: object) -> Any:
            calls.append(prompts)
            ids = torch.tensor([[len(prompt)] * 7 for prompt in prompts])
            return SimpleNamespace(input_ids=ids)

    parts = SimpleNamespace(
        unet=pipeline.unet,
        scheduler=pipeline.scheduler,
        text_encoder=pipeline.text_encoder,
        tokenizer=Tokenizer(),
    )
    model = ScoreModel.from_diffusers(parts, condition=["a", "bb"])
    p_laplace(model, torch.randn(2, 4, 8, 8), (10, 50), condition=model.condition, directions=4)
    assert calls == [[""], ["a", "bb"]]
    assert model.condition is not None
    with torch.no_grad():
        expected = pipeline.text_encoder(torch.tensor([[1] * 7, [2] * 7]))[0]
    torch.testing.assert_close(model.condition, expected)


@pytest.mark.usefixtures("no_network")
def test_nothing_of_a_pipeline_changes_and_nothing_is_downloaded(pipeline: Any) -> None:
    pipeline.unet.train()
    before = fingerprint(pipeline)
    random = torch.get_rng_state()
    model = ScoreModel.from_diffusers(
        pipeline,
        condition=torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(0)),
        unconditional=torch.zeros(1, 7, 16),
        mode="gap",
    )
    codec = codec_of(pipeline)
    assert isinstance(codec, LatentCodec)
    latents = codec.encode(torch.zeros(2, 3, 16, 16))
    p_laplace(model, latents, 10, directions=4)
    lid_flipd(model, latents[:1], 10, trace="hutchinson", probes=2)
    codec.decode(latents)
    assert fingerprint(pipeline) == before
    assert torch.equal(random, torch.get_rng_state())
    pipeline.unet.eval()


def test_latents_are_the_scaled_mean_of_the_encoder(pipeline: Any) -> None:
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    codec = LatentCodec(pipeline.vae, batch_size=2)
    with torch.no_grad():
        expected = pipeline.vae.encode(images).latent_dist.mode() * 0.18215
        back = pipeline.vae.decode(expected / 0.18215).sample
    torch.testing.assert_close(codec.encode(images), expected)
    torch.testing.assert_close(codec.decode(expected), back, rtol=1e-4, atol=1e-5)
    with pytest.raises(ShapeError, match="3 channels"):
        codec.encode(images[:, :1])
    with pytest.raises(InputError, match=r"\[-1, 1\]"):
        codec.encode(images * 3)
    with pytest.raises(ShapeError, match="floating"):
        codec.encode((images * 100).byte())


@pytest.mark.usefixtures("no_network")
def test_the_whole_path_of_both_papers_runs_on_a_text_pipeline(pipeline: Any) -> None:
    """Latents, captions, decoded estimates, CLIP embeddings; a gap, and every control."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    tower = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
            projection_dim=10,
        )
    )
    before = fingerprint(pipeline)
    captions, nothing = torch.randn(2, 7, 16), torch.zeros(1, 7, 16)
    model = ScoreModel.from_diffusers(pipeline, condition=nothing, unconditional=nothing)
    codec = codec_of(pipeline)
    detector = ManifoldBiasDetector(
        model, parity="authors", codec=codec, embed=clip_embedding(tower), size=16
    )
    images = torch.rand(2, 3, 24, 20) * 2 - 1
    found = detector.terms(images, captions)
    assert all(bool(values.isfinite().all()) for values in found.scores().values())
    assert bool((found.bias.abs() <= 1).all())
    assert torch.equal(detector.terms(images, captions).criterion, found.criterion)
    moved = detector.terms(images, captions.flip(0))
    assert not torch.equal(moved.criterion, found.criterion)
    score = MemorizationScore(model.with_mode("gap"), (10, 50), directions=4, codec=codec)
    report = score(torch.rand(2, 3, 16, 16) * 2 - 1, captions)
    assert set(report.values) == {
        *("p1", "p2", "mse", "centre_norm", "gap_norm", "sharpness", "flipd")
    }
    assert fingerprint(pipeline) == before


def test_a_network_in_half_precision_or_under_autocast_agrees(pixel_unet: Any) -> None:
    scheduler = diffusers.DDPMScheduler()
    images = torch.rand(3, 1, 8, 8) * 2 - 1
    full = p_laplace(ScoreModel.from_diffusers(pixel_unet, scheduler), images, 100)
    half = ScoreModel.from_diffusers(unet().eval().bfloat16(), scheduler)
    cast = ScoreModel.from_diffusers(pixel_unet, scheduler, autocast=torch.bfloat16)
    for other in (half, cast):
        found = p_laplace(other, images, 100)
        assert float((found.value - full.value)[..., 0].abs().max()) < 0.01


def test_backward_products_of_a_unet_are_finite_differences(pixel_unet: Any) -> None:
    model = ScoreModel.from_diffusers(pixel_unet, diffusers.DDPMScheduler())
    x, u, v = (torch.randn(1, 1, 8, 8) for _ in range(3))
    t = torch.tensor([200.0])
    _, product = vector_jacobian(model, x, t, u)

    def along(x: Tensor) -> Tensor:
        with model.measuring():
            return (u * model.noise(x, t)).double().sum()

    slope = (along(x + 1e-2 * v) - along(x - 1e-2 * v)) / 2e-2
    assert float((product * v).sum()) == pytest.approx(float(slope), rel=5e-3, abs=5e-4)


@pytest.mark.usefixtures("no_network")
def test_a_saved_pipeline_is_read_again(pixel_unet: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    diffusers.DDPMPipeline(pixel_unet, diffusers.DDPMScheduler()).save_pretrained(folder)
    model = ScoreModel.from_folder(folder)
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([7.0])
    direct = ScoreModel.from_diffusers(pixel_unet, diffusers.DDPMScheduler())
    with model.measuring(), direct.measuring():
        torch.testing.assert_close(model.noise(x, t), direct.noise(x, t))

    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "unet": ["mine", "Net"]}))
    with pytest.raises(InputError, match="own class for unet"):
        ScoreModel.from_folder(folder)
    (folder / "model_index.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        ScoreModel.from_folder(folder)
    del index["scheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="no scheduler"):
        ScoreModel.from_folder(folder)
    with pytest.raises(InputError, match=r"no model_index\.json"):
        ScoreModel.from_folder(tmp_path)


def test_a_folder_with_damaged_weights_is_refused(pixel_unet: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    diffusers.DDPMPipeline(pixel_unet, diffusers.DDPMScheduler()).save_pretrained(folder)
    weights = next((folder / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError, match="cannot be read"):
        ScoreModel.from_folder(folder)


def test_an_autoencoder_alone_makes_a_codec() -> None:
    assert codec_of(SimpleNamespace(vae=autoencoder())).scale == 0.18215
    assert codec_of(SimpleNamespace(vae=None)).scale == 1.0
