"""What a validation logs: heard as it passes, or kept and published under other names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

from cmd_plugin.errors import InputError

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["LogListener", "LogRecorder", "Published", "publish"]

_MISSING = object()
_REDUCTIONS = ("mean", "sum", "min", "max")
_EXTREMES: dict[str, Callable[[list[float]], float]] = {"min": min, "max": max}


@dataclass(frozen=True)
class Published:
    """One metric of a validation, ready for the trainer and its loggers.

    Attributes:
        value: 0-dim float tensor.
        forked: Whether the module logged it per step and per epoch: Lightning has it twice then.
        logger: Whether the module wants it in the loggers.
        higher: Whether more is better, where a torchmetrics object says so.
    """

    value: Tensor
    forked: bool
    logger: bool
    higher: bool | None = None


@dataclass
class _Entry:
    """What was logged under one name: a torchmetrics object, or a running reduction."""

    reduction: str
    forked: bool
    logger: bool
    value: Any  # a torchmetrics.Metric, or the running Tensor
    weight: float = 0
    higher: bool | None = None

    def add(self, value: Tensor, weight: int) -> None:
        if self.reduction == "mean":
            self.value = self.value + value * weight
            self.weight = self.weight + weight
        elif self.reduction == "sum":
            self.value = self.value + value
        else:
            smaller_or_larger = {"min": torch.minimum, "max": torch.maximum}[self.reduction]
            self.value = smaller_or_larger(self.value, value)

    def result(self) -> Any:
        return self.value / self.weight if self.reduction == "mean" else self.value

    def published(self, value: Tensor) -> Published:
        return Published(value, self.forked, self.logger, self.higher)


class _Diverted:
    """Context manager: calls of ``module.log`` arrive here, on this one instance only."""

    def __init__(self, pl_module: LightningModule) -> None:
        self._pl_module = pl_module
        self._original: Callable[..., None] = pl_module.log
        # Lightning's own, in case the module's class overrides it with fewer names.
        owner = next(kind for kind in reversed(type(pl_module).__mro__) if "log" in vars(kind))
        self._signature = inspect.signature(vars(owner)["log"])
        self._previous: Any = _MISSING

    def __enter__(self) -> _Diverted:
        attributes = self._pl_module.__dict__
        self._previous = attributes.get("log", _MISSING)
        # Into __dict__, past the class: log_dict() finds it there too, and removing it is exact.
        attributes["log"] = self._log
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is _MISSING:
            self._pl_module.__dict__.pop("log", None)
        else:
            self._pl_module.__dict__["log"] = self._previous

    # As Lightning's own logging: traced, it would cost seconds of compilation and save nothing.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _log(self, *args: Any, **kwargs: Any) -> None:
        bound = self._signature.bind(self._pl_module, *args, **kwargs)
        bound.apply_defaults()
        self._take(**{key: bound.arguments[key] for key in list(bound.arguments)[1:]})

    def _take(self, **options: Any) -> None:
        raise NotImplementedError


class LogListener(_Diverted):
    """Lets every call through and remembers which epoch metrics the validation logs."""

    def __init__(self, pl_module: LightningModule) -> None:
        super().__init__(pl_module)
        self._names: dict[str, tuple[bool, bool]] = {}

    def __enter__(self) -> LogListener:
        super().__enter__()
        return self

    def _take(self, **options: Any) -> None:
        if options["on_epoch"] is not False:
            forked = bool(options["on_step"])
            self._names[options["name"]] = (forked, options["logger"] is not False)
        self._original(**options)

    def found_in(self, metrics: Mapping[str, Tensor]) -> dict[str, Published]:
        """Pick the heard names, with their data loader suffixes, out of the trainer's metrics."""
        found: dict[str, Published] = {}
        for name, (forked, logger) in self._names.items():
            for key, value in metrics.items():
                if key == name or key.startswith(f"{name}/dataloader_idx_"):
                    found[key] = Published(value.detach().clone(), forked, logger)
        return found


class LogRecorder(_Diverted):
    """Keeps what a validation pass logs, reduced over the epoch as Lightning reduces it.

    Numbers and tensors are averaged with the batch sizes as weights (or summed, or their extreme is
    kept, when the call asks for that); torchmetrics objects are computed at the end. Values logged
    per step only are dropped, since the pass stands for one epoch value.
    """

    def __init__(self, pl_module: LightningModule) -> None:
        super().__init__(pl_module)
        self._entries: dict[tuple[str, str], _Entry] = {}
        self._batch: Any = None
        self._batch_size: int | None = None
        self._hook = "on_validation_epoch_start"
        self._loader: int | None = None

    def __enter__(self) -> LogRecorder:
        super().__enter__()
        return self

    def on_hook(self, hook: str) -> None:
        """Name the hook that runs now: one name logged in two hooks is two metrics."""
        self._hook = hook

    def on_batch(self, batch: Any, loader: int | None) -> None:
        """Tell which batch is under way (None at the end), and which loader if there are more."""
        if loader != self._loader:
            self._compute_metrics()  # one object logged for several loaders has one value for each
        self._batch, self._batch_size, self._loader = batch, None, loader

    def _compute_metrics(self) -> None:
        for entry in self._entries.values():
            if isinstance(entry.value, Metric):
                entry.value = torch.as_tensor(entry.value.compute()).detach()

    def _take(self, **options: Any) -> None:
        if options["on_epoch"] is False:
            return
        name, value = options["name"], options["value"]
        if self._loader is not None and options["add_dataloader_idx"]:
            name = f"{name}/dataloader_idx_{self._loader}"
        forked, logger = bool(options["on_step"]), options["logger"] is not False
        key = (self._hook, name)
        if isinstance(value, Metric):
            higher = value.higher_is_better
            self._entries[key] = _Entry("metric", forked, logger, value, higher=higher)
            return
        tensor = self._as_float(value)
        if key not in self._entries:
            reduction = _reduction_name(options["reduce_fx"])
            start = {"min": float("inf"), "max": float("-inf")}.get(reduction, 0.0)
            self._entries[key] = _Entry(reduction, forked, logger, torch.full_like(tensor, start))
        self._entries[key].add(tensor, self._weight(options["batch_size"]))

    def _as_float(self, value: Tensor | float) -> Tensor:
        # The dtypes Lightning keeps, so that equal weights give equal numbers to the last bit.
        default = torch.get_default_dtype()
        default = default if default in (torch.float32, torch.float64) else torch.float32
        if not isinstance(value, Tensor):
            return torch.tensor(value, dtype=default, device=self._pl_module.device)
        value = value.detach().squeeze()
        return value if value.dtype in (torch.float32, torch.float64) else value.to(default)

    def _weight(self, batch_size: int | None) -> int:
        if batch_size is not None:
            return batch_size
        if self._batch_size is None:
            found = None if self._batch is None else _first_batch_size(self._batch)
            self._batch_size = 1 if found is None else found
        return self._batch_size

    def results(self) -> dict[str, Published]:
        """Reduce over the epoch and over the processes. Every process has to call this.

        Means are taken over all samples of all processes, whether or not the call asked for
        ``sync_dist``: a monitor must see the same number everywhere.
        """
        self._compute_metrics()  # synchronises by itself
        local = {name: entry for (_, name), entry in self._entries.items()}
        if _processes() == 1:
            return {name: entry.published(entry.result()) for name, entry in local.items()}
        return _merge(local, self._pl_module.device)


def _merge(local: Mapping[str, _Entry], device: torch.device) -> dict[str, Published]:
    # As objects: a name that only one rank logged must not leave the others waiting.
    plain = {
        name: replace(entry, value=float(entry.value), weight=float(entry.weight))
        for name, entry in local.items()
    }
    gathered: list[Any] = [None] * _processes()
    torch.distributed.all_gather_object(gathered, plain)
    merged: dict[str, Published] = {}
    for name in dict.fromkeys(name for rank in gathered for name in rank):
        rows: list[_Entry] = [rank[name] for rank in gathered if name in rank]
        first, values = rows[0], [row.value for row in rows]
        if first.reduction == "mean":
            number = sum(values) / sum(row.weight for row in rows)
        elif first.reduction == "metric":
            number = first.value
        else:
            number = sum(values) if first.reduction == "sum" else _EXTREMES[first.reduction](values)
        merged[name] = first.published(torch.tensor(number, dtype=torch.float32, device=device))
    return merged


def publish(trainer: Trainer, metrics: Mapping[str, Published], prefix: str, bar: bool) -> None:
    """Hand metrics to the trainer's monitors and loggers, under ``prefix`` plus their names.

    The names follow Lightning: a metric logged per step and per epoch appears as ``name`` and
    ``name_epoch`` for monitors, and as ``name_epoch`` in the loggers.
    """
    monitored: dict[str, Tensor] = {}
    logged: dict[str, Tensor] = {}
    for name, metric in metrics.items():
        head, slash, tail = name.partition("/dataloader_idx_")
        epoch_name = prefix + (f"{head}_epoch{slash}{tail}" if metric.forked else name)
        monitored[prefix + name] = monitored[epoch_name] = metric.value
        if metric.logger:
            logged[epoch_name] = metric.value
    # These three properties hand out the trainer's own dictionaries.
    trainer.callback_metrics.update(monitored)
    if bar:
        trainer.progress_bar_metrics.update({key: float(v) for key, v in logged.items()})
    if not logged or not trainer.loggers:
        return
    trainer.logged_metrics.update(logged)
    numbers = {key: float(value) for key, value in logged.items()}
    numbers["epoch"] = float(trainer.current_epoch)
    step = trainer.fit_loop.epoch_loop._batches_that_stepped  # the x axis of the raw metrics
    for logger in trainer.loggers:
        logger.log_metrics(metrics=numbers, step=step)
        logger.save()


def _reduction_name(reduce_fx: Any) -> str:
    name = reduce_fx.lower() if isinstance(reduce_fx, str) else getattr(reduce_fx, "__name__", "")
    name = "mean" if name == "avg" else name
    if name not in _REDUCTIONS:
        message = (
            f"self.log(reduce_fx={reduce_fx!r}) cannot be averaged over a validation: use one of "
            f"{', '.join(_REDUCTIONS)}, or log a torchmetrics.Metric."
        )
        raise InputError(message)
    return str(name)


def _first_batch_size(batch: Any) -> int | None:
    """Length of the first axis of the first tensor in a nested batch, as Lightning infers it."""
    if isinstance(batch, Tensor):
        return batch.size(0) if batch.ndim else 1
    if isinstance(batch, Mapping):
        items = list(batch.values())
    elif isinstance(batch, (list, tuple)):
        items = list(batch)
    elif is_dataclass(batch):
        items = [getattr(batch, field.name) for field in fields(batch)]
    else:
        return None
    return next((size for size in map(_first_batch_size, items) if size is not None), None)


def _processes() -> int:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1
