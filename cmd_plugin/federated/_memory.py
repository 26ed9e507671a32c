"""What Flower's own objects remember, as plain values that can be saved and given back.

Plain are dicts with text keys, lists, numbers, texts, True, False, None and tensors on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from cmd_plugin.errors import InputError, StateMismatch
from cmd_plugin.federated._flower import dense_record, numpy_arrays

__all__ = [
    "bytes_of",
    "read_named_arrays",
    "read_records",
    "require_same",
    "restore_strategy",
    "save_named_arrays",
    "save_records",
    "save_strategy",
    "tensor_of",
]

# Flower's strategies have no state_dict. These are the attributes by which a round depends on the
# rounds before; all others are settings.
_REMEMBERED: dict[str, tuple[str, ...]] = {
    "Bulyan": (),
    "FedAdagrad": ("current_arrays", "m_t", "v_t"),
    "FedAdam": ("current_arrays", "m_t", "v_t"),
    "FedAvg": (),
    "FedAvgM": ("current_arrays", "momentum_vector"),
    "FedMedian": (),
    "FedProx": (),
    "FedTrimmedAvg": (),
    "FedYogi": ("current_arrays", "m_t", "v_t"),
    "Krum": (),
    "MultiKrum": (),
    "QFedAvg": (),
}


def tensor_of(data: bytes) -> Tensor:
    """Return bytes as a tensor."""
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def bytes_of(tensor: Tensor) -> bytes:
    """Return the bytes that :func:`tensor_of` was given."""
    return tensor.numpy().tobytes()


def require_same(before: Mapping[str, Any], now: Mapping[str, Any], what: str) -> None:
    """Refuse a state that was made with other settings.

    Args:
        before: The saved settings.
        now: Those of the object that is to continue.
        what: The saved thing, for the message.

    Raises:
        StateMismatch: Naming the first difference.
    """
    for name, value in now.items():
        if before.get(name) != value:
            raise StateMismatch(
                f"{what} was made with {name}={before.get(name)!r}, not {value!r}: use the same "
                "value to continue."
            )


# -- records --------------------------------------------------------------------------------------


def save_named_arrays(record: ArrayRecord) -> list[Any]:
    """Return numeric arrays as rows of name and tensor, in their order."""
    return [[name, _tensor(array)] for name, array in numpy_arrays(record).items()]


def read_named_arrays(rows: Iterable[Any]) -> ArrayRecord:
    """Read what :func:`save_named_arrays` returned."""
    return dense_record({name: tensor.numpy().copy() for name, tensor in rows})


def save_records(records: RecordDict) -> list[Any]:
    """Return the records of a context or message as rows; arrays of any type keep their bytes."""
    rows: list[Any] = []
    for name, record in records.items():
        if isinstance(record, ArrayRecord):
            arrays = [
                [key, array.dtype, list(array.shape), array.stype, tensor_of(array.data)]
                for key, array in record.items()
            ]
            rows.append([name, "arrays", arrays])
        else:
            kind = "metrics" if isinstance(record, MetricRecord) else "config"
            rows.append([name, kind, [[key, _plain(value)] for key, value in record.items()]])
    return rows


def read_records(rows: Iterable[Any]) -> RecordDict:
    """Read what :func:`save_records` returned."""
    records = RecordDict()
    for name, kind, content in rows:
        if kind == "arrays":
            records[name] = ArrayRecord(
                {
                    key: Array(dtype, tuple(shape), stype, bytes_of(data))
                    for key, dtype, shape, stype, data in content
                }
            )
        elif kind == "metrics":
            records[name] = MetricRecord(dict(content))
        elif kind == "config":
            records[name] = ConfigRecord({key: _from_plain(value) for key, value in content})
        else:
            raise StateMismatch(f"a record of kind {kind!r} is not known: start anew.")
    return records


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return tensor_of(value) if isinstance(value, bytes) else value


def _from_plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_plain(item) for item in value]
    return bytes_of(value) if isinstance(value, Tensor) else value


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array))  # a copy, of a scalar as well


# -- strategies -----------------------------------------------------------------------------------


def save_strategy(strategy: Strategy) -> dict[str, Any]:
    """Return what a strategy carries from round to round.

    Args:
        strategy: One with a ``state_dict`` of its own, or one of Flower's.

    Raises:
        InputError: If it is neither, or one of Flower's whose memory cannot be saved: its privacy
            wrappers keep accountants, and draw from global generators.
    """
    if hasattr(strategy, "state_dict"):
        own: dict[str, Any] = strategy.state_dict()
        return own
    kind, names = _remembered(strategy)
    return {"kind": kind, "memory": {name: _memory(getattr(strategy, name)) for name in names}}


def restore_strategy(strategy: Strategy, state: Mapping[str, Any]) -> None:
    """Continue from what :func:`save_strategy` returned.

    Raises:
        StateMismatch: If it is the state of another strategy; nothing is changed then.
    """
    if hasattr(strategy, "load_state_dict"):
        strategy.load_state_dict(state)
        return
    kind, names = _remembered(strategy)
    require_same(state, {"kind": kind}, "the saved strategy")
    try:
        memory = {name: _read_memory(state["memory"][name]) for name in names}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StateMismatch(f"the saved {kind} is damaged ({error!r}): start anew.") from error
    vars(strategy).update(memory)


def _remembered(strategy: Strategy) -> tuple[str, tuple[str, ...]]:
    kind = type(strategy)
    if kind.__name__ in _REMEMBERED and kind.__module__.startswith("flwr."):
        return kind.__name__, _REMEMBERED[kind.__name__]
    raise InputError(
        f"what {kind.__name__} carries from round to round cannot be saved: give it state_dict() "
        "and load_state_dict()."
    )


def _memory(value: Any) -> Any:
    """One attribute: None, a record, or arrays in a dict or a list."""
    if value is None:
        return None
    if isinstance(value, ArrayRecord):
        return ["record", save_named_arrays(value)]
    if isinstance(value, dict):
        return ["dict", [[name, _tensor(array)] for name, array in value.items()]]
    return ["list", [_tensor(array) for array in value]]


def _read_memory(saved: Any) -> Any:
    if saved is None:
        return None
    kind, content = saved
    if kind == "record":
        return read_named_arrays(content)
    if kind == "dict":
        return {name: tensor.numpy().copy() for name, tensor in content}
    return [tensor.numpy().copy() for tensor in content]
