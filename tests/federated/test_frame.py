"""Frames: exact lengths, and a reason for everything that is refused."""

from __future__ import annotations

import pickle
import struct
import zlib
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmd_plugin.errors import InputError
from cmd_plugin.federated.frame import OVERHEAD, Frame, FrameError, Header, NeedResync, Sections

HEADER = Header(1, 8, 4, 2, 31, 7, 2**63, 3, 2**64 - 1, 5, 6, 0.25)
U64 = st.integers(0, 2**64 - 1)


@given(st.lists(st.binary(max_size=40), min_size=8, max_size=8), U64, U64, st.floats(0, 1))
def test_round_trip(parts: list[bytes], layout: int, plan: int, share: float) -> None:
    frame = Frame(replace(HEADER, layout=layout, plan=plan, reply_share=share), Sections(*parts))
    data = frame.pack()
    assert len(data) == OVERHEAD + sum(map(len, parts))
    assert Frame.unpack(data) == frame


@given(st.integers(0, 8 * (OVERHEAD + 30) - 1))
def test_every_flipped_bit_is_noticed(position: int) -> None:
    data = bytearray(Frame(HEADER, Sections(values=bytes(range(30)))).pack())
    data[position // 8] ^= 1 << position % 8
    with pytest.raises(FrameError):
        Frame.unpack(bytes(data))


@pytest.mark.parametrize("length", [0, 3, OVERHEAD - 1])
def test_too_short(length: int) -> None:
    with pytest.raises(FrameError, match=r"header: .* bytes are too few"):
        Frame.unpack(Frame(HEADER, Sections()).pack()[:length])


def test_cut_short_and_too_long() -> None:
    data = Frame(HEADER, Sections(values=bytes(100))).pack()
    for wrong in (data[:-1], data + b"x"):
        with pytest.raises(FrameError, match=r"length: .* announced"):
            Frame.unpack(wrong)


def resealed(data: bytes) -> bytes:
    """The frame with a check sum that fits: what a faulty peer would send."""
    return data[:-4] + struct.pack("<I", zlib.crc32(data[:-4]))


def test_another_magic_or_version() -> None:
    data = Frame(HEADER, Sections()).pack()
    with pytest.raises(FrameError, match="bad magic"):
        Frame.unpack(resealed(b"XXXX" + data[4:]))
    with pytest.raises(FrameError, match="version: frame version 9, this package reads 1"):
        Frame.unpack(resealed(data[:4] + b"\x09" + data[5:]))


def test_errors_name_field_and_reason_and_cross_processes() -> None:
    for kind in (FrameError, NeedResync):
        error = kind("values", "too few.")
        assert isinstance(error, InputError)
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), copy.field, copy.reason) == (kind, "values", "too few.")
        assert str(copy) == "values: too few."


def test_header_and_sections_fill_the_fixed_part() -> None:
    # 4 magic, 1 version, 5 bytes + flags, round, five identities, share, lengths, check sum
    assert len(fields(Header)) == 12
    assert 4 + 1 + 4 + 2 + 4 + 5 * 8 + 8 + 8 * len(fields(Sections)) + 4 == OVERHEAD
