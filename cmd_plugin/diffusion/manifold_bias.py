r"""Was an image made by a diffusion model? How its noise estimates curve and lean round the image.

Generated images are held to lie near stable maxima of the learned density: high curvature of the
log density, a small gradient, and a bias of the estimates along the image.

Source: "Manifold Induced Biases for Zero-shot and Few-shot Detection of Generated Images" (ICLR
2025). Its alpha is the share of noise, :math:`1 - a^2` here.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from cmd_plugin.diffusion.calibration import RealReference
from cmd_plugin.diffusion.codecs import (
    Codec,
    Embed,
    PixelCodec,
    check_range,
    flat_embedding,
    to_square,
)
from cmd_plugin.diffusion.directions import sphere_directions
from cmd_plugin.diffusion.laplace import batches, check_images, p_laplace
from cmd_plugin.diffusion.score_model import ScoreModel
from cmd_plugin.errors import InputError, NonFiniteError

__all__ = ["ManifoldBias", "ManifoldBiasDetector", "verdicts"]

PARITIES = ("paper", "authors")
_AUTHORS_DIMENSION = 512
"""What the released criterion takes for the size of CLIP's embedding (it is 768)."""


@dataclass(frozen=True)
class ManifoldBias:
    """What a detector saw of B images, [B] float64 each.

    Attributes:
        bias: How far estimates lean along the image.
        curvature: Mean curvature of the log density round the image.
        gradient: Length of its gradient there.
        criterion: Their combination; larger means generated.
    """

    bias: Tensor
    curvature: Tensor
    gradient: Tensor
    criterion: Tensor

    def scores(self) -> dict[str, Tensor]:
        """Return all four, each with its sign turned so that larger means generated."""
        return {
            "criterion": self.criterion,
            "bias": self.bias,
            "curvature": self.curvature,
            "gradient": -self.gradient,
        }


class ManifoldBiasDetector:
    r"""Scores images by how generated they look to a diffusion model, without training.

    With :math:`\hat e_j` the estimates at :math:`a x_0 + s u_j`:

    - ``parity="paper"``: curvature :math:`\frac1s E\langle \hat e/|\hat e|, u\rangle`, gradient
      :math:`\frac1s E|\hat e|`, bias :math:`E\langle \hat e/|\hat e|, x_0\rangle`, and criterion
      :math:`E\langle \hat e/|\hat e|, w_a u - w_b \hat e + w_c \sqrt d\, x_0 \rangle`, where the
      model sees images: no decoder, no embedding.
    - ``parity="authors"``: as in the released code, estimates and directions are decoded as if
      they were images, cut to size, rounded to 8 bits and embedded, and cosines of embeddings take
      the place of the inner products: :math:`1 + (\sqrt{512}\,w_c\,\text{bias} - w_b\,\text{
      gradient} + w_a\,\text{curvature}) / (\sqrt{512} + 2)`. Directions are decoded without the
      latents' scale, as there. The encoder's mean is taken instead of a sample, and all images
      share their directions, which are decoded and embedded once: scores repeat.

    It tells images of this very model and its kin, at best. Before a claim, match contrast and file
    format between the groups: both fool it.

    Args:
        model: The model; in mode ``"conditional"`` for the released behaviour.
        parity: ``"paper"`` or ``"authors"``.
        t: Time; 10 of 1000 steps there.
        directions: How many; the released script has 8, the paper 64.
        weights: (curvature, gradient, bias), the :math:`w` above.
        codec: What turns images into what the model sees.
        embed: With ``"authors"``: what turns pictures in [0, 1] into embeddings, such as
            :func:`.codecs.clip_embedding`; by default their pixels.
        size: With ``"authors"``: side pictures are cut to (512 there); None leaves them.
        seed: Of the directions.
        batch_size: Images per call of network and codec: this alone bounds the memory.

    Attributes:
        reference: Scores of real images, after :meth:`fit_real`.

    Raises:
        InputError: If an option cannot be used.
    """

    def __init__(
        self,
        model: ScoreModel,
        *,
        parity: str = "paper",
        t: float = 10,
        directions: int = 8,
        weights: Sequence[float] = (1.0, 1.0, 1.0),
        codec: Codec | None = None,
        embed: Embed | None = None,
        size: int | None = None,
        seed: int = 0,
        batch_size: int = 64,
    ) -> None:
        if parity not in PARITIES:
            raise InputError(f"unknown parity {parity!r}: choose one of {', '.join(PARITIES)}.")
        if parity == "paper" and (embed is not None or size is not None):
            raise InputError("embed and size belong to parity='authors': leave them out.")
        if len(weights) != 3 or not all(math.isfinite(weight) for weight in weights):
            raise InputError(f"weights must be three finite numbers, got {weights}.")
        if size is not None and size < 1:
            raise InputError(f"size must be at least 1, got {size}.")
        self.signal, self.noise = model.schedule.level(t)
        kind = "antithetic" if parity == "paper" else "independent"
        self.directions = sphere_directions(model.shape, directions, kind, seed)
        self.model, self.parity, self.t = model, parity, t
        self.weights = tuple(float(weight) for weight in weights)
        self.codec: Codec = PixelCodec() if codec is None else codec
        self.embed: Embed = flat_embedding if embed is None else embed
        self.size, self.seed, self.batch_size = size, seed, batch_size
        self.reference: RealReference | None = None
        self._embedded: Tensor | None = None

    def settings(self) -> dict[str, str]:
        """Return what decides a score beside the images, text by name; of the weights a digest."""
        digest = hashlib.sha256()
        for network in self.model.networks:
            for value in network.state_dict().values():
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return {
            "parity": self.parity,
            "time": f"{self.t:g}",
            "level": f"{self.noise:.9g}",
            "directions": str(len(self.directions)),
            "seed": str(self.seed),
            "weights": " ".join(f"{weight:g}" for weight in self.weights),
            "size": str(self.size),
            "shape": "x".join(map(str, self.model.shape)),
            "mode": self.model.mode,
            "codec": f"{type(self.codec).__name__} {self.codec.scale:g}",
            "network": digest.hexdigest()[:16],
        }

    def terms(self, images: Tensor, condition: Tensor | None = None) -> ManifoldBias:
        """Score images.

        Args:
            images: [B, C, H, W] in [-1, 1], before the codec.
            condition: [1 or B, ...] what they are conditioned on, such as their captions.

        Raises:
            ShapeError: If images have another size than the model's.
            InputError: If they are out of range.
            NonFiniteError: If images, or what networks say of them, are not finite.
        """
        if self.parity == "authors":
            return self._as_released(images, condition)
        seen = self.codec.encode(images)
        flux = p_laplace(
            self.model,
            seen,
            self.t,
            1,
            directions=self.directions,
            condition=condition,
            batch_size=self.batch_size,
        )
        root = math.sqrt(self.model.dimension)
        curvature, size, bias = (x[:, 0].mean(1) for x in (flux.cosine, flux.size, flux.bias))
        a, b, c = self.weights
        criterion = root * (a * curvature - b * size + c * bias)
        return ManifoldBias(
            bias, root * curvature / self.noise, root * size / self.noise, criterion
        )

    def fit_real(self, batches: Tensor | Iterable[Tensor]) -> RealReference:
        """Score real images, and compare what comes later with them.

        Args:
            batches: Images [N, C, H, W] in [-1, 1], or batches of them; disjoint from all that is
                tested later.

        Raises:
            InputError: If there are none, or as :meth:`terms`.
        """
        given = [batches] if isinstance(batches, Tensor) else batches
        parts = [self.terms(images).scores() for images in given]
        if not parts:
            raise InputError("a reference needs at least one real image.")
        scores = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        self.reference = RealReference(scores, self.settings())
        return self.reference

    def use_reference(self, reference: RealReference) -> None:
        """Compare with real images that were scored before.

        Raises:
            StateMismatch: If they were scored with other settings or weights.
        """
        reference.check(self.settings())
        self.reference = reference

    def p_values(self, images: Tensor, name: str = "criterion") -> Tensor:
        """Return the chance that a real image looks as generated as each of these, [B] float64.

        Raises:
            InputError: If there are no real images to compare with, or as :meth:`terms`.
        """
        if self.reference is None:
            raise InputError("there are no real images to compare with: call fit_real first.")
        return self.reference.p_values(name, self.terms(images).scores()[name])

    def _as_released(self, images: Tensor, condition: Tensor | None) -> ManifoldBias:
        check_range(images)
        images = images if self.size is None else to_square(images, self.size)
        seen = self.codec.encode(images)
        check_images(self.model, seen, condition)
        device, count = self.model.device, len(self.directions)
        moves = self.directions.to(device, torch.float32)
        if self._embedded is None:
            self._embedded = torch.cat(
                [
                    # Not divided by the scale of the latents, while estimates are.
                    self._pictures(moves[rows] * self.codec.scale)
                    for rows in batches(count, self.batch_size, device)
                ]
            )
        raw = torch.cat([self.embed(_bytes(part)) for part in torch.split(images, self.batch_size)])
        raw = raw.to(device, torch.float32)
        seen = seen.to(device, torch.float32)
        if condition is not None:
            condition = condition.to(device).expand(len(seen), *condition.shape[1:])
        rows_of: list[Tensor] = []
        for rows in batches(len(seen) * count, self.batch_size, device):
            image, move = rows // count, rows % count
            x = self.signal * seen[image] + self.noise * moves[move]
            clock = torch.full((len(rows),), float(self.t), device=device, dtype=torch.float64)
            with self.model.measuring():
                e = self.model.noise(x, clock, None if condition is None else condition[image])
            feature = self._pictures(e)
            rows_of.append(
                torch.stack(
                    [
                        cosine_similarity(raw[image], feature, eps=1e-8),
                        cosine_similarity(feature, self._embedded[move], eps=1e-8),
                        feature.norm(dim=1),
                    ]
                ).double()
            )
        each = torch.cat(rows_of, dim=1).cpu().reshape(3, len(seen), count)
        if not bool(each.isfinite().all()):
            raise NonFiniteError("the networks returned NaN or infinite values: use float32.")
        bias, curvature, gradient = each.mean(2)
        a, b, c = self.weights
        root = math.sqrt(_AUTHORS_DIMENSION)
        criterion = 1.0 + (c * root * bias - b * gradient + a * curvature) / (root + 2.0)
        return ManifoldBias(bias, curvature, gradient, criterion)

    def _pictures(self, seen: Tensor) -> Tensor:
        """Embeddings of what the model sees, decoded as if it were images."""
        pictures = self.codec.decode(seen)
        pictures = pictures if self.size is None else to_square(pictures, self.size)
        return self.embed(_bytes(pictures)).to(seen.device, torch.float32)


def _bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] of 256 levels, from [-1, 1] and beyond."""
    return ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round() / 255


def verdicts(p_values: Tensor, level: float = 0.05) -> list[str]:
    """Return "generated", "real" or "unsure" for each image.

    Unsure is what changes when the image is delivered in another way, see
    :func:`.delivery.redeliver`: then it was not the picture that decided.

    Args:
        p_values: [B, R] of each image as it came, and delivered again in R - 1 ways.
        level: False-positive rate: at most this share of real images is called generated.

    Raises:
        InputError: If the level is not in (0, 1) or there is no p-value.
    """
    if not 0.0 < level < 1.0:
        raise InputError(f"the false-positive rate must be in (0, 1), got {level}.")
    if p_values.ndim != 2 or not p_values.shape[1]:
        raise InputError(f"p-values must be [B, deliveries], got {tuple(p_values.shape)}.")
    votes = (p_values <= level).sum(1).tolist()
    named = {0: "real", p_values.shape[1]: "generated"}
    return [named.get(vote, "unsure") for vote in votes]
