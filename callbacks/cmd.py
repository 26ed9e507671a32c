"""CMDCallback: Correlation Mode Decomposition beside a Lightning training run."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal

from typing_extensions import override

from cmd_plugin.callbacks._arguments import one_of, patterns, whole
from cmd_plugin.callbacks._embedding import EmbeddedTraining
from cmd_plugin.callbacks._recording import LogListener, publish
from cmd_plugin.callbacks._second_pass import second_pass, takes_data_loader_iterator
from cmd_plugin.callbacks._trainer import (
    broadcast_from_rank_zero,
    epoch_is_over,
    planned_snapshots,
    refuse_sharded,
    resolve_warmup,
    run_before_monitors,
    runs,
    warn_when_too_short,
)
from cmd_plugin.errors import InputError, PluginError
from cmd_plugin.modes import Embedding, OnlineModes

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["CMDCallback"]

_logger = logging.getLogger(__name__)


class CMDCallback(EmbeddedTraining):
    """Watches the weights of a training run and evaluates their low-dimensional model.

    After each epoch (or every n steps) the weights are handed to
    :class:`cmd_plugin.modes.OnlineModes`. Once ``warmup + 1`` snapshots are seen, every weight is
    modelled as an affine function of one of a few reference weights, and the modelled weights are
    what this callback shows: in validation beside or instead of the raw ones, and in
    ``trainer.test`` and ``trainer.predict``. With ``mode="online"`` training is never touched: with
    and without the callback it gives the same losses, weights and random numbers, bit for bit.

    ``mode="embedded"`` changes the training: every ``embed_every`` snapshots more weights get a
    frozen scale and offset and follow their reference from then on (the paper's section 3.4; see
    :class:`cmd_plugin.modes.Embedding`). The raw weights are those of this training.

    Snapshots are taken at the end of the last batch of the epoch, before validation.

    With ``evaluate="both"`` the trainer's own validation shows the raw weights, then the module's
    ``validation_step`` runs once more with the modelled weights, and what it logs appears under
    ``prefix``: ``cmd/val_acc`` beside ``val_acc``, for loggers and for
    ``ModelCheckpoint(monitor="cmd/val_acc")``. Before the first fit the modelled weights are the
    raw ones, so the raw numbers are repeated under ``prefix`` at no cost. The second pass calls the
    module's ``on_validation_epoch_start/end`` and ``on_validation_batch_start/end``, but not
    ``on_validation_start/end`` and no other callback; code that must know which weights it sees can
    ask :attr:`showing`. In distributed runs its means are taken over all processes. What
    ``trainer.validate`` prints and returns is the trainer's own pass; the rest is in
    ``trainer.callback_metrics``.

    Logged at the end of each training epoch: ``cmd/explained_variance`` (at most 1, over everything
    seen so far; once fitted), ``cmd/state_bytes`` (bytes held), and with ``mode="embedded"``
    ``cmd/embedded_fraction`` (0 to 1) and ``cmd/saved_percent`` (as the paper counts it).

    Resuming from a Lightning checkpoint is exact at any phase. Not supported: strategies that split
    the weights over processes (FSDP, ModelParallel, DeepSpeed), which are refused in ``setup``.

    Example::

        trainer = Trainer(max_epochs=60, callbacks=[CMDCallback(modes=10, warmup=20)])
        trainer.fit(module, data)     # val_acc and cmd/val_acc
        trainer.test(module, data)    # modelled weights

    Args:
        mode: ``"online"`` watches; ``"embedded"`` makes more and more weights follow references.
        modes: Number of modes M, 1 to 256.
        warmup: Snapshots F before the one that triggers the fit (at least 2), or a fraction of the
            snapshots that the run plans, in (0, 1).
        samples: Weights K drawn for the clustering.
        seed: Seed of that draw; the run's own random streams are not used.
        every_n_epochs: Snapshot after every n-th epoch.
        every_n_steps: Snapshot every n optimizer steps instead (``trainer.global_step``, so
            accumulated batches count once and every optimizer counts).
        evaluate: Weights that validation shows: ``"both"``, ``"modelled"`` or ``"raw"``.
        test: Weights that ``trainer.test`` and ``trainer.predict`` show.
        storage: Warm-up store, ``"delta-bf16"`` or ``"fp32"``.
        store_device: Device of the warm-up store, e.g. ``"cpu"``; None keeps it with the weights.
        buffers: Floating buffers (BatchNorm statistics) in modelled weights: ``"model"`` them,
            ``"recalibrate"`` them on the latest training batches, or ``"keep"`` the raw run's. The
            first is the authors' way and needs nothing; the second was clearly better on every
            network measured (``benchmarks/results``) but needs batches of this process's training.
        include: Globs (``net.*``) of parameter names to model; all when empty.
        exclude: Globs of parameter names to leave raw.
        profile: ``"reference"`` (one weight per mode) or ``"mean"`` of the mode's samples.
        shrink: Whether to shrink each weight's scale by its squared correlation with its profile.
        forgetting: Forgetting factor in (0, 1]; 1 weighs all history equally.
        embed_every: Snapshots L between two embedding events.
        embed_percent: Percentage P of the weights that an event chooses, in (0, 100].
        relative: Whether P is of the weights that are still free, instead of all.
        project: When embedded weights are written: before each snapshot (``"epoch"``, the authors),
            after each optimizer step (``"step"``), or that with gradients handed to the references
            by the chain rule (``"tie"``; after accumulation, unscaling and reduction over
            processes, before clipping; each optimizer for its own parameters).
        slots: ``"leave"`` or ``"zero"`` the optimizers' momenta of embedded weights.
        checkpoint_weights: ``"modelled"`` writes the modelled weights under ``state_dict`` of full
            checkpoints and the raw ones under ``current_model_state`` (the convention of
            Lightning's ``WeightAveraging``); training still resumes from the raw ones.
        prefix: Put before the names of the logged metrics.
        prog_bar: Whether these metrics also show in the progress bar.
        recalibration_batches: Training batches kept for ``buffers="recalibrate"``, on their device.

    Attributes:
        modes: The :class:`~cmd_plugin.modes.OnlineModes` of the run; None before ``fit`` starts.
        seconds: Wall-clock seconds spent in updates so far by this process (on a GPU: until the
            work is queued).

    Raises:
        InputError: If an argument is out of range.
    """

    def __init__(
        self,
        *,
        mode: Literal["online", "embedded"] = "online",
        modes: int = 10,
        warmup: int | float = 20,
        samples: int = 1000,
        seed: int = 0,
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        evaluate: Literal["both", "modelled", "raw"] = "both",
        test: Literal["modelled", "raw"] = "modelled",
        storage: Literal["delta-bf16", "fp32"] = "delta-bf16",
        store_device: str | None = None,
        buffers: Literal["model", "recalibrate", "keep"] = "model",
        include: tuple[str, ...] = (),
        exclude: tuple[str, ...] = (),
        profile: Literal["reference", "mean"] = "reference",
        shrink: bool = False,
        forgetting: float = 1.0,
        embed_every: int = 10,
        embed_percent: float = 10.0,
        relative: bool = False,
        project: Literal["epoch", "step", "tie"] = "epoch",
        slots: Literal["leave", "zero"] = "leave",
        checkpoint_weights: Literal["raw", "modelled"] = "raw",
        prefix: str = "cmd/",
        prog_bar: bool = False,
        recalibration_batches: int = 8,
    ) -> None:
        super().__init__(
            warmup if 0 < warmup < 1 else whole("warmup", warmup, 2),
            one_of("checkpoint_weights", checkpoint_weights, ("raw", "modelled")),
            whole("recalibration_batches", recalibration_batches, 1),
            one_of("mode", mode, ("online", "embedded")),
            Embedding(
                whole("embed_every", embed_every, 1), embed_percent, relative, project, slots
            ),
        )
        self.number_of_modes = whole("modes", modes, 1, 256)
        self.samples = whole("samples", samples, 1)
        self.seed = seed
        self.every_n_epochs = whole("every_n_epochs", every_n_epochs, 1)
        self.every_n_steps = (
            None if every_n_steps is None else whole("every_n_steps", every_n_steps, 1)
        )
        self.evaluate = one_of("evaluate", evaluate, ("both", "modelled", "raw"))
        self.test = one_of("test", test, ("modelled", "raw"))
        self.storage = one_of("storage", storage, ("delta-bf16", "fp32"))
        self.store_device = store_device
        self.buffers = one_of("buffers", buffers, ("model", "recalibrate", "keep"))
        self.include = patterns("include", include)
        self.exclude = patterns("exclude", exclude)
        self.profile = one_of("profile", profile, ("reference", "mean"))
        self.shrink = shrink
        if not 0 < forgetting <= 1:
            message = f"forgetting must be above 0 and at most 1; it is {forgetting!r}."
            raise InputError(message)
        self.forgetting = forgetting
        self.prefix = prefix
        self.prog_bar = prog_bar
        if self.every_n_steps is not None and self.every_n_epochs != 1:
            message = "every_n_steps and every_n_epochs exclude each other: give one of them."
            raise InputError(message)
        self._listener: LogListener | None = None

    @property
    @override
    def state_key(self) -> str:
        """Key in a checkpoint; two of these callbacks in one trainer differ by their prefix."""
        return self._generate_state_key(prefix=self.prefix)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether to take a snapshot now. Override it for a schedule of your own.

        It is asked once after each optimizer step that ends a batch, with ``step_idx``, and once at
        the end of each epoch, with ``epoch_idx``.

        Args:
            step_idx: 0-based index of the latest optimizer step, else None.
            epoch_idx: 0-based index of the epoch that ended, else None.
        """
        if step_idx is not None:
            every = self.every_n_steps
            # A batch may take several steps, so it is the crossing of a multiple that counts.
            return every is not None and (step_idx + 1) // every > self._asked_step // every
        if epoch_idx is None or self.every_n_steps is not None:
            return False
        return (epoch_idx + 1) % self.every_n_epochs == 0

    @override
    def new_modes(self, trainer: Trainer, pl_module: LightningModule, warmup: int) -> OnlineModes:
        """Build the empty state for a module with this callback's settings."""
        return OnlineModes(
            pl_module,
            self.number_of_modes,
            warmup,
            self.samples,
            seed=self.seed,
            storage=self.storage,
            store_device=self.store_device,
            buffers=self.buffers,
            include=self.include,
            exclude=self.exclude,
            profile=self.profile,
            shrink=self.shrink,
            forgetting=self.forgetting,
            embedding=self.embedding,
            broadcast=broadcast_from_rank_zero(trainer, pl_module),
        )

    # -- life of a run -----------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, before anything runs.

        Raises:
            PluginError: Under a sharded strategy, beside ``WeightAveraging`` with the same place in
                the checkpoint, or with ``evaluate="both"`` and a ``dataloader_iter`` step.
        """
        refuse_sharded(trainer, type(self).__name__)
        self._hide()
        self._offered = self._restored = False
        self._refuse_rival(trainer)
        if self.evaluate == "both" and takes_data_loader_iterator(pl_module):
            message = (
                "evaluate='both' cannot repeat a validation_step(dataloader_iter) that fetches its "
                "own batches: use evaluate='modelled' or 'raw'."
            )
            raise PluginError(message)
        run_before_monitors(trainer, self, self.prefix)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start, or continue from a checkpoint, as far as the length of the warm-up is known."""
        self._prepare(trainer, pl_module, start=True)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fix the warm-up, which may depend on the training data, and the schedule's counters."""
        fresh = self.modes is None and self._pending is None
        if fresh and isinstance(self.warmup, float):
            planned = planned_snapshots(trainer, self.every_n_epochs, self.every_n_steps)
            self._resolved_warmup = resolve_warmup(self.warmup, planned)
        self._prepare(trainer, pl_module, start=True)
        if not self._restored:  # e.g. the second fit() of one module, by a new trainer
            self._asked_step = trainer.global_step
            self._asked_epoch = trainer.current_epoch - 1
        self.watch_steps(trainer)
        if self.modes is not None and not self.modes.ready:
            needed = self.modes.settings.warmup + 1
            warn_when_too_short(trainer, self.every_n_epochs, self.every_n_steps, needed)

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Take the snapshots of this step and, after the last batch, of this epoch."""
        if self.buffers == "recalibrate":
            self._recent.append(batch)
        step = trainer.global_step
        if step > self._asked_step:
            due = self.should_update(step_idx=step - 1)
            self._asked_step = step
            if due:
                self.take_snapshot(trainer, pl_module, label=step)
        if epoch_is_over(trainer, batch_idx):
            self._end_epoch(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Catch an epoch whose last batch was not known beforehand, then log."""
        self._end_epoch(trainer, pl_module)
        if self.modes is None or trainer.barebones:
            return
        metrics = {"state_bytes": float(self.modes.state_bytes)}
        if self.modes.ready:
            metrics["explained_variance"] = self.modes.explained_variance()
        if self.embedding is not None:
            metrics["embedded_fraction"] = self.modes.embedded_fraction
            metrics["saved_percent"] = self.modes.saved_percent
        metrics = {f"{self.prefix}{name}": value for name, value in metrics.items()}
        # sync_dist is free here in one process, and spares the user Lightning's warning in several.
        pl_module.log_dict(metrics, prog_bar=self.prog_bar, batch_size=1, sync_dist=True)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the raw weights back, before a checkpoint of the crash is written."""
        self._hide()
        self.ignore_steps()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing behind on the module and the optimizers."""
        self._hide()
        self.ignore_steps()

    # -- evaluation ----------------------------------------------------------------------------

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the weights that this validation is about."""
        if trainer.sanity_checking:
            return
        if runs(trainer, "fit"):
            if epoch_is_over(trainer):
                self._end_epoch(trainer, pl_module)
        else:
            self._prepare_evaluation(trainer, pl_module)
        if self.evaluate == "modelled":
            self.show_modelled(trainer, pl_module)
        elif self.evaluate == "both" and not self._can_show(pl_module):
            self._listener = LogListener(pl_module).__enter__()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the raw weights back, and add the metrics of the modelled ones."""
        listener = self._listener
        self._hide()
        if trainer.sanity_checking or self.evaluate != "both" or trainer.barebones:
            return
        if listener is not None:
            metrics = listener.found_in(trainer.callback_metrics)
        else:
            try:
                self.show_modelled(trainer, pl_module)
                metrics = second_pass(trainer, pl_module)
            finally:
                self._hide()
        publish(trainer, metrics, self.prefix, self.prog_bar)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the modelled weights, if that is wanted and there are any."""
        self._prepare_evaluation(trainer, pl_module)
        if self.test == "modelled" and not self.show_modelled(trainer, pl_module):
            _logger.warning(
                "No modelled weights for this module (before the fit, or never trained with this "
                "callback): the raw weights are used."
            )

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the raw weights back."""
        self._hide()

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the modelled weights, if that is wanted and there are any."""
        self.on_test_start(trainer, pl_module)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the raw weights back."""
        self._hide()

    # -- helpers ---------------------------------------------------------------------------

    def _hide(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.__exit__()
        self.hide_modelled()

    def _end_epoch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch
        if epoch <= self._asked_epoch:
            return
        self._asked_epoch = epoch
        if self.should_update(epoch_idx=epoch):
            self.take_snapshot(trainer, pl_module, label=epoch)
