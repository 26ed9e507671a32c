"""Files damaged at random, and what every reader has to do with them."""

from __future__ import annotations

import os
import random
import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from cmd_plugin.errors import InputError
from tests.helpers.sentences import assert_one_sentence

# More of them by hand: FUZZ_MUTATIONS=3000 python -m pytest -k damaged
MUTATIONS = int(os.environ.get("FUZZ_MUTATIONS", "200"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
_SLOWEST_S = 5.0

_NUMBERS = (b"0", b"1", b"-1", b"3", b"7", b"1.7", b"1e9", b"1e400", b"nan", b"-inf", b"x", b"")
_NUMBERS += (b"255", b"65536", b"999999999", b"2147483648", b"9" * 18, b"9" * 19, b"9" * 5000)


def damage(data: bytes, dice: random.Random) -> bytes:
    """Change a few bytes, cut the end off, take a piece out, put one in, or repeat one."""
    place = dice.randrange(min(len(data), dice.choice((40, 400, len(data)))))
    length = dice.choice((1, 2, 4, 40))
    kind = dice.randrange(6)
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + data[place + length :]
    if kind == 2:
        return data[:place] + dice.randbytes(length) + data[place:]
    if kind == 3:
        return data[:place] + data[place : place + length] * 3 + data[place + length :]
    changed = bytearray(data)
    for index in range(place, min(place + length, len(data))):
        changed[index] = dice.choice((0, 1, 127, 255, dice.randrange(256)))
    return bytes(changed)


def renumber(data: bytes, dice: random.Random) -> bytes:
    """Put another number, or a word, where there is one in text; else as :func:`damage`."""
    found = list(re.finditer(rb"[-+.0-9e]*[0-9][-+.0-9e]*|[A-Za-z_]{2,}", data[:4000]))
    if not found:
        return damage(data, dice)
    chosen = dice.choice(found)
    other = dice.choice((*_NUMBERS, dice.choice(found)[0]))
    return data[: chosen.start()] + other + data[chosen.end() :]


def refuses_damaged(
    path: Path,
    whole: bytes,
    read: Callable[[Path], object],
    pack: Callable[[bytes], bytes] = bytes,
    mutations: int = MUTATIONS,
) -> int:
    """Damage a file many times; return how often it was refused, each time with one sentence.

    Args:
        path: Where to write it.
        whole: What is damaged.
        read: Reads the file, raising nothing but InputError, within five seconds.
        pack: Packs what was damaged, so that a checksum does not hide it from the reader.
        mutations: How often.
    """
    path.write_bytes(pack(whole))
    read(path)
    refused = 0
    for number in range(mutations):
        dice = random.Random(f"{SEED} {path.name} {number}")
        changed = whole
        for _ in range(dice.choice((1, 1, 1, 2, 5))):
            changed = dice.choice((damage, renumber))(changed or whole, dice)
        path.write_bytes(pack(changed))
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # as for a user, to whom a warning is no error
                read(path)
        except InputError as error:
            refused += 1
            assert_one_sentence(error, path.name)
        except Exception as error:
            pytest.fail(f"{path.name}, mutation {number}: {type(error).__name__}: {error}")
        seconds = time.perf_counter() - start
        assert seconds < _SLOWEST_S, f"{path.name}, mutation {number}: {seconds:.1f} s"
    return refused
