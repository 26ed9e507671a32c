"""The geometry of a CLIP-like model's embeddings, logged while it trains."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from cmd_plugin.callbacks._arguments import whole
from cmd_plugin.callbacks._lightning import Callback
from cmd_plugin.callbacks._trainer import refuse_sharded, runs
from cmd_plugin.clip import (
    GaussianStatistics,
    Tower,
    Whitening,
    alignment,
    conformity,
    fit_ellipsoid,
    image_tower,
    modality_gap,
    text_tower,
    uniformity,
)
from cmd_plugin.errors import InputError, StateMismatch

__all__ = ["EmbeddingGeometryMonitor"]

_logger = logging.getLogger(__name__)

_VERSION = 1
_LEAST = 3  # pairs below which nothing is said
_MODALITIES = ("image", "text")


class EmbeddingGeometryMonitor(Callback):
    """Logs where a CLIP-like model puts images and texts; never changes the model.

    At each validation it looks at raw embeddings (before any normalising) of the first ``pairs``
    validation pairs and logs, under ``geometry/``:

    - ``gap``: distance of the mean unit vectors of images and texts,
    - ``paired_cosine``: mean cosine of a pair,
    - ``alignment``: mean squared distance of the unit vectors of a pair,
    - ``skipped``: pairs left out because an embedding is not finite,
    - for each modality (``image_``, ``text_``):
      ``uniformity`` (Wang and Isola; lower is more even), ``conformity`` (mean cosine among them),
      ``anisotropy`` (0 a sphere, near 1 a line), ``norm_variation`` (standard deviation of the
      centred norms over their mean: a thin shell is near 0), and
      ``log_likelihood``: mean whitened log-likelihood under a Gaussian (its covariance shrunk by
      Ledoit and Wolf) fitted to the embeddings of the last ``reference_batches`` training batches
      before the validation, each encoded with the weights after its step, and
      ``train_log_likelihood``: that of these training embeddings themselves. The first falls below
      the second as validation pairs become unusual among training pairs. Both are left out where
      nobody knows when the next validation comes (a loader without a length).

    The validation pairs' embeddings are kept until they are measured, of the training batches sums
    alone; both are bounded. Under DDP every process sees the pairs of all; a sampler that pads with
    repeated pairs has them counted twice.

    Args:
        pairs: How many validation pairs to look at, over all processes.
        reference_batches: Training batches to fit the likelihood to, in each process; 0 leaves it
            out, and costs nothing in training.
        every_n_epochs: How often to look.
        network: Name of the submodule that has ``encode_image`` and ``encode_text`` (or is one of
            the models that :func:`cmd_plugin.clip.image_tower` knows); empty is the module itself.
        image_key: Key of the images in batches that are dictionaries.
        text_key: Key of the texts in batches that are dictionaries.

    Override :meth:`embed` where batches or networks are of another kind.

    Raises:
        InputError: If an argument is out of range.
    """

    def __init__(
        self,
        pairs: int = 1024,
        reference_batches: int = 8,
        every_n_epochs: int = 1,
        network: str = "",
        image_key: str = "image",
        text_key: str = "text",
    ) -> None:
        super().__init__()
        self.pairs = whole("pairs", pairs, _LEAST)
        self.reference_batches = whole("reference_batches", reference_batches, 0)
        self.every_n_epochs = whole("every_n_epochs", every_n_epochs, 1)
        self.network = network
        self.image_key, self.text_key = image_key, text_key
        self._towers: tuple[Tower, Tower] | None = None
        self._statistics: dict[str, GaussianStatistics] = {}
        self._kept: list[tuple[Tensor, Tensor]] = []

    def embed(self, pl_module: Any, batch: Any) -> tuple[Tensor, Tensor]:
        """Return raw image and text embeddings [B, d] of a batch of pairs.

        Args:
            pl_module: The LightningModule.
            batch: A dictionary with both keys, or a sequence of images and texts as the towers take
                them.

        Raises:
            InputError: If the batch holds no pair, or there is no such network.
        """
        if isinstance(batch, Mapping) and {self.image_key, self.text_key} <= batch.keys():
            images, texts = batch[self.image_key], batch[self.text_key]
        elif isinstance(batch, (list, tuple)) and len(batch) >= 2:
            images, texts = batch[0], batch[1]
        else:
            raise InputError(
                "EmbeddingGeometryMonitor found no images and texts in the batch: pass image_key= "
                "and text_key= for dictionaries, or override embed()."
            )
        if self._towers is None:
            try:
                network = pl_module.get_submodule(self.network)
            except AttributeError as error:
                raise InputError(f"the module has no submodule {self.network!r}.") from error
            self._towers = image_tower(network), text_tower(network)
        return self._towers[0].encode(images), self._towers[1].encode(texts)

    @override
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse a strategy that splits the weights over the processes."""
        refuse_sharded(trainer, "EmbeddingGeometryMonitor")
        self._towers, self._kept = None, []

    @override
    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the batch into the reference if a validation is near."""
        left = self._batches_left(trainer, batch_idx)
        if left is None or left > self.reference_batches or not self._is_due(trainer):
            return
        if left == min(self.reference_batches, trainer.val_check_batch):
            self._statistics = {}  # the first of them; what an epoch's end left over is outdated
        for name, x in zip(_MODALITIES, self._embedded(trainer, pl_module, batch), strict=True):
            if name not in self._statistics:
                self._statistics[name] = GaussianStatistics(x.shape[1])
            self._statistics[name].update(x)

    @override
    def on_validation_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the embeddings of the first pairs."""
        wanted = -(-self.pairs // trainer.world_size) - sum(len(x) for x, _ in self._kept)
        if dataloader_idx or wanted <= 0 or not self._is_due(trainer):
            return
        images, texts = self._embedded(trainer, pl_module, batch)
        self._kept.append((images[:wanted], texts[:wanted]))

    @override
    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure and log."""
        kept, self._kept = self._kept, []
        statistics, self._statistics = self._statistics, {}
        if trainer.sanity_checking or not self._is_due(trainer):
            self._statistics = statistics
            return
        rows = [
            _rows_of_all(trainer, pl_module, torch.cat(parts) if parts else torch.empty(0, 0))
            for parts in ([pair[place] for pair in kept] for place in (0, 1))
        ]
        references = {}
        if self.reference_batches:
            for name, x in zip(_MODALITIES, rows, strict=True):
                own = statistics.get(name) or GaussianStatistics(max(x.shape[1], 1))
                references[name] = _sums_of_all(trainer, pl_module, own)
        if len(rows[0]) < _LEAST:
            return
        try:
            values = _measure(rows[0], rows[1], references)
        except InputError as error:  # all embeddings are one, or none is finite: training goes on
            _logger.warning("Nothing is logged of epoch %d: %s", trainer.current_epoch, error)
            return
        for name, value in values.items():  # the same in every process
            pl_module.log(f"geometry/{name}", value, sync_dist=True)

    @override
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let the model and what was kept of it go."""
        self._towers, self._kept = None, []

    @override
    def state_dict(self) -> dict[str, Any]:
        """The sums over training batches since the last validation."""
        return {
            "version": _VERSION,
            **{name: s.state_dict() for name, s in self._statistics.items()},
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned.

        Raises:
            StateMismatch: If another version wrote it, or it is damaged.
        """
        if state_dict.get("version") != _VERSION:
            raise StateMismatch(
                f"the checkpoint holds version {state_dict.get('version')!r} of "
                f"EmbeddingGeometryMonitor's state and this one reads version {_VERSION}: use the "
                "package that wrote it."
            )
        read = {}
        for name in _MODALITIES:
            if name in state_dict:
                read[name] = GaussianStatistics(state_dict[name]["config"]["dim"])
                read[name].load_state_dict(state_dict[name])
        self._statistics = read

    def _is_due(self, trainer: Any) -> bool:
        return not runs(trainer, "fit") or (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def _batches_left(self, trainer: Any, batch_idx: int) -> float | None:
        """Training batches until the next validation, this one included; None if there is none."""
        every = trainer.check_val_every_n_epoch
        if not trainer.enable_validation or (every and (trainer.current_epoch + 1) % every):
            return None
        # Without epochs to count by, Lightning counts batches over the whole run.
        number = batch_idx if every else trainer.fit_loop.total_batch_idx
        return float(trainer.val_check_batch - number % trainer.val_check_batch)

    def _embedded(self, trainer: Any, pl_module: Any, batch: Any) -> tuple[Tensor, Tensor]:
        with trainer.precision_plugin.forward_context():
            images, texts = self.embed(pl_module, batch)
        return images.detach().float().cpu(), texts.detach().float().cpu()


def _measure(
    images: Tensor, texts: Tensor, references: Mapping[str, GaussianStatistics]
) -> dict[str, float]:
    """Everything that is logged, by name."""
    finite = images.isfinite().all(dim=1) & texts.isfinite().all(dim=1)
    images, texts = images[finite], texts[finite]
    gap = modality_gap(images, texts)
    values = {
        "gap": gap.l2m,
        "paired_cosine": gap.paired_cosine,
        "alignment": alignment(images, texts),
        "skipped": float((~finite).sum()),
    }
    for name, x in (("image", images), ("text", texts)):
        shape = fit_ellipsoid(x)
        values |= {
            f"{name}_uniformity": uniformity(x),
            f"{name}_conformity": float(conformity(x).mean()),
            f"{name}_anisotropy": shape.anisotropy,
            f"{name}_norm_variation": shape.thickness / shape.radius,
        }
        reference = references.get(name)
        if reference is not None and reference.rows > 1:
            whitening = Whitening.fit(reference, shrinkage="ledoit-wolf")
            values[f"{name}_log_likelihood"] = float(whitening.log_likelihood(x).mean())
            values[f"{name}_train_log_likelihood"] = _own_log_likelihood(whitening, reference)
    return values


def _own_log_likelihood(whitening: Whitening, statistics: GaussianStatistics) -> float:
    """Mean log-likelihood of the very rows a whitening was fitted to, from their sums."""
    rows, _, covariance = statistics.compute()
    squared = float((whitening.matrix * (covariance @ whitening.matrix)).sum()) * (rows - 1) / rows
    return -0.5 * (whitening.vectors.shape[1] * math.log(2.0 * math.pi) + squared)


def _rows_of_all(trainer: Any, pl_module: Any, x: Tensor) -> Tensor:
    """Rows of all processes in the order of their ranks; processes may have different numbers."""
    if trainer.world_size <= 1:
        return x
    device = pl_module.device
    shapes = pl_module.all_gather(torch.tensor(x.shape, device=device)).cpu()
    padded = torch.zeros(tuple(shapes.amax(dim=0).tolist()), device=device)
    padded[: len(x), : x.shape[1]] = x.to(device)
    parts = pl_module.all_gather(padded).cpu()
    return torch.cat([part[:count] for part, count in zip(parts, shapes[:, 0], strict=True)])


def _sums_of_all(trainer: Any, pl_module: Any, own: GaussianStatistics) -> GaussianStatistics:
    """The sums over the rows of all processes, merged in the order of their ranks."""
    if trainer.world_size <= 1:
        return own
    state = own.state_dict()
    config = state.pop("config")
    gathered = {name: pl_module.all_gather(x.to(pl_module.device)) for name, x in state.items()}
    merged = GaussianStatistics(own.dim)
    for rank in range(trainer.world_size):
        part = GaussianStatistics(own.dim)
        part.load_state_dict(
            {"config": config, **{name: x[rank].cpu() for name, x in gathered.items()}}
        )
        merged.merge(part)
    return merged
