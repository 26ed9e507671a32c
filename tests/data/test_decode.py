"""Pixels of image files: their range, their bounds, and images read on demand."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from cmd_plugin.data import ReadLimits
from cmd_plugin.data.decode import FileImages, decode, read_header
from cmd_plugin.data.files import ImageFile, Unreadable
from cmd_plugin.data.limits import DEFAULT_LIMITS
from cmd_plugin.errors import InputError
from tests.helpers.image_files import encoded, noise, tiff


def in_memory(data: bytes, name: str = "x.png") -> ImageFile:
    return ImageFile((name,), Path("a.tar.gz"), data=data)


def pixels(data: bytes) -> list[list[int]]:
    return decode(in_memory(data), DEFAULT_LIMITS)[0].tolist()


def header_only_png(width: int, height: int) -> bytes:
    header = struct.pack(">II5B", width, height, 8, 0, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("big_endian", [False, True])
def test_float_tiffs_are_scaled_from_zero_to_one(big_endian: bool) -> None:
    values = [0.0, 0.1, 0.5, 0.998, 1.0, 0.25]
    data = np.array(values, dtype=">f4" if big_endian else "<f4").tobytes()
    image = tiff(data, (3, 2), 32, 3, big_endian=big_endian)
    assert pixels(image) == [[0, 26, 128], [254, 255, 64]]
    assert read_header(in_memory(image), DEFAULT_LIMITS).size == (2, 3)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([0.0, 200.0], r"x\.png holds floats from 0 to 200: scale them to \[0, 1\]"),
        ([-0.5, 0.5], r"holds floats from -0\.5 to 0\.5"),
        ([float("nan"), 0.5], r"holds floats from nan to nan"),
        ([0.0, float("inf")], r"holds floats from 0 to inf"),
    ],
)
def test_other_floats_are_refused(values: list[float], sentence: str) -> None:
    image = tiff(np.array(values, dtype="<f4").tobytes(), (2, 1), 32, 3)
    with pytest.raises(Unreadable, match=sentence):
        pixels(image)


@pytest.mark.parametrize("big_endian", [False, True])
def test_sixteen_unsigned_bits_are_scaled_from_their_whole_range(big_endian: bool) -> None:
    values = [0, 257, 32_896, 65_535]
    data = np.array(values, dtype=">u2" if big_endian else "<u2").tobytes()
    assert pixels(tiff(data, (4, 1), 16, big_endian=big_endian)) == [[0, 1, 128, 255]]
    stream = io.BytesIO()
    Image.fromarray(np.array([values], dtype=np.uint16)).save(stream, "PNG")
    assert pixels(stream.getvalue()) == [[0, 1, 128, 255]]
    plain = b"P5 4 1 65535\n" + np.array(values, dtype=">u2").tobytes()
    assert pixels(plain) == [[0, 1, 128, 255]]


def test_twelve_bits_are_scaled_from_their_own_range() -> None:
    # Two values in three bytes, the first one in the upper bits: 0x000, 0xFFF, 0x808, 0x404.
    data = bytes([0x00, 0x0F, 0xFF, 0x80, 0x84, 0x04])
    expected = [round(value * 255 / 4095) for value in (0x000, 0xFFF, 0x808, 0x404)]
    assert pixels(tiff(data, (4, 1), 12)) == [expected]


def test_white_is_zero_is_turned_round_at_every_depth() -> None:
    eight = tiff(bytes([0, 55, 255]), (3, 1), 8, white_is_zero=True)
    sixteen = tiff(
        np.array([0, 55 * 257, 65_535], dtype="<u2").tobytes(), (3, 1), 16, white_is_zero=True
    )
    floats = tiff(
        np.array([0, 55 / 255, 1], dtype="<f4").tobytes(), (3, 1), 32, 3, white_is_zero=True
    )
    assert pixels(eight) == pixels(sixteen) == pixels(floats) == [[255, 200, 0]]


@pytest.mark.parametrize(
    ("bits", "sample_format"), [(8, 2), (16, 2), (32, 1), (32, 2)], ids=["i8", "i16", "u32", "i32"]
)
def test_integers_of_unknown_range_are_refused(bits: int, sample_format: int) -> None:
    image = in_memory(tiff(bytes(4 * bits // 8), (2, 2), bits, sample_format))
    with pytest.raises(Unreadable, match="signed or 32-bit integers, whose range is not known"):
        read_header(image, DEFAULT_LIMITS)
    with pytest.raises(Unreadable, match="save it with 8 or 16 unsigned bits"):
        decode(image, DEFAULT_LIMITS)


def photo(note: object, kind: str = "JPEG") -> bytes:
    """A photo 16 wide and 8 high, dark on the left, that a camera noted something of."""
    values = np.zeros((8, 16), dtype=np.uint8)
    values[:4, 8:] = 255
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = note
    Image.fromarray(values).convert("RGB").save(stream, kind, exif=exif)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
@pytest.mark.parametrize("note", range(1, 9))
def test_photos_are_turned_upright(note: int, kind: str) -> None:
    image = in_memory(photo(note, kind))
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(image.data or b"")))
    expected = np.array(turned.convert("RGB")).transpose(2, 0, 1)
    found = decode(image, DEFAULT_LIMITS)
    assert np.array_equal(found, expected)
    assert read_header(image, DEFAULT_LIMITS).size == found.shape[1:]
    assert (found.shape[1:] == (8, 16)) == (note < 5)


def test_of_several_views_the_first_is_turned() -> None:
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    view = Image.open(io.BytesIO(photo(1)))
    view.save(stream, "MPO", save_all=True, append_images=[view], exif=exif)
    assert decode(in_memory(stream.getvalue()), DEFAULT_LIMITS).shape == (3, 16, 8)


@pytest.mark.parametrize("note", [0, 9, 77])
def test_a_note_that_says_nothing_turns_nothing(note: int) -> None:
    assert decode(in_memory(photo(note)), DEFAULT_LIMITS).shape == (3, 8, 16)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # as Pillow opens the file
def test_damaged_notes_do_not_spoil_a_photo() -> None:
    whole = photo(6)
    start = whole.index(b"Exif") + 6
    for position in range(start, start + 26):
        for value in (0, 255):
            damaged = whole[:position] + bytes([value]) + whole[position + 1 :]
            assert decode(in_memory(damaged), DEFAULT_LIMITS).size == 3 * 8 * 16


def test_an_image_with_too_many_pixels_is_refused_before_it_is_decoded() -> None:
    image = in_memory(header_only_png(9_500, 9_500))
    for read in (read_header, decode):
        with pytest.raises(
            Unreadable,
            match=r"has 90250000 pixels, more than|is too large \(Image size \(90250000 pixels\)",
        ):
            read(image, DEFAULT_LIMITS)
    sentence = r"too large \(Image size \(400000000 pixels\) exceeds .*\): .*MAX_IMAGE_PIXELS"
    with pytest.raises(Unreadable, match=sentence):
        read_header(in_memory(header_only_png(20_000, 20_000)), DEFAULT_LIMITS)


def test_the_bound_on_pixels_is_the_callers() -> None:
    image = in_memory(encoded(7, size=(6, 4)))
    assert decode(image, ReadLimits(image_pixels=24)).shape == (1, 4, 6)
    sentence = (
        r"a\.tar\.gz:x\.png has 24 pixels, more than the 23 allowed: .*ReadLimits\.image_pixels"
    )
    with pytest.raises(Unreadable, match=sentence):
        decode(image, ReadLimits(image_pixels=23))


def test_a_tile_counts_with_its_whole_size() -> None:
    image = in_memory(tiff(bytes(64), (2, 2), 8, tile=(4096, 4096)))
    with pytest.raises(Unreadable, match="has 16777216 pixels, more than the 1000000 allowed"):
        read_header(image, ReadLimits(image_pixels=1_000_000))


@pytest.mark.parametrize("bound", ["image_pixels", "file_bytes", "archive_bytes", "memory_bytes"])
def test_a_bound_is_at_least_one(bound: str) -> None:
    with pytest.raises(InputError, match=f"ReadLimits.{bound} must be at least 1, got 0"):
        ReadLimits(**{bound: 0})


def test_what_a_file_is_called_does_not_decide_what_is_in_it() -> None:
    assert decode(in_memory(noise(0, "GIF")), DEFAULT_LIMITS).shape == (3, 20, 24)
    assert decode(in_memory(noise(0, "WEBP")), DEFAULT_LIMITS).shape == (3, 20, 24)


def test_formats_that_other_programs_decode_are_refused() -> None:
    # Pillow would start Ghostscript.
    with pytest.raises(Unreadable, match="is not a readable image"):
        decode(in_memory(noise(0, "EPS")), DEFAULT_LIMITS)


def test_images_of_different_sizes_are_read_one_at_a_time() -> None:
    files = [in_memory(encoded(value, size=size)) for value, size in ((1, (6, 4)), (2, (5, 9)))]
    store = FileImages([*files, files[0]], DEFAULT_LIMITS, channels=3, size=None, resize=False)
    assert store.read(torch.tensor([1])).shape == (1, 3, 9, 5)
    assert store.read(torch.tensor([0, 2])).shape == (2, 3, 4, 6)
    assert store.read(torch.tensor([], dtype=torch.int64)).shape[:2] == (0, 3)
    with pytest.raises(InputError, match="is 5x9 pixels but the images before it are 6x4"):
        store.read(torch.tensor([0, 1]))


def test_a_file_that_changed_since_its_header_was_read_is_refused() -> None:
    store = FileImages(
        [in_memory(encoded(1, "RGB"))], DEFAULT_LIMITS, channels=1, size=(4, 6), resize=False
    )
    with pytest.raises(InputError, match="is in colour, the images before it are grey"):
        store.read(torch.tensor([0]))
