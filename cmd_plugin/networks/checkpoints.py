"""The checkpoints of a run: which files they are, their order in time, and what numbers them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from cmd_plugin.data.order import natural_key
from cmd_plugin.errors import InputError
from cmd_plugin.networks.weights import (
    INDEX_SUFFIX,
    index_of_shard,
    read_numbers,
    read_weights,
    shards_of,
)

__all__ = [
    "SUFFIXES",
    "Moment",
    "find_checkpoints",
    "moment_of",
    "readable_checkpoints",
    "size_on_disk",
    "snapshot_labels",
]

SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors", ".t7")

# Where one folder is one checkpoint, as of transformers: whole, or in shards with an index.
_USUAL = (
    "model.safetensors",
    f"model.safetensors{INDEX_SUFFIX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{INDEX_SUFFIX}",
)
# What lies beside weights under the same endings: of transformers, accelerate, DeepSpeed, and ours.
_FOREIGN = re.compile(
    r"(?:optim(?:izer)?|(?:lr_)?scheduler|rng_state|random_states|scaler|training_args|"
    r"trainer_state|adapter)(?:[._-]|$)|.*_optim_states\.|"
    r"(?:modes|model_cmd|correlation)\.safetensors$"
)

_NUMBER = r"\D?([0-9]{1,18})"
_EPOCH = re.compile(r"epochs?" + _NUMBER, re.IGNORECASE)
_STEP = re.compile(r"(?:steps?|checkpoint|ckpt|iter(?:ation)?)" + _NUMBER, re.IGNORECASE)
_NUMBERED_FOLDER = re.compile(
    rf"(?:epoch|(?:global_?)?step|checkpoint|ckpt|iter(?:ation)?){_NUMBER}", re.IGNORECASE
)


@dataclass(frozen=True)
class Moment:
    """When in a run a checkpoint was written; None for what is not known.

    Attributes:
        epoch: Number of the epoch.
        step: Number of the optimizer's step.
    """

    epoch: int | None
    step: int | None

    def __str__(self) -> str:
        """Say it, as in "epoch 3, step 90"."""
        numbers = (("epoch", self.epoch), ("step", self.step))
        return ", ".join(f"{name} {n}" for name, n in numbers if n is not None)


def moment_of(path: Path) -> Moment:
    """Epoch and step of a checkpoint, without reading its weights.

    The file's own ``epoch`` and ``global_step`` (or ``step``) count, else its name ("epoch=12",
    "step_500", "checkpoint-500"), else its folder's name if that is nothing but a number with such
    a word ("checkpoint-500/model.safetensors"). A file that cannot be read has its name.
    """
    epoch, step = _EPOCH.search(_stem(path)), _STEP.search(_stem(path))
    if epoch is None and step is None and _NUMBERED_FOLDER.fullmatch(path.parent.name):
        epoch, step = _EPOCH.search(path.parent.name), _STEP.search(path.parent.name)
    own = read_numbers(path, ("epoch", "global_step", "step"))
    return Moment(
        own.get("epoch", None if epoch is None else int(epoch[1])),
        own.get("global_step", own.get("step", None if step is None else int(step[1]))),
    )


def find_checkpoints(inputs: Sequence[str | Path]) -> list[Path]:
    """Return the checkpoints among files and folders, in the order in which they were written.

    Of a folder these are the files in its ``checkpoints/`` if it has any (a run of Lightning or of
    ``cmd-plugin train``), else one for each of its folders ``checkpoint-N`` (``epoch_N``,
    ``step_N``, ``global_stepN``, ``iter_N``), else its own files. Left out are optimizer states and
    other files of a training, adapters, ``last*`` where others exist, links to others, and, where
    the others have an epoch or a step, files that have none, such as a final copy. A checkpoint in
    shards is its index file; shards that are given are taken for their index.

    The order is that of epochs and steps, see :func:`moment_of`, also of files that are given one
    by one. Where not all have one, files whose paths differ in numbers alone are in natural order
    ("net9" before "net10"), and others stay as they were given.

    Raises:
        InputError: If a path does not exist, a folder has no checkpoint, a file is given twice, the
            order is not clear, or files of two folders are of the same moment.
    """
    try:
        found = _gathered(inputs)
    except OSError as error:
        raise InputError(f"{error.filename} cannot be looked into ({error.strerror}).") from error
    _refuse_twice(found)
    return _in_order(found)


def snapshot_labels(files: Sequence[Path]) -> list[int]:
    """Number checkpoints that are in order: by epoch, else by step, else by name, else from 0.

    A number is used where all have one and no two the same. Numbers in names without a word
    ("net_0100.pt") count if the paths differ in numbers alone and none has an epoch.

    Args:
        files: As :func:`find_checkpoints` returned them.
    """
    moments = [moment_of(file) for file in files]
    epochs, steps = [m.epoch for m in moments], [m.step for m in moments]
    choices: list[Sequence[int | None]] = [epochs, steps]
    if all(epoch is None for epoch in epochs) and _differ_in_numbers_alone(files):
        groups = [[int(n[-18:]) for n in re.findall(r"[0-9]+", str(file))] for file in files]
        choices += [column for column in zip(*groups, strict=True) if len(set(column)) > 1][:1]
    for choice in choices:
        numbers = [number for number in choice if number is not None]
        if len(set(numbers)) == len(files):
            return numbers
    return list(range(len(files)))


def readable_checkpoints(files: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Return the files that can be read, and one sentence about each that cannot."""
    problems = {file: _problem(file) for file in files}
    good = [file for file, problem in problems.items() if problem is None]
    return good, [problem for problem in problems.values() if problem is not None]


def size_on_disk(file: Path) -> int:
    """Bytes of a checkpoint, of all its shards if it is an index."""
    return sum(part.stat().st_size for part in shards_of(file))


def _problem(file: Path) -> str | None:
    try:
        read_weights(file, "trained")
    except InputError as error:
        return str(error)
    return None


def _stem(path: Path) -> str:
    """The name without endings: the 7 of ``.t7`` is no number of a checkpoint."""
    return Path(path.name.removesuffix(INDEX_SUFFIX)).stem


# -- among files and in folders ------------------------------------------------------------------


def _gathered(inputs: Sequence[str | Path]) -> list[Path]:
    found: list[Path] = []
    shards: dict[Path, None] = {}
    for item in map(Path, inputs):
        index = index_of_shard(item)
        if index is not None and index.is_file():
            shards[index] = None
        elif item.is_file():
            found.append(item)
        elif item.is_dir():
            found.extend(_in_folder(item))
        else:
            raise InputError(f"{item} does not exist: give checkpoint files or their folder.")
    return found + [index for index in shards if index not in found]


def _in_folder(folder: Path) -> list[Path]:
    if _NUMBERED_FOLDER.fullmatch(folder.name):
        usual = [folder / name for name in _USUAL if (folder / name).is_file()]
        if usual:
            return usual[:1]
    for place in (folder / "checkpoints", folder):
        if place.is_dir():
            inner = (f for f in place.iterdir() if _NUMBERED_FOLDER.fullmatch(f.name))
            found = [file for numbered in inner if numbered.is_dir() for file in _single(numbered)]
            found = found or _dated(_files(place))
            if found:
                return found
    raise InputError(
        f"{folder} holds no checkpoint ({', '.join(SUFFIXES)}): give the folder your trainer "
        "writes them to."
    )


def _files(folder: Path) -> list[Path]:
    """The checkpoint files that lie in a folder itself, in natural order."""
    files = sorted(
        (f for f in folder.iterdir() if _is_checkpoint(f.name) and f.is_file()), key=natural_key
    )
    real = {f.resolve() for f in files if not f.is_symlink()}
    files = [f for f in files if not f.is_symlink() or f.resolve() not in real]
    return [f for f in files if not f.stem.startswith("last")] or files


def _is_checkpoint(name: str) -> bool:
    whole = name.removesuffix(INDEX_SUFFIX)
    return (
        whole.endswith(SUFFIXES)
        and not name.startswith(".")
        and _FOREIGN.match(name) is None
        and index_of_shard(Path(name)) is None
    )


def _dated(files: list[Path]) -> list[Path]:
    """Those with an epoch or a step, if there are any: no other has a place among them."""
    known = [f for f in files if moment_of(f) != Moment(None, None)]
    return known or files


def _single(folder: Path) -> list[Path]:
    """The one checkpoint of a folder such as ``checkpoint-500``; none if it has no weights."""
    files = _files(folder)
    usual = [file for name in _USUAL for file in files if file.name == name]
    if not usual and len(files) > 1:
        raise InputError(
            f"{folder} holds several files ({files[0].name}, {files[1].name}, ...): give those of "
            f"one network, as in {folder.parent}/*/{files[0].name}."
        )
    return usual[:1] or files


# -- in order ------------------------------------------------------------------------------------


def _refuse_twice(files: Iterable[Path]) -> None:
    seen: dict[Path, Path] = {}
    for file in files:
        place = file.resolve()
        if place in seen:
            also = "" if seen[place] == file else f", also as {seen[place]}"
            raise InputError(f"{file} is given twice{also}: give each checkpoint once.")
        seen[place] = file


def _in_order(files: list[Path]) -> list[Path]:
    moments = {file: moment_of(file) for file in files}
    if all(moment.epoch is not None for moment in moments.values()):
        keys = {f: (m.epoch or 0, -1 if m.step is None else m.step) for f, m in moments.items()}
    elif all(moment.step is not None for moment in moments.values()):
        keys = {file: (0, moment.step or 0) for file, moment in moments.items()}
    elif _differ_in_numbers_alone(files):
        return sorted(files, key=natural_key)
    else:
        _require_forward(moments)
        return files
    ordered = sorted(files, key=lambda file: (keys[file], natural_key(file)))
    for one, other in pairwise(ordered):
        if keys[one] == keys[other] and one.parent != other.parent:
            raise InputError(
                f"{one} and {other} are both of {moments[one]}: give the checkpoints of one run."
            )
    return ordered


def _differ_in_numbers_alone(files: Iterable[Path]) -> bool:
    return len({re.sub(r"[0-9]+", "#", str(file)) for file in files}) == 1


def _require_forward(moments: dict[Path, Moment]) -> None:
    """Files with a number among others without one must not go back in time."""
    for name in ("epoch", "step"):
        known = [(f, getattr(m, name)) for f, m in moments.items() if getattr(m, name) is not None]
        for (one, before), (other, after) in pairwise(known):
            if after < before:
                lacking = next(f for f, m in moments.items() if getattr(m, name) is None)
                raise InputError(
                    f"{other} ({name} {after}) is given after {one} ({name} {before}), and "
                    f"{lacking} has no {name} to put all in order by: leave it out or number it."
                )
