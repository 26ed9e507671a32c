"""Networks and pipelines of diffusers, tiny and with random weights, made without a download."""

from __future__ import annotations

import hashlib
from typing import Any

import torch


def unet(channels: int = 1, out: int | None = None, size: int = 8, seed: int = 0) -> Any:
    """A UNet2DModel with attention."""
    from diffusers import UNet2DModel

    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels if out is None else out,
        block_out_channels=(16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def text_unet(seed: int = 0) -> Any:
    """A UNet2DConditionModel on latents [4, 8, 8] with prompts of width 16."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


def autoencoder(seed: int = 0) -> Any:
    """An AutoencoderKL from images [3, 16, 16] to latents [4, 8, 8]."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.18215,
    )


def text_pipeline() -> Any:
    """A StableDiffusionPipeline without a tokenizer."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=7,
        )
    )
    return StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=text,
        tokenizer=None,
        unet=text_unet(),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            steps_offset=1,
            clip_sample=False,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def fingerprint(pipeline: Any) -> str:
    """Everything of a pipeline that a measurement could change."""
    digest = hashlib.sha256()
    for name, part in sorted(pipeline.components.items()):
        digest.update(name.encode())
        if isinstance(part, torch.nn.Module):
            for module in part.modules():
                hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
                digest.update(bytes([module.training, hooks]))
            for key, value in part.state_dict().items():
                digest.update(f"{key} {value.dtype} {value.device}".encode())
                digest.update(value.float().numpy().tobytes())
            digest.update(str([p.grad is None for p in part.parameters()]).encode())
            digest.update(str([p.requires_grad for p in part.parameters()]).encode())
        elif part is not None and hasattr(part, "config"):
            digest.update(repr(sorted(part.config.items())).encode())
            digest.update(part.alphas_cumprod.numpy().tobytes())
            digest.update(str(part.num_inference_steps).encode())
    return digest.hexdigest()
