"""CMDCallback: Correlation Mode Decomposition beside a Lightning training run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from typing_extensions import override

from cmd_plugin.callbacks._arguments import fraction, one_of, patterns, whole
from cmd_plugin.callbacks._checkpoint import VERSION, check_version, load_raw, read_checkpoint
from cmd_plugin.callbacks._far_worse import warn_when_far_worse
from cmd_plugin.callbacks._followed import FollowedModule
from cmd_plugin.callbacks._lightning import Callback
from cmd_plugin.callbacks._recording import LogListener, publish
from cmd_plugin.callbacks._schedule import Schedule
from cmd_plugin.callbacks._second_pass import refuse_data_loader_iterator, second_pass
from cmd_plugin.callbacks._statistics import ModelledStatistics
from cmd_plugin.callbacks._steps import StepHooks, embedding_of
from cmd_plugin.callbacks._trainer import (
    broadcast_from_rank_zero,
    buffers_of_rank_zero,
    check_checkpoints,
    epoch_is_over,
    refuse_sharded,
    run_before_monitors,
    runs,
    warn_of_raw_weights,
    warn_of_unfrozen,
)
from cmd_plugin.modes import OnlineModes

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["CMDCallback"]


class CMDCallback(Callback):
    """Watches the weights of a training run and evaluates their low-dimensional model.

    After each epoch, before validation (or every n steps), the weights are handed to
    :class:`cmd_plugin.modes.OnlineModes`. Once ``warmup + 1`` snapshots are seen, every weight is
    modelled as an affine function of one of a few reference weights, and the modelled weights are
    what this callback shows: in validation beside or instead of the raw ones, and in
    ``trainer.test`` and ``trainer.predict``. With ``mode="online"`` training is never touched: with
    and without the callback it gives the same losses, weights and random numbers, bit for bit.
    ``mode="embedded"`` changes it: more and more weights get a frozen scale and offset and follow
    their reference (the paper's section 3.4); the raw weights are those of this training.

    With ``evaluate="both"`` the trainer's own validation shows the raw weights, then the module's
    ``validation_step`` runs once more with the modelled ones, and what it logs appears under
    ``prefix``: ``cmd/val_acc`` beside ``val_acc``, for loggers and for
    ``ModelCheckpoint(monitor="cmd/val_acc")``. Before the fit the raw numbers are repeated there,
    and such a checkpoint holds raw weights unless ``checkpoint_weights="modelled"`` is given.
    The second pass calls the module's ``on_validation_epoch_*`` and ``on_validation_batch_*`` hooks
    but no other callback; code can ask :attr:`showing`. Its means are over all processes.

    BatchNorm's statistics of the raw run can put modelled weights at chance, so they are estimated
    anew for each snapshot, on the latest batches of the epoch it ends, by calling the module with
    :meth:`recalibration_input` of each. Checkpoints hold them.

    With the default settings (the paper's) modelled weights were worse than raw ones, by more than
    noise, on four of twelve problems measured and better on one; with ``profile="mean",
    forgetting=0.9`` worse on one, by a point, and better on three (``docs/choosing.md``).

    A warning says once a run that modelled weights are far worse than raw ones: a metric named like
    an accuracy fell by more than 0.1 and by more than 20 %, or one named like a loss more than
    doubled (torchmetrics objects say by ``higher_is_better`` which of both they are).

    Logged after each training epoch: ``cmd/explained_variance`` (at most 1, over all snapshots),
    ``cmd/state_bytes``, and with ``mode="embedded"`` ``cmd/embedded_fraction`` (0 to 1) and
    ``cmd/saved_percent`` (as the paper counts it).

    What is modelled is decided at the start of the fit: weights unfrozen later stay raw, which a
    warning says once. Resuming is exact at any phase; only the statistics of an epoch that was
    entered in its middle rest on the batches after that. Sharded strategies (FSDP, DeepSpeed) are
    refused.

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
        buffers: BatchNorm statistics of modelled weights: ``"recalibrate"`` them on training
            batches, ``"model"`` them like weights (the authors' way) or ``"keep"`` the raw run's.
        include: Globs (``net.*``) of parameter names to model; all when empty.
        exclude: Globs of parameter names to leave raw.
        profile: ``"reference"`` (one weight per mode) or ``"mean"`` of the mode's samples.
        shrink: Whether to shrink each weight's scale by its squared correlation with its profile.
        forgetting: Forgetting factor in (0, 1]; 1 weighs all history equally.
        embed_every: Snapshots L between two embedding events.
        embed_percent: Percentage P of the weights that an event chooses, in (0, 100].
        relative: Whether P is of the weights that are still free, instead of all.
        project: When embedded weights are written: before each snapshot (``"epoch"``, the authors)
            or after each optimizer step: from the references (``"step"``), which are first put
            where their members agree best (``"pool"``) or got their gradients by the chain rule
            (``"tie"``; before clipping, each optimizer for its own parameters).
        slots: ``"leave"`` or ``"zero"`` the optimizers' momenta of embedded weights.
        checkpoint_weights: ``"modelled"`` writes the modelled weights under ``state_dict`` of full
            checkpoints and the raw ones under ``current_model_state`` (the convention of
            Lightning's ``WeightAveraging``); training still resumes from the raw ones.
        prefix: Put before the names of the logged metrics.
        prog_bar: Whether these metrics also show in the progress bar.
        recalibration_batches: Largest number of training batches kept, on their device.

    Attributes:
        seconds: Wall-clock seconds this process spent in updates (on a GPU: until they are queued).

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
        buffers: Literal["recalibrate", "model", "keep"] = "recalibrate",
        include: tuple[str, ...] = (),
        exclude: tuple[str, ...] = (),
        profile: Literal["reference", "mean"] = "reference",
        shrink: bool = False,
        forgetting: float = 1.0,
        embed_every: int = 10,
        embed_percent: float = 10.0,
        relative: bool = False,
        project: Literal["epoch", "step", "tie", "pool"] = "epoch",
        slots: Literal["leave", "zero"] = "leave",
        checkpoint_weights: Literal["raw", "modelled"] = "raw",
        prefix: str = "cmd/",
        prog_bar: bool = False,
        recalibration_batches: int = 8,
    ) -> None:
        super().__init__()
        self.mode = one_of("mode", mode, ("online", "embedded"))
        self.embedding = embedding_of(mode, embed_every, embed_percent, relative, project, slots)
        self.number_of_modes = whole("modes", modes, 1, 256)
        self.warmup = warmup if 0 < warmup < 1 else whole("warmup", warmup, 2)
        self.samples = whole("samples", samples, 1)
        self.seed = seed
        self._schedule = Schedule(every_n_epochs, every_n_steps)
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.evaluate = one_of("evaluate", evaluate, ("both", "modelled", "raw"))
        self.test = one_of("test", test, ("modelled", "raw"))
        self.storage = one_of("storage", storage, ("delta-bf16", "fp32"))
        self.store_device = store_device
        self.buffers = one_of("buffers", buffers, ("model", "recalibrate", "keep"))
        self.include = patterns("include", include)
        self.exclude = patterns("exclude", exclude)
        self.profile = one_of("profile", profile, ("reference", "mean"))
        self.shrink = shrink
        self.forgetting = fraction("forgetting", forgetting)
        weights = one_of("checkpoint_weights", checkpoint_weights, ("raw", "modelled"))
        self.checkpoint_weights = weights
        self.prefix = prefix
        self.prog_bar = prog_bar

        self.seconds = 0.0
        self._statistics = ModelledStatistics(recalibration_batches, buffers == "recalibrate")
        self._followed = FollowedModule(self._statistics)
        self._steps = StepHooks()
        self._listener: LogListener | None = None
        self._offered = False  # whether this run's checkpoint has been looked at
        self._warned = self._told = False  # of weights far worse, of weights unfrozen

    @property
    def modes(self) -> OnlineModes | None:
        """The modes of the run; None before ``fit`` starts."""
        return self._followed.modes

    @property
    def showing(self) -> Literal["raw", "modelled"]:
        """Which weights the module holds at this moment."""
        return "modelled" if self._followed.shown else "raw"

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether to take a snapshot now. Override it for a schedule of your own.

        It is asked once after each optimizer step that ends a batch, with ``step_idx``, and once at
        the end of each epoch, with ``epoch_idx``.

        Args:
            step_idx: 0-based index of the latest optimizer step, else None.
            epoch_idx: 0-based index of the epoch that ended, else None.
        """
        return self._schedule.is_due(step_idx, epoch_idx)

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

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, before anything runs.

        Raises:
            PluginError: Under a sharded strategy, beside ``WeightAveraging`` with the same place in
                the checkpoint, or with ``evaluate="both"`` and a ``dataloader_iter`` step.
        """
        refuse_sharded(trainer, type(self).__name__)
        self._leave()
        self._offered = self._warned = self._told = self._schedule.restored = False
        check_checkpoints(trainer, self.checkpoint_weights, self.prefix)
        if self.evaluate == "both":
            refuse_data_loader_iterator(pl_module)
        run_before_monitors(trainer, self, self.prefix)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start, or continue from a checkpoint, as far as the length of the warm-up is known."""
        self._prepare(trainer, pl_module, start=True)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fix the warm-up, which may depend on the training data, and the schedule's counters."""
        if isinstance(self.warmup, float) and not self._followed.known:
            self._followed.warmup = self._schedule.resolve_warmup(trainer, self.warmup)
        self._prepare(trainer, pl_module, start=True)
        self._schedule.begin(trainer)
        self._statistics.start(pl_module)
        if self.embedding is not None:
            self._steps.watch(trainer.optimizers, self.embedding.project, self._after_step)
        if self.modes is not None and not self.modes.ready:
            self._schedule.warn_when_too_short(trainer, self.modes.settings.warmup + 1)

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """With ``project="tie"``, hand the gradients of embedded weights to the references.

        Lightning calls this when gradients are accumulated, reduced over the processes and
        unscaled, and before it clips them.
        """
        tied = self.embedding is not None and self.embedding.project == "tie"
        if self.modes is not None and tied:
            with self._timed():
                self.modes.tie_gradients(optimizer)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self.modes is not None:
            with self._timed():
                self.modes.project(optimizers=[optimizer])

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the snapshots of this step and, after the last batch, of this epoch."""
        self._followed.keep_batch(trainer, pl_module, batch, self.recalibration_input)
        step = self._schedule.next_step(trainer)
        if step is not None and self.should_update(step_idx=step - 1):
            self.take_snapshot(trainer, pl_module, label=step)
        if epoch_is_over(trainer, batch_idx):
            self._end_epoch(trainer, pl_module)

    def take_snapshot(self, trainer: Trainer, pl_module: LightningModule, label: int) -> None:
        """Write the embedded weights, then hand all weights, as they are now, to :attr:`modes`.

        Args:
            trainer: The trainer that runs.
            pl_module: The module whose weights are read.
            label: Number of the snapshot: the epoch, or the optimizer step.
        """
        if self.modes is None:
            return
        with self._timed():
            if self.embedding is not None:
                self.modes.project(optimizers=trainer.optimizers)
            with buffers_of_rank_zero(trainer, pl_module, self.modes.layout.names):
                self.modes.update(label=label)
        self._statistics.expire()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Catch an epoch whose last batch was not known beforehand, then log."""
        self._end_epoch(trainer, pl_module)
        if not self._told and trainer.is_global_zero:
            unfrozen = self._followed.unfrozen(pl_module, self.include, self.exclude)
            self._told = bool(unfrozen)
            if unfrozen:
                warn_of_unfrozen(unfrozen)
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
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the batches go, when the statistics they are for are known."""
        self._followed.find_statistics(trainer, pl_module, self.recalibration_input)
        self._statistics.forget_batches()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._leave()  # before a checkpoint of the crash is written

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._leave()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the weights that this validation is about."""
        if trainer.sanity_checking:
            return
        if not runs(trainer, "fit"):
            self._prepare_evaluation(trainer, pl_module)
        elif epoch_is_over(trainer):
            self._end_epoch(trainer, pl_module)
        if self.evaluate == "modelled":
            self.show_modelled(trainer, pl_module)
        elif self.evaluate == "both" and not self._followed.can_show(pl_module):
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
            self._warned = self._warned or warn_when_far_worse(trainer, metrics, self.buffers)
        publish(trainer, metrics, self.prefix, self.prog_bar)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the modelled weights, if that is wanted and there are any."""
        self._prepare_evaluation(trainer, pl_module)
        if self.test == "modelled" and not self.show_modelled(trainer, pl_module):
            warn_of_raw_weights()

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._hide()

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_test_start(trainer, pl_module)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._hide()

    def show_modelled(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Put the modelled weights into the module until :meth:`hide_modelled`.

        Returns:
            Whether the module now holds modelled weights: not before the fit, and not if it is
            another module than the one that was followed.

        Raises:
            InputError: With ``buffers="recalibrate"``, if the statistics of a BatchNorm are in no
                checkpoint and there are no batches to estimate them on.
        """
        return self._followed.show(trainer, pl_module, self.recalibration_input)

    def hide_modelled(self) -> None:
        """Put the raw weights back, bit for bit; nothing happens if the module holds them."""
        self._followed.hide()

    def recalibration_input(self, batch: Any) -> Any:
        """What the module's ``forward`` takes of a training batch; a list or tuple gives its first.

        Override it for other batches, together with ``buffers="recalibrate"``.
        """
        return batch[0] if isinstance(batch, (list, tuple)) else batch

    @property
    @override
    def state_key(self) -> str:
        """Key in a checkpoint; two of these callbacks in one trainer differ by their prefix."""
        return self._generate_state_key(prefix=self.prefix)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings, None, lists and dicts: loads with ``weights_only=True``."""
        return {"version": VERSION, **self._schedule.state_dict(), **self._followed.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until there is a model on its device to check it against.

        Raises:
            StateMismatch: If another version of this class wrote the state.
        """
        check_version(state_dict)
        self._schedule.load_state_dict(state_dict)
        self._followed.load_state_dict(state_dict)

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take raw weights where the checkpoint shows modelled ones; forget what is not in it."""
        self._offered = True
        if self.state_key in checkpoint.get("callbacks", {}):
            load_raw(pl_module, checkpoint)
        else:
            self._followed.forget()  # what we know belongs to other weights than the checkpoint's
            self._schedule.restored = False

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Complete the state, and show the modelled weights in the checkpoint if that is wanted."""
        modelled, take_input = self.checkpoint_weights == "modelled", self.recalibration_input
        self._followed.write_checkpoint(trainer, pl_module, checkpoint, take_input, modelled)
        checkpoint["callbacks"][self.state_key]["statistics"] = self._statistics.values

    def __getstate__(self) -> dict[str, Any]:
        """Leave the module behind: Lightning puts its methods for logging on the callbacks."""
        return {k: v for k, v in self.__dict__.items() if k not in ("log", "log_dict")}

    def _prepare_evaluation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._offered and trainer.ckpt_path:
            checkpoint = read_checkpoint(trainer)
            self.on_load_checkpoint(trainer, pl_module, checkpoint)
            if self.state_key in checkpoint.get("callbacks", {}):
                self.load_state_dict(checkpoint["callbacks"][self.state_key])
        self._prepare(trainer, pl_module, start=False)

    def _prepare(self, trainer: Trainer, pl_module: LightningModule, *, start: bool) -> None:
        new_modes = partial(self.new_modes, trainer, pl_module)
        self._followed.prepare(pl_module, self.warmup, new_modes, start=start)

    def _end_epoch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = self._schedule.next_epoch(trainer)
        if epoch is not None and self.should_update(epoch_idx=epoch):
            self._statistics.drop_before(epoch)
            self.take_snapshot(trainer, pl_module, label=epoch)

    def _hide(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.__exit__()
        self.hide_modelled()

    def _leave(self) -> None:
        """Leave nothing behind on the module and the optimizers."""
        self._hide()
        self._steps.stop()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started
