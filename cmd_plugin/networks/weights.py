"""Weights out of files: one reader for all of the package, and never an unpickled object.

Read are safetensors, what ``torch.save`` wrote (``.pt``, ``.pth``, ``.bin``, ``.ckpt``, ``.t7``, or
any other ending), and checkpoints in shards by their ``.index.json``. How a file is opened:

1. A dictionary inside that has one of the usual names (``state_dict``, ``model_state_dict``,
   ``model``, ``module``, ``net``; the first that is there) is taken in place of the whole, again
   and again. Averaging callbacks of Lightning put the weights that a network should be used with
   there, and those that are being trained under ``current_model_state``: which are meant is said by
   ``which``.
2. Of that, the tensors are taken. Each must be a plain one; anything else but a tensor is left out.
3. Names lose what ``torch.compile``, ``DistributedDataParallel``, ``AveragedModel``, FSDP and
   activation checkpointing put into them.
4. :func:`load_weights` alone also takes off a prefix that all names have in common and the network
   does not know, such as ``model.`` when a LightningModule held it, and leaves out how often an
   ``AveragedModel`` was updated.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from cmd_plugin.errors import InputError, StateMismatch
from cmd_plugin.networks.names import by_clean_name, clean_name
from cmd_plugin.runs.tensors import Schema

__all__ = [
    "INDEX_SUFFIX",
    "Which",
    "index_of_shard",
    "load_weights",
    "read_numbers",
    "read_weights",
    "save_weights",
    "shards_of",
]

Which = Literal["shown", "trained"]
"""``"shown"``: the weights to use a network with, averages or modelled ones where a callback put
them; ``"trained"``: those that the optimizer moved."""

INDEX_SUFFIX = ".index.json"

_SCHEMA = Schema("network", 1, "a network")

_NESTED = ("state_dict", "model_state_dict", "model", "module", "net")
_TRAINED = "current_model_state"
_COUNT = "n_averaged"  # what AveragedModel saves beside the network it holds
_DEEPEST = 8  # a file may hold a dictionary that holds itself
_MOST_REPEATED_BYTES = 64 * 1024**2  # by tensors that torch.expand made
_SHARD = re.compile(r"(.+)-[0-9]+-of-([0-9]+)(\.[a-z]+)")


def read_weights(path: str | Path, which: Which = "shown") -> dict[str, Tensor]:
    """Read a state_dict from a file, on the CPU; the module's text says how.

    Nothing is unpickled but tensors and plain containers (``weights_only=True``).

    Args:
        path: The file. Of a checkpoint in shards its index.
        which: ``"shown"`` or ``"trained"``, see :data:`Which`; the same for most files.

    Returns:
        Tensors by cleaned name, without gradients, in the file's order. Entries that are one tensor
        in a file of ``torch.save`` are one tensor here.

    Raises:
        InputError: If the file is missing or damaged, holds no weights, or one that is sparse,
            nested, quantised, has no values or says far more of them than the file has; names file
            and tensor.
    """
    path = Path(path)
    if which not in ("shown", "trained"):
        raise InputError(f"which must be 'shown' or 'trained', got {which!r}.")
    content = _open_nested(_read(path), which)
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        _require_plain(path, name, tensor)
    _require_stored(path, tensors)
    if not any(t.is_floating_point() or t.is_complex() for t in tensors.values()):
        raise InputError(f"{path} holds no weights: save the network's state_dict().")
    try:
        return by_clean_name((name, tensor.detach()) for name, tensor in tensors.items())
    except InputError as error:
        raise InputError(f"{path} cannot be used: {error}") from None


def save_weights(path: str | Path, state: Mapping[str, Tensor]) -> None:
    """Write a state_dict as safetensors that any reader takes, in one step.

    Args:
        path: The file.
        state: Tensors by name; those that share memory are written once each.

    Raises:
        InputError: If it cannot be written.
    """
    _SCHEMA.save(path, state, {})


def load_weights(model: nn.Module, path: str | Path, which: Which = "shown") -> None:
    """Load weights from a file into a network of the same layer names and shapes.

    Everything is checked first, so that a network is filled whole or not at all. Of tied weights
    the file may hold one.

    Args:
        model: The network; it may be wrapped as those of :func:`read_weights`.
        path: The file.
        which: See :func:`read_weights`.

    Raises:
        InputError: As :func:`read_weights`.
        StateMismatch: If names or shapes differ, or a complex weight is not complex in the network;
            the message names the first of them.
    """
    entries = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    own = {clean_name(name): tensor for name, tensor in entries.items()}
    state = read_weights(path, which)
    if _COUNT not in own:
        state.pop(_COUNT, None)
    state = _without_common_prefix(state, own)
    present = {_place(own[name]) for name in state if name in own}
    missing = [name for name, t in own.items() if name not in state and _place(t) not in present]
    surplus = [name for name in state if name not in own]
    if missing or surplus:
        lacking = f"lacks {missing[0]!r}" if missing else f"has {surplus[0]!r} besides"
        raise StateMismatch(
            f"{path} {lacking} ({len(missing)} missing, {len(surplus)} surplus): these are weights "
            "of another network."
        )
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise StateMismatch(
                f"{path}: {name} is {tuple(tensor.shape)}, the network's is "
                f"{tuple(own[name].shape)}: check the number of classes and the width."
            )
        if tensor.is_complex() and not own[name].is_complex():
            raise StateMismatch(
                f"{path}: {name} is complex, the network's is not: these are weights of another "
                "network."
            )
    raw_names = {clean_name(name): name for name in entries}
    # Not strict, because of state that is no tensor and of tied weights that the file has once.
    model.load_state_dict({raw_names[name]: t for name, t in state.items()}, strict=False)


def read_numbers(path: Path, names: tuple[str, ...]) -> dict[str, int]:
    """Whole numbers from 0 on that a file holds beside its weights, such as ``epoch``.

    No weights are read for it, unless the file is in torch's old format. Of a safetensors file its
    metadata count; a file that cannot be read has no numbers.

    Args:
        path: The file.
        names: What to look for.
    """
    try:
        if _is_index(path.name):
            return {}
        if path.suffix == ".safetensors":
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
            texts = {name: metadata.get(name, "") for name in names}
            return {n: int(text) for n, text in texts.items() if re.fullmatch(r"[0-9]{1,18}", text)}
        content = _torch_load(path, mmap=zipfile.is_zipfile(path))
        if not isinstance(content, Mapping):
            return {}
        found = {name: content.get(name) for name in names}
        return {name: n for name, n in found.items() if type(n) is int and n >= 0}
    except Exception:  # whoever reads the weights is told what is wrong with the file
        return {}


def index_of_shard(path: Path) -> Path | None:
    """The index file that belongs to a shard, by its name; None if it is not one of several."""
    match = _SHARD.fullmatch(path.name)
    if match is None or not match[2].lstrip("0") or match[2].lstrip("0") == "1":
        return None
    return path.with_name(f"{match[1]}{match[3]}{INDEX_SUFFIX}")


def shards_of(path: Path) -> list[Path]:
    """The files that hold a checkpoint's weights: itself, or the shards its index names.

    Raises:
        InputError: If it is an index that cannot be read.
    """
    if not _is_index(path.name):
        return [path]
    return [path.with_name(name) for name in dict.fromkeys(_weight_map(path).values())]


def _read(path: Path) -> Mapping[str, object]:
    if not _is_file(path):
        raise InputError(f"{path} does not exist: there is no file of this name.")
    if _is_index(path.name):
        return _read_shards(path)
    index = index_of_shard(path)
    if index is not None:
        raise InputError(
            f"{path} is one of several files that hold a network together: give {index.name}, "
            "which lies beside them."
        )
    return _read_file(path)


def _read_file(path: Path) -> Mapping[str, object]:
    content: object
    if path.suffix == ".safetensors":
        try:
            content = load_file(path)
        except Exception as error:  # also of a tensor type that this torch does not have
            raise InputError(
                f"{path} cannot be read ({_in_one_line(error)}): copy it again."
            ) from error
    else:
        try:
            content = _torch_load(path)
        except pickle.UnpicklingError as error:
            raise InputError(
                f"{path} holds no plain weights, or is damaged: nothing is read but tensors and "
                "plain containers (weights_only=True), so save the network's state_dict() alone."
            ) from error
        except OSError as error:
            raise InputError(f"{path} cannot be read ({_in_one_line(error)}).") from error
        except Exception as error:  # a damaged pickle fails in any way: struct, index, memory, ...
            raise InputError(
                f"{path} is truncated or no checkpoint, so it holds no plain weights: copy it "
                "again or leave it out."
            ) from error
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds no weights: save the network's state_dict().")
    return content


def _torch_load(path: Path, *, mmap: bool = False) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickle protocols, of files that then fail
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def _read_shards(index: Path) -> dict[str, object]:
    places = _weight_map(index)
    tensors: dict[str, object] = {}
    for shard in dict.fromkeys(places.values()):
        path = index.with_name(shard)
        if not _is_file(path):
            raise InputError(f"{index} names {shard}, which is not there: copy it as well.")
        content = _open_nested(_read_file(path), "shown")
        for name in (name for name, place in places.items() if place == shard):
            if name not in content:
                raise InputError(f"{path} lacks {name!r}, which {index.name} says it holds.")
            tensors[name] = content[name]
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    """The shard of each tensor. Shards lie beside their index: a name with a folder is refused."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        good = bool(places) and all(
            isinstance(shard, str) and Path(shard).name == shard != "" and not _is_index(shard)
            for shard in places.values()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        good = False
    if not good:
        raise InputError(f"{index} is no index of a checkpoint in shards, or is damaged.")
    return dict(places)


def _is_index(name: str) -> bool:
    return name.endswith(INDEX_SUFFIX)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # no permission, or a name that no file can have
        return False


def _open_nested(content: Mapping[str, object], which: Which) -> Mapping[str, object]:
    names = (_TRAINED, *_NESTED) if which == "trained" else _NESTED
    for _ in range(_DEEPEST):
        inner = (content.get(name) for name in names)
        chosen = next((value for value in inner if isinstance(value, Mapping)), None)
        if chosen is None:
            break
        content = chosen
    return content


def _require_plain(path: Path, name: str, tensor: Tensor) -> None:
    if tensor.is_nested:
        kind = "nested"
    elif tensor.layout is not torch.strided:
        kind = "sparse"
    elif tensor.is_quantized:
        kind = "quantised"
    elif tensor.is_meta:
        kind = "without values"
    elif type(tensor) not in (Tensor, nn.Parameter):
        kind = f"of the type {type(tensor).__name__}"
    else:
        return
    raise InputError(f"{path}: the tensor {name!r} is {kind}: save it as a plain one.")


def _require_stored(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse values that repeat stored ones so often that a copy of them would fill the memory."""
    repeated = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        repeated += max(0, size - tensor.untyped_storage().nbytes())
        if repeated > _MOST_REPEATED_BYTES:
            raise InputError(
                f"{path}: the tensor {name!r} is expanded to {size} bytes, of which the file holds "
                f"{tensor.untyped_storage().nbytes()}: save it as a plain one."
            )


def _without_common_prefix(
    state: dict[str, Tensor], own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Names as the network has them, if all lie under one name that the network does not have."""
    first = next(iter(own), None)
    if first is None or first in state:
        return state
    for candidate in state:
        prefix = candidate.removesuffix(first)
        if candidate.endswith(f".{first}") and all(name.startswith(prefix) for name in state):
            return {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _place(tensor: Tensor) -> tuple[object, ...]:
    """Equal for tied weights, and different for different ones, also for those without values."""
    if tensor.is_meta or not tensor.numel():
        return (id(tensor),)
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.device)


def _in_one_line(error: Exception) -> str:
    text = re.sub(r"[.!?]\s+(?=[A-Z])", "; ", " ".join(str(error).split()))
    return text[:200].rstrip(".") or type(error).__name__
