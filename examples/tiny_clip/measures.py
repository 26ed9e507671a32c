"""What is asked of the trained model, and of the same encoder trained otherwise."""

from __future__ import annotations

import torch
from model import TinyClip
from pictures import COLOURS, SHARES, TEMPLATES, Captions, Pairs
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import normalize
from torchvision.transforms.functional import gaussian_blur

from cmd_plugin.clip import (
    Whitening,
    alpha_curve,
    conformity,
    conformity_to,
    fit_ellipsoid,
    modality_gap,
    unit_mean,
)

RARE = len(COLOURS) - 2  # from this colour on


def embed(encoder: nn.Module, x: Tensor) -> Tensor:
    """Raw embeddings of a whole set, [N, d]."""
    with torch.no_grad():
        return torch.cat([encoder.eval()(part) for part in x.split(500)])


def measure_geometry(model: TinyClip, held_out: Pairs, captions: Captions) -> dict[str, float]:
    """Gap, shape, the loss over offsets, and how often the right caption is found."""
    images, texts = embed(model.image, held_out.images), embed(model.text, held_out.tokens)
    gap, cloud = modality_gap(images, texts), fit_ellipsoid(texts)
    temperature = float((-model.scale.detach()).exp())
    curve = alpha_curve(images[:500], texts[:500], temperature=temperature)
    concepts = captions.all_concepts()
    every = embed(model.text, captions.tokens([captions.write(c, 0) for c in concepts]))
    nearest = (normalize(images) @ normalize(every).T).argmax(dim=1)
    right = torch.tensor(concepts)[nearest] == held_out.concepts
    return {
        "gap": gap.l2m,
        "rmg": gap.rmg,
        "paired cosine": gap.paired_cosine,
        "image conformity": gap.image_cosine,
        "text conformity": gap.text_cosine,
        "text norm variation": cloud.thickness / cloud.radius,
        "best alpha": curve.best,
        "loss at alpha 0": float(curve.loss[curve.alphas == 0.0]),
        "least loss": float(curve.loss.min()),
        "temperature": temperature,
        "class right": float(right[:, 0].double().mean()),
        "colour right": float(right[:, 1].double().mean()),
        "place right": float(right[:, 2].double().mean()),
        "whole caption right": float(right.all(dim=1).double().mean()),
    }


def corruptions(images: Tensor) -> dict[str, Tensor]:
    """Damaged copies of uint8 images."""
    x = images.float() / 255.0
    generator = torch.Generator().manual_seed(0)
    erased = x.clone()
    for picture, (top, left) in zip(
        erased, torch.randint(20, (len(x), 2), generator=generator).tolist(), strict=True
    ):
        picture[:, top : top + 12, left : left + 12] = 0.5
    found = {
        "noise 0.1": x + 0.1 * torch.randn(x.shape, generator=generator),
        "noise 0.3": x + 0.3 * torch.randn(x.shape, generator=generator),
        "blur": gaussian_blur(x, [7, 7], [2.0, 2.0]),
        "contrast": 0.3 * x + 0.35,
        "grey square": erased,
        "upside down": x.flip(2),
    }
    return {name: (y.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8) for name, y in found.items()}


def measure_images(encoder: nn.Module, train: Pairs, held_out: Pairs) -> dict[str, object]:
    """How thin the shell is, and how well scores tell damaged pictures (AUROC, 0.5 is chance)."""
    known, clean = embed(encoder, train.images), embed(encoder, held_out.images)
    whitening, common, shape = Whitening.fit(known), unit_mean(known), fit_ellipsoid(clean)
    squared = whitening.squared_norm(clean)
    scores = {
        "likelihood": whitening.log_likelihood,
        "conformity": lambda x: conformity_to(x, common),
        "raw norm": lambda x: x.norm(dim=1),
    }
    found: dict[str, dict[str, float]] = {}
    for damage, pictures in corruptions(held_out.images).items():
        damaged = embed(encoder, pictures)
        found[damage] = {
            name: _auroc(score(clean), score(damaged)) for name, score in scores.items()
        }
    return {
        "raw norm variation": float(clean.norm(dim=1).std() / clean.norm(dim=1).mean()),
        "centred norm variation": shape.thickness / shape.radius,
        "whitened norm variation": float(squared.sqrt().std() / squared.sqrt().mean()),
        "offset": shape.offset,
        "anisotropy": shape.anisotropy,
        "rank": float(whitening.rank),
        "damaged scores lower (AUROC)": found,
    }


def measure_rarity(model: TinyClip, held_out: Pairs, captions: Captions) -> dict[str, object]:
    """Whether rare colours conform less, in the set as it is and where all are equally frequent.

    In the set as it is, a rare caption has fewer of its like to be near to, whatever the encoder
    does. So conformity is also taken against every caption once, and against as many pictures of
    each colour.
    """
    colour = held_out.concepts[:, 1]
    images, texts = embed(model.image, held_out.images), embed(model.text, held_out.tokens)
    concepts = captions.all_concepts()
    written = [captions.write(c, t) for c in concepts for t in range(len(TEMPLATES))]
    every = embed(model.text, captions.tokens(written))
    every_colour = torch.tensor([c[1] for c in concepts]).repeat_interleave(len(TEMPLATES))
    fewest = int(colour.bincount(minlength=len(COLOURS)).min())
    balanced = torch.cat([(colour == c).nonzero()[:fewest, 0] for c in range(len(COLOURS))])
    return {
        "texts as they are": _by_colour(conformity(texts), colour),
        "texts, every caption once": _by_colour(conformity(every), every_colour),
        "images as they are": _by_colour(conformity(images), colour),
        "images, colours balanced": _by_colour(conformity(images[balanced]), colour[balanced]),
    }


def _by_colour(values: Tensor, colour: Tensor) -> dict[str, float]:
    means = [float(values[colour == c].mean()) for c in range(len(COLOURS))]
    return {
        **{
            f"{name} ({share:.0%})": m
            for name, share, m in zip(COLOURS, SHARES, means, strict=True)
        },
        "rare score lower (AUROC)": _auroc(values[colour < RARE], values[colour >= RARE]),
        "rank correlation with frequency": float(spearmanr(SHARES, means).statistic),
    }


def _auroc(usual: Tensor, odd: Tensor) -> float:
    labels = torch.cat((torch.zeros(len(usual)), torch.ones(len(odd))))
    return float(roc_auc_score(labels.numpy(), -torch.cat((usual, odd)).double().numpy()))
