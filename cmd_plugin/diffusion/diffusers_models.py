"""Networks and pipelines of diffusers as score models; nothing of theirs is ever changed.

They are used by their attributes alone, so this module imports diffusers only to read a folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmd_plugin.diffusion.schedules import NoiseSchedule
from cmd_plugin.diffusion.score_model import Mode, ScoreModel
from cmd_plugin.errors import InputError, ShapeError, require
from cmd_plugin.networks import undisturbed

__all__ = ["encode_prompts", "read_diffusers", "schedule_of", "wrap_diffusers"]

_INDEX = "model_index.json"
_NATIVE = {
    "epsilon": "epsilon",
    "sample": "sample",
    "v_prediction": "v_prediction",
    "flow_prediction": "flow",
}


def read_diffusers(folder: str | Path) -> Any:
    """Read a pipeline from a local folder; nothing is downloaded, no code in it is run.

    Args:
        folder: What ``pipeline.save_pretrained`` wrote, with weights in safetensors.

    Raises:
        InputError: If it is no such folder, lacks a scheduler, is damaged, or brings classes of its
            own.
        MissingDependency: If diffusers is not installed.
    """
    folder = Path(folder)
    path = folder / _INDEX
    if not path.is_file():
        raise InputError(
            f"{folder} is no pipeline of diffusers (it has no {_INDEX}): give a folder that "
            "save_pretrained of a pipeline wrote."
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        parts = {name: part for name, part in index.items() if not name.startswith("_")}
        own = [
            name
            for name, part in parts.items()
            if isinstance(part, list) and part[0] not in ("diffusers", "transformers", None)
        ]
        own += [] if isinstance(index["_class_name"], str) else ["pipeline"]
    except (OSError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error}): copy the folder again.") from error
    if own:
        raise InputError(f"{folder} brings its own class for {own[0]}, and no code in it is run.")
    if (parts.get("scheduler") or [None])[0] is None or not (folder / "scheduler").is_dir():
        raise InputError(
            f"{folder} has no scheduler, so it is not known how much noise a time means: save the "
            "whole pipeline."
        )
    # What only filters finished pictures is not needed, and large.
    skipped = {n: None for n in ("safety_checker", "feature_extractor") if n in parts}
    pipelines = require("diffusers", "diffusion")
    try:
        return pipelines.DiffusionPipeline.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, **skipped
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"the pipeline in {folder} cannot be read ({reason}).") from error


def schedule_of(scheduler: Any) -> tuple[NoiseSchedule, str]:
    """Return what a scheduler of diffusers says about times, and its prediction type.

    Raises:
        InputError: If there is none, or it is of a kind that is not known here.
    """
    if scheduler is None:
        raise InputError(
            "there is no scheduler, so it is not known how much noise a time means: pass the one "
            "the network was trained with."
        )
    config, kind = scheduler.config, type(scheduler).__name__
    given = config.get("prediction_type")
    if config.get("use_flow_sigmas") or kind.startswith("FlowMatch"):
        if given not in (None, "flow_prediction"):
            raise InputError(f"unknown prediction type {given!r} of {kind}.")
        return NoiseSchedule("flow"), "flow"
    if config.get("sigma_data") is not None and hasattr(scheduler, "precondition_outputs"):
        if given not in ("epsilon", "v_prediction"):
            raise InputError(f"unknown prediction type {given!r} of {kind}.")
        return NoiseSchedule("sigma"), str(given)
    table = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(table, Tensor):
        raise InputError(
            f"{kind} has no alphas_cumprod, and is neither an EDM nor a flow matching scheduler: "
            "build a ScoreModel from a function with a NoiseSchedule of your own."
        )
    if given not in _NATIVE:
        raise InputError(
            f"unknown prediction type {given!r} of {kind}: known are {', '.join(_NATIVE)}."
        )
    return NoiseSchedule("steps", table), _NATIVE[given]


def encode_prompts(pipeline: Any, prompts: Sequence[str]) -> Tensor:
    """Return the text encoder's last hidden states, [N, tokens, width].

    Raises:
        InputError: If the pipeline has no tokenizer or text encoder.
    """
    tokenizer = getattr(pipeline, "tokenizer", None)
    encoder = getattr(pipeline, "text_encoder", None)
    if tokenizer is None or encoder is None:
        raise InputError(
            "the pipeline has no tokenizer or text encoder: give prompts as embeddings, "
            "[N, tokens, width]."
        )
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    with undisturbed(encoder):
        states: Tensor = encoder(tokens.to(encoder.device))[0]
    return states


def wrap_diffusers(
    source: Any,
    scheduler: Any = None,
    *,
    condition: Tensor | str | Sequence[str] | None = None,
    unconditional: Tensor | str | None = None,
    mode: Mode = "conditional",
    guidance: float = 7.5,
    shape: Sequence[int] | None = None,
    split_variance: bool = False,
    autocast: torch.dtype | None = None,
) -> ScoreModel:
    """Wrap a UNet or a pipeline of diffusers.

    Args:
        source: A ``UNet2DModel`` or ``UNet2DConditionModel``, or a pipeline with one as ``unet``.
        scheduler: The scheduler; by default the pipeline's.
        condition: What images are conditioned on: prompts, where the pipeline can encode them;
            their embeddings [1 or N, tokens, width]; of a class-conditional network class numbers
            [1 or N]. By default the empty prompt, if it can be encoded.
        unconditional: The condition that says nothing; by default the empty prompt likewise.
        mode: Which estimate, see :class:`ScoreModel`.
        guidance: Of mode ``"guided"``.
        shape: (channels, height, width) as the network sees images; by default from its config.
        split_variance: Whether a network that also predicts variances may be used; their channels
            are dropped.
        autocast: Run the network in this dtype without converting it.

    Raises:
        InputError: If the scheduler, prediction type or condition is missing or unknown, or the
            network wants more than an image, a time and one condition.
        ShapeError: If channels do not fit, or the size of images is not known.
    """
    network = getattr(source, "unet", source)
    config = getattr(network, "config", None)
    if not isinstance(network, torch.nn.Module) or config is None or "in_channels" not in config:
        raise InputError(
            f"{type(source).__name__} is neither a UNet of diffusers nor a pipeline with one: "
            "build a ScoreModel from a function instead."
        )
    scheduler = getattr(source, "scheduler", None) if scheduler is None else scheduler
    schedule, prediction = schedule_of(scheduler)
    channels, out = int(config["in_channels"]), int(config["out_channels"])
    if out == 2 * channels and not split_variance:
        raise ShapeError(
            f"the network returns {out} channels for {channels}, so it also predicts variances: "
            "pass split_variance=True to use the first half."
        )
    if out not in (channels, 2 * channels):
        raise ShapeError(f"the network returns {out} channels for images of {channels}.")
    textual = "cross_attention_dim" in config
    if config.get("addition_embed_type") is not None or config.get("encoder_hid_dim") is not None:
        raise InputError("the network wants further conditions beside the prompt: wrap a function.")
    by_class = config.get("num_class_embeds") is not None or (
        config.get("class_embed_type") is not None
    )
    if textual and by_class:
        raise InputError("the network wants both a prompt and a class: wrap a function.")

    known = textual and getattr(source, "tokenizer", None) is not None
    known = known and getattr(source, "text_encoder", None) is not None
    if unconditional is None and known:
        unconditional = ""
    if isinstance(unconditional, str):
        unconditional = encode_prompts(source, [unconditional])
    if condition is None:
        condition = unconditional
    elif not isinstance(condition, Tensor):
        condition = encode_prompts(source, [condition] if isinstance(condition, str) else condition)
    if (textual or by_class) and condition is None:
        what = "prompts or their embeddings" if textual else "class numbers"
        raise InputError(f"the network is conditional: give condition=, {what}.")
    if not (textual or by_class) and condition is not None:
        raise InputError("the network takes no condition: leave condition= out.")

    run = network_run = _runner(network, autocast, textual)
    if schedule.kind == "sigma":
        run = _edm(network_run, float(scheduler.config["sigma_data"]), prediction)
        prediction = "sample"
    elif schedule.kind == "flow":
        steps = int(scheduler.config["num_train_timesteps"])
        run = lambda y, t, c: network_run(y, t * steps, c)  # noqa: E731
    else:
        run = lambda y, t, c: network_run(y, t.long(), c)  # noqa: E731
    return ScoreModel(
        run,
        schedule,
        _shape(config, channels) if shape is None else shape,
        prediction,
        networks=[network],
        # Preconditioning is done in float32 whatever the network computes in.
        dtype=torch.float32,
        condition=condition,
        unconditional=unconditional,
        mode=mode,
        guidance=guidance,
    )


def _shape(config: Any, channels: int) -> tuple[int, ...]:
    size = config.get("sample_size")
    if size is None:
        raise ShapeError("the network's config has no sample_size: give shape=.")
    sides = (size, size) if isinstance(size, int) else tuple(size)
    return (channels, *sides)


_Run = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


def _runner(network: Any, autocast: torch.dtype | None, textual: bool) -> _Run:
    """The network as it is, on images, times in its own words, and one condition."""
    first = next(network.parameters())

    def run(y: Tensor, clock: Tensor, condition: Tensor | None) -> Tensor:
        options: dict[str, Any] = {}
        if condition is not None:
            floats = condition.is_floating_point()
            name = "encoder_hidden_states" if textual else "class_labels"
            options[name] = condition.to(first.dtype) if floats else condition
        clock = clock.to(first.dtype) if clock.is_floating_point() else clock
        with nullcontext() if autocast is None else torch.autocast(first.device.type, autocast):
            found = network(y.to(first.dtype), clock, return_dict=False, **options)[0]
        # Where variances are predicted as well, they are the second half.
        return found[:, : y.shape[1]].to(y.dtype)  # type: ignore[no-any-return]

    return run


def _edm(run: _Run, data: float, prediction: str) -> _Run:
    """The clean image by Karras' preconditioning, with the data's standard deviation."""
    sign = 1.0 if prediction == "epsilon" else -1.0

    def denoise(y: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        sigma = t.to(y.dtype).reshape(-1, *[1] * (y.ndim - 1))
        total = sigma**2 + data**2
        raw = run(y / total.sqrt(), 0.25 * t.log(), condition)
        return data**2 / total * y + sign * sigma * data / total.sqrt() * raw

    return denoise
