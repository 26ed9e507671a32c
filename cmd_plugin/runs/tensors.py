"""Tensors on disk: safetensors with the name and version of what they mean."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cmd_plugin.errors import InputError
from cmd_plugin.runs.files import write_atomically

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Schema", "read_schema"]

_KEY = "schema"


@dataclass(frozen=True)
class Schema:
    """What a file of tensors is: written into its metadata, asked for when it is read.

    Attributes:
        name: What it holds, for example ``"modes"``.
        version: Raised when its content changes meaning.
        what: The thing in words, for messages: ``"a decomposition"``.
    """

    name: str
    version: int
    what: str

    @property
    def identity(self) -> str:
        """The text in the metadata."""
        return f"cmd-plugin/{self.name}/{self.version}"

    def save(
        self, path: str | Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]
    ) -> None:
        """Write tensors and what is to be known about them, in one step.

        Args:
            path: The file.
            tensors: By name; copied to the CPU, and apart where they share memory.
            about: Further metadata, text by name.

        Raises:
            InputError: If it cannot be written.
        """
        from safetensors.torch import save_file

        # A clone separates entries that share memory, which safetensors refuses.
        plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        seen: set[int] = set()
        for name, tensor in plain.items():
            pointer = tensor.untyped_storage().data_ptr()
            if pointer in seen:
                plain[name] = tensor.clone()
            seen.add(pointer)
        metadata = {"format": "pt", **about, _KEY: self.identity}

        def write(temporary: Path) -> None:
            save_file(plain, temporary, metadata)
            _sort_metadata(temporary)

        write_atomically(Path(path), write)

    def load(self, path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Read what :meth:`save` wrote; nothing in the file is executed.

        Returns:
            The tensors on the CPU, and the metadata.

        Raises:
            InputError: If the file is missing, damaged, or holds something else.
        """
        from safetensors import SafetensorError, safe_open

        metadata = _metadata(path)
        if metadata.get(_KEY) != self.identity:
            raise InputError(
                f"{path} is not {self.what} of this version (schema {metadata.get(_KEY)!r}, "
                f"expected {self.identity!r})."
            )
        try:
            with safe_open(str(path), framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} is damaged ({error}): copy or make it again.") from error


def _sort_metadata(path: Path) -> None:
    """Put the metadata in order, which safetensors writes as they come out of a hash table.

    So equal tensors make equal files. The rest of the header is left as it is.
    """
    with path.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # else another version writes JSON otherwise: leave it, it is valid
            stream.seek(8)
            stream.write(text.ljust(size))


def read_schema(path: str | Path) -> str | None:
    """Return which schema a safetensors file has; None if it has none.

    Raises:
        InputError: If it is no safetensors file.
    """
    return _metadata(path).get(_KEY)


def _metadata(path: str | Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise InputError(f"there is no file {path}: check the path.")
    try:
        with safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged ({error}): copy or make it again.") from error
