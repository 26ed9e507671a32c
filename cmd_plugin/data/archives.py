"""Image files in tar and zip archives.

Archives are read member by member. Nothing is ever extracted to disk, so member names cannot lead
anywhere.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import stat
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from cmd_plugin.data.files import (
    Found,
    ImageFile,
    Skipped,
    Span,
    explain,
    judge_name,
    too_many_bytes,
    unreadable,
    walk_folder,
)
from cmd_plugin.data.limits import ReadLimits
from cmd_plugin.errors import InputError

__all__ = ["find_archives", "is_archive", "walk"]

_TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
ARCHIVE_ENDINGS = (*_TAR_ENDINGS, ".zip")

_DECOMPRESSORS: dict[bytes, Any] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}

_HEADER_BYTES = 1024**2
"""More than the headers of one member of a tar archive ever have."""

_ZIP_HEADER = struct.Struct("<26sHH")
"""What precedes a member's data: up to the lengths of its name and of the extra field."""

_NOT_FOLLOWED = "is a link or a special file inside the archive, which is not followed"


def is_archive(path: Path) -> bool:
    """Whether the name is that of a tar archive, or the file is a zip archive."""
    name = path.name.lower()
    return name.endswith(_TAR_ENDINGS) or (name.endswith(".zip") and zipfile.is_zipfile(path))


def find_archives(folder: Path) -> dict[str, Path]:
    """Archives directly inside a folder, by their name without the ending."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and is_archive(path):
            ending = max((e for e in ARCHIVE_ENDINGS if path.name.lower().endswith(e)), key=len)
            found[path.name[: -len(ending)].lower()] = path
    return found


def walk(root: Path, limits: ReadLimits) -> Iterator[Found]:
    """All image files of a folder (sorted), of an archive (in its order), or the one image file.

    Beside them come the files that should be images and cannot be read, and those that are left out
    on purpose.

    Args:
        root: A folder, an archive or an image file.
        limits: Bounds on a member and on the whole of an archive.

    Raises:
        InputError: If the archive is damaged, of another format, or grows beyond the bound.
    """
    if root.is_dir():
        return walk_folder(root)
    if not is_archive(root):
        return iter([ImageFile((root.name,), root)])
    if root.name.lower().endswith(".zip"):
        return _guarded(_walk_zip(root, limits), root, "zip")
    return _guarded(_walk_tar(root, limits), root, "tar")


def _guarded(found: Iterator[Found], root: Path, kind: str) -> Iterator[Found]:
    try:
        yield from found
    except InputError:
        raise
    except Exception as error:  # the readers meet damaged bytes with almost any exception
        raise InputError(
            f"{root} is not a readable {kind} archive ({explain(error)}): make or copy it again."
        ) from error


def _parts(name: str) -> tuple[str, ...]:
    return tuple(part for part in PurePosixPath(name).parts if part not in ("/", "//", ".", ".."))


class _StrictHeader(tarfile.TarInfo):
    """A header whose damage is an error; tarfile takes it for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _StrictHeader:
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if buf.count(0) == tarfile.BLOCKSIZE:  # the mark at the end of every archive
                raise
            reason = str(error) if buf else "it ends without its end mark"
            raise tarfile.ReadError(reason) from error
        if header.size < 0:
            raise tarfile.ReadError("a member has a negative size")
        return header


class _Unpacked:
    """What comes out of a compressed archive, read up to a bound."""

    def __init__(self, stream: IO[bytes], root: Path, limits: ReadLimits) -> None:
        self.stream = stream
        self.root = root
        self.limits = limits
        self.position = 0
        self.most = root.stat().st_size + limits.archive_bytes
        self.next_header = 0

    def read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.position += len(data)
        if self.position > self.most:
            raise _grows_too_much(self.root, self.limits)
        # tarfile holds a header in memory, and an extended one may be of any size.
        if self.position > self.next_header + _HEADER_BYTES:
            raise tarfile.ReadError(f"one of its headers has more than {_HEADER_BYTES} bytes")
        return data


def _walk_tar(root: Path, limits: ReadLimits) -> Iterator[Found]:
    with root.open("rb") as raw:
        start = raw.read(6)
        raw.seek(0)
        decompress = next((d for mark, d in _DECOMPRESSORS.items() if start.startswith(mark)), None)
        if decompress is None:
            yield from _walk_plain_tar(root, raw)
            return
        with decompress(raw) as stream:
            yield from _walk_packed_tar(root, _Unpacked(stream, root, limits), limits)


def _walk_plain_tar(root: Path, stream: IO[bytes]) -> Iterator[Found]:
    end = root.stat().st_size
    for member, _ in _members(stream, "r:"):
        span = Span(member.offset_data, member.size, member.size)
        found = _judge_member(ImageFile(_parts(member.name), root, span), member)
        if isinstance(found, ImageFile) and span.start + span.length > end:
            raise tarfile.ReadError("unexpected end of data")
        if found is not None:
            yield found


def _walk_packed_tar(root: Path, unpacked: _Unpacked, limits: ReadLimits) -> Iterator[Found]:
    for member, archive in _members(unpacked, "r|"):
        unpacked.next_header = archive.offset
        found = _judge_member(ImageFile(_parts(member.name), root, data=b""), member)
        if isinstance(found, ImageFile) and member.size > limits.file_bytes:
            found = too_many_bytes(found, member.size, limits)
        if isinstance(found, ImageFile):
            stream = archive.extractfile(member)
            found = replace(found, data=stream.read() if stream else b"")
        if found is not None:
            yield found
    while unpacked.read(tarfile.RECORDSIZE):  # the checksum lies behind the end mark
        unpacked.next_header = unpacked.position


def _members(stream: Any, mode: Any) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    with tarfile.open(fileobj=stream, mode=mode, tarinfo=_StrictHeader) as archive:
        while (member := archive.next()) is not None:
            cast(Any, archive).members.clear()  # tarfile would keep every header to the end
            if archive.offset <= member.offset:
                raise tarfile.ReadError("its headers run in a circle")
            yield member, archive


def _judge_member(file: ImageFile, member: tarfile.TarInfo) -> Found | None:
    found = None if member.isdir() else judge_name(file)
    if isinstance(found, ImageFile) and not member.isreg():
        return Skipped(found.label, _NOT_FOLLOWED)
    if isinstance(found, ImageFile) and member.issparse():
        return unreadable(found, "is stored with holes (sparse)", "pack it again without --sparse")
    return found


def _walk_zip(root: Path, limits: ReadLimits) -> Iterator[Found]:
    with zipfile.ZipFile(root) as archive, root.open("rb") as raw:
        found = [(m, _judge_zip_member(m, root)) for m in archive.infolist() if not m.is_dir()]
        unpacked = sum(member.file_size for member, f in found if isinstance(f, ImageFile))
        if unpacked > root.stat().st_size + limits.archive_bytes:
            raise _grows_too_much(root, limits)
        for member, file in found:
            if isinstance(file, ImageFile):
                yield _find_in_zip(file, member, raw)
            elif file is not None:
                yield file


def _judge_zip_member(member: zipfile.ZipInfo, root: Path) -> Found | None:
    # Some packers for Windows write backslashes.
    parts = _parts(member.filename.replace("\\", "/"))
    return judge_name(ImageFile(parts, root, Span(0, member.compress_size, member.file_size)))


def _find_in_zip(file: ImageFile, member: zipfile.ZipInfo, raw: IO[bytes]) -> Found:
    """The file with its place in the archive, so that no directory is read again to find it."""
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        return Skipped(file.label, _NOT_FOLLOWED)
    if member.flag_bits & 1:
        return unreadable(file, "is encrypted", "unpack the archive to a folder")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        method = f"is packed with method {member.compress_type}, which is not read"
        return unreadable(file, method, "unpack the archive to a folder")
    raw.seek(member.header_offset)
    header = raw.read(_ZIP_HEADER.size)
    if len(header) < _ZIP_HEADER.size or not header.startswith(b"PK\3\4"):
        return unreadable(file, "is damaged inside the archive")
    _, name_length, extra_length = _ZIP_HEADER.unpack(header)
    span = Span(
        start=member.header_offset + _ZIP_HEADER.size + name_length + extra_length,
        length=member.compress_size,
        size=member.file_size,
        deflated=member.compress_type == zipfile.ZIP_DEFLATED,
        checksum=member.CRC,
    )
    return replace(file, span=span)


def _grows_too_much(root: Path, limits: ReadLimits) -> InputError:
    return InputError(
        f"{root} grows by more than the {limits.archive_bytes} bytes allowed when unpacked: unpack "
        "it to a folder, or raise ReadLimits.archive_bytes."
    )
