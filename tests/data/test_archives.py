"""Images in tar and zip archives: every member found, none believed."""

from __future__ import annotations

import bz2
import gzip
import io
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import pytest
import torch

from cmd_plugin.data import ReadLimits, read_images
from cmd_plugin.data.archives import walk
from cmd_plugin.data.files import Found, ImageFile, Skipped, Unreadable
from cmd_plugin.data.limits import DEFAULT_LIMITS
from cmd_plugin.errors import InputError
from tests.helpers.image_files import encoded, noise, to_tar, to_zip, tree

FILES = {f"{name}.png": noise(name) for name in range(4)}
PACKED = {"x.tar": "w", "x.tar.gz": "w:gz", "x.tar.bz2": "w:bz2", "x.tar.xz": "w:xz"}


def members(path: Path, limits: ReadLimits = DEFAULT_LIMITS) -> list[Found]:
    return list(walk(path, limits))


def read_all(found: list[Found]) -> dict[str, bytes]:
    files = [item for item in found if isinstance(item, ImageFile)]
    return {file.label: file.open(DEFAULT_LIMITS).read() for file in files}


def reasons(found: list[Found]) -> dict[str, str]:
    skipped = [item.skipped if isinstance(item, Unreadable) else item for item in found]
    return dict(item for item in skipped if isinstance(item, Skipped))


@pytest.mark.parametrize("name", PACKED)
def test_tar_members_come_back_byte_for_byte(tmp_path: Path, name: str) -> None:
    path = to_tar(tmp_path / name, {**FILES, "notes.txt": b"x"}, PACKED[name])
    assert read_all(members(path)) == FILES


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_members_come_back_byte_for_byte(tmp_path: Path, method: int) -> None:
    files = {**FILES, "flat.png": encoded(3), "deep/er/0.png": encoded(4)}
    path = to_zip(tmp_path / "x.zip", {**files, "deep/notes.txt": b"x"}, method)
    assert read_all(members(path)) == files
    # An archive behind something else, as programs that unpack themselves are.
    path.write_bytes(b"something" * 100 + path.read_bytes())
    assert read_all(members(path)) == files


def test_names_of_windows_and_names_that_point_outside_stay_inside(tmp_path: Path) -> None:
    path = to_zip(tmp_path / "x.zip", {"a\\0.png": b"1", "/b/../0.png": b"2", "../c.png": b"3"})
    assert read_all(members(path)) == {"a/0.png": b"1", "b/0.png": b"2", "c.png": b"3"}


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_a_damaged_header_is_not_taken_for_the_end_of_the_archive(
    tmp_path: Path, place: int
) -> None:
    path = to_tar(tmp_path / "x.tar", FILES, "w")
    with tarfile.open(path) as archive:
        start = archive.getmembers()[place].offset
    data = bytearray(path.read_bytes())
    data[start + 20] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"x\.tar is not a readable tar archive \(bad checksum\)"):
        members(path)
    packed = tmp_path / "x.tar.gz"
    packed.write_bytes(gzip.compress(data))
    with pytest.raises(InputError, match=r"is not a readable tar archive \(bad checksum\)"):
        members(packed)


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_an_archive_cut_between_two_members_is_incomplete(tmp_path: Path, keep: int) -> None:
    path = to_tar(tmp_path / "x.tar", FILES, "w")
    with tarfile.open(path) as archive:
        end = archive.getmembers()[keep].offset
    data = path.read_bytes()[:end]
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"x\.tar is not a readable tar archive"):
        members(path)
    packed = tmp_path / "x.tar.bz2"
    packed.write_bytes(bz2.compress(data))
    with pytest.raises(InputError, match=r"x\.tar\.bz2 is not a readable tar archive"):
        members(packed)


def test_the_checksum_at_the_end_of_a_compressed_archive_is_compared(tmp_path: Path) -> None:
    path = to_tar(tmp_path / "x.tar.gz", FILES)
    data = bytearray(path.read_bytes())
    data[-6] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"is not a readable tar archive .*CRC"):
        members(path)


def raw_tar(*headers: tarfile.TarInfo) -> bytes:
    return b"".join(h.tobuf(tarfile.GNU_FORMAT) for h in headers) + bytes(1024)


def test_a_negative_size_does_not_send_the_reader_in_a_circle(tmp_path: Path) -> None:
    header = tarfile.TarInfo("0.png")
    header.size = -512
    path = tmp_path / "x.tar"
    path.write_bytes(raw_tar(header))
    with pytest.raises(InputError, match="negative size"):
        members(path)
    real = tarfile.TarInfo("0.png")
    real.pax_headers = {"size": "-2048"}
    path.write_bytes(real.tobuf(tarfile.PAX_FORMAT) + bytes(4096))
    with pytest.raises(InputError, match="is not a readable tar archive"):
        members(path)


def test_links_and_special_files_of_an_archive_are_named(tmp_path: Path) -> None:
    path = to_tar(tmp_path / "x.tar", FILES, "w")
    kinds = {
        "l": tarfile.SYMTYPE,
        "h": tarfile.LNKTYPE,
        "f": tarfile.FIFOTYPE,
        "c": tarfile.CHRTYPE,
    }
    with tarfile.open(path, "a") as archive:
        for name, kind in kinds.items():
            member = tarfile.TarInfo(f"{name}.png")
            member.type, member.linkname = kind, "0.png"
            archive.addfile(member)
        sparse = tarfile.TarInfo("s.png")
        sparse.type = tarfile.GNUTYPE_SPARSE
        archive.addfile(sparse)
    found = members(path)
    assert read_all(found) == FILES
    said = reasons(found)
    assert set(said) == {"l.png", "h.png", "f.png", "c.png", "s.png"}
    assert said.pop("s.png") == "is stored with holes (sparse)"
    assert set(said.values()) == {
        "is a link or a special file inside the archive, which is not followed"
    }


def test_a_link_in_a_zip_archive_is_named(tmp_path: Path) -> None:
    path = to_zip(tmp_path / "x.zip", FILES)
    with zipfile.ZipFile(path, "a") as archive:
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    found = members(path)
    assert read_all(found) == FILES
    assert list(reasons(found)) == ["link.png"]


def test_members_of_a_zip_archive_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = to_zip(tmp_path / "x.zip", {"0.png": noise(0)})
    good = path.read_bytes()
    entry = good.index(b"PK\1\2")
    cases: list[tuple[int, bytes, str]] = [
        (entry + 8, struct.pack("<H", 1), "is encrypted"),
        (entry + 10, struct.pack("<H", zipfile.ZIP_LZMA), "is packed with method 14"),
        (entry + 24, struct.pack("<I", 3 * 1024**3), "has 3221225472 bytes, more than the"),
    ]
    for place, value, reason in cases:
        data = good[:place] + value + good[place + len(value) :]
        path.write_bytes(data)
        (found,) = members(path, ReadLimits(archive_bytes=2**40))
        if isinstance(found, ImageFile):
            with pytest.raises(Unreadable) as caught:
                found.open(DEFAULT_LIMITS)
            found = caught.value
        assert isinstance(found, Unreadable)
        assert found.skipped.reason.startswith(reason)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damaged_members_of_a_zip_archive_are_refused_when_read(
    tmp_path: Path, method: int
) -> None:
    path = to_zip(tmp_path / "x.zip", {"0.png": noise(0), "1.png": noise(1)}, method)
    data = bytearray(path.read_bytes())
    data[700] ^= 64
    path.write_bytes(data)
    first, second = members(path)
    assert isinstance(first, ImageFile)
    assert isinstance(second, ImageFile)
    with pytest.raises(Unreadable, match=r"x\.zip:0\.png is damaged inside the archive"):
        first.open(DEFAULT_LIMITS)
    assert second.open(DEFAULT_LIMITS).read() == noise(1)


def test_a_member_longer_than_its_archive_says_is_not_unpacked_further(tmp_path: Path) -> None:
    path = to_zip(tmp_path / "x.zip", {"0.png": bytes(10_000_000)})
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\1\2")
    struct.pack_into("<II", data, entry + 16, zlib.crc32(bytes(100)), 0)
    struct.pack_into("<I", data, entry + 20, len(zlib.compress(bytes(10_000_000))) - 6)
    struct.pack_into("<I", data, entry + 24, 100)
    path.write_bytes(data)
    (file,) = members(path)
    assert isinstance(file, ImageFile)
    tracemalloc.start()
    with pytest.raises(Unreadable, match="is damaged inside the archive"):
        file.open(DEFAULT_LIMITS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.parametrize(
    ("name", "inner"),
    [
        *((name, inner) for name in list(PACKED)[1:] for inner in ("0.bmp", "notes.txt")),
        ("x.zip", "0.bmp"),
    ],
)
def test_an_archive_that_grows_beyond_the_bound_is_refused(
    tmp_path: Path, name: str, inner: str
) -> None:
    files = {**FILES, inner: bytes(3_000_000), f"2{inner}": bytes(3_000_000)}
    path = tmp_path / name
    to_zip(path, files) if name == "x.zip" else to_tar(path, files, PACKED[name])
    sentence = f"{name} grows by more than the 4000000 bytes allowed .*ReadLimits.archive_bytes"
    with pytest.raises(InputError, match=sentence):
        members(path, ReadLimits(archive_bytes=4_000_000))
    assert len(members(path, ReadLimits(archive_bytes=7_000_000))) >= len(FILES)


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.zip"])
def test_a_member_above_the_bound_is_named_and_the_others_are_read(
    tmp_path: Path, name: str
) -> None:
    files = {"big.png": bytes(3_000_000), **FILES}
    path = tmp_path / name
    to_zip(path, files) if name == "x.zip" else to_tar(path, files, PACKED[name])
    limits = ReadLimits(file_bytes=100_000)
    with pytest.raises(
        InputError, match=r"big\.png has 3000000 bytes, more than the 100000 allowed"
    ):
        read_images(path, limits=limits)
    tracemalloc.start()
    found = read_images(path, skip_unreadable=True, limits=limits)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
    assert found.skipped == (Skipped("big.png", "has 3000000 bytes, more than the 100000 allowed"),)
    assert found.names == tuple(FILES)


def test_an_extended_header_of_any_size_is_not_held(tmp_path: Path) -> None:
    path = tmp_path / "x.tar.gz"
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("0.png")
        member.pax_headers = {"comment": "x" * 5_000_000}
        archive.addfile(member)
    tracemalloc.start()
    with pytest.raises(InputError, match="one of its headers has more than 1048576 bytes"):
        members(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000


def test_headers_that_were_read_are_not_kept(tmp_path: Path) -> None:
    """A compressed archive of a few kilobytes may hold millions of empty members."""
    path = tmp_path / "x.tar.gz"
    one = tarfile.TarInfo("notes.txt").tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(gzip.compress(one * 4000 + bytes(1024)))
    members(path)
    tracemalloc.start()
    assert members(path) == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.parametrize("name", ["x.tar", "x.zip"])
def test_an_archive_that_can_be_read_in_any_order_is_not_held(tmp_path: Path, name: str) -> None:
    files = {f"{index}.png": noise(index, size=(200, 100)) for index in range(60)}
    path = tmp_path / name
    to_zip(path, files) if name == "x.zip" else to_tar(path, files, "w")
    assert path.stat().st_size > 3_000_000
    read_images(path)
    tracemalloc.start()
    found = read_images(path, limits=ReadLimits(memory_bytes=100_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
    expected = read_images(path).images.read(torch.tensor([59, 7]))
    assert torch.equal(found.images.read(torch.tensor([59, 7])), expected)


def test_a_split_may_lie_in_zip_archives(tmp_path: Path) -> None:
    from cmd_plugin.data.folder import read_folder

    to_zip(tmp_path / "train.zip", tree(cat=3, dog=2))
    to_zip(tmp_path / "test.zip", tree(cat=1, dog=2))
    found = read_folder(tmp_path)
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 0, 1, 1]
    assert found.held_out is not None
    assert found.held_out.tolist() == [False] * 5 + [True] * 3
    assert found.names[0] == "train/cat/0.png"


def test_something_else_under_the_name_of_an_archive(tmp_path: Path) -> None:
    for name in PACKED:
        (tmp_path / name).write_bytes(b"something else")
        with pytest.raises(InputError, match="is not a readable tar archive"):
            members(tmp_path / name)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w"):
        pass
    (tmp_path / "x.zip").write_bytes(b"PK\1\2" + stream.getvalue()[4:])
    with pytest.raises(InputError, match="neither a folder"):
        read_images(tmp_path / "x.zip")
