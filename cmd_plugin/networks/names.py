"""One name for one weight, whatever the network is wrapped in."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from cmd_plugin.errors import InputError

__all__ = ["by_clean_name", "clean_name"]

# Of torch.compile, FSDP and activation checkpointing; no module of a user's is called so.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def clean_name(name: str) -> str:
    """Strip what wrappers put into the name of a weight.

    ``module.``, of ``DistributedDataParallel`` and ``AveragedModel``, is stripped from the front
    alone, since a part of a network may be called so.
    """
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in ("module", *_WRAPPERS):
        parts = parts[1:]
    return ".".join(part for part in parts if part not in _WRAPPERS)


def by_clean_name(entries: Iterable[tuple[str, object]]) -> dict[str, Tensor]:
    """Return the tensors among named things by cleaned name.

    Raises:
        InputError: If two different tensors have the same cleaned name.
    """
    tensors: dict[str, Tensor] = {}
    for raw_name, tensor in entries:
        name = clean_name(str(raw_name))
        if not isinstance(tensor, Tensor):
            continue
        if name in tensors and tensors[name].data_ptr() != tensor.data_ptr():
            raise InputError(
                f"two tensors are called {name!r} once the prefixes of torch.compile and "
                "DistributedDataParallel are gone: rename one."
            )
        tensors[name] = tensor
    return tensors
