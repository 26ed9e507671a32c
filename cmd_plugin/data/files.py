"""Image files in folders and archives: finding them, and reading their bytes on demand."""

from __future__ import annotations

import errno
import io
import os
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import BinaryIO, NamedTuple

from cmd_plugin.data.limits import ReadLimits
from cmd_plugin.errors import InputError

__all__ = [
    "Found",
    "ImageFile",
    "Skipped",
    "Span",
    "Unreadable",
    "explain",
    "is_image_name",
    "judge_name",
    "too_many_bytes",
    "unreadable",
    "walk_folder",
]

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
_OTHER_ENDINGS = (".avif", ".gif", ".heic", ".heif", ".jp2", ".jxl", ".pfm")


class Skipped(NamedTuple):
    """A file that was left out.

    Attributes:
        name: Its path inside the collection.
        reason: Why, as the end of a sentence that begins with the name.
    """

    name: str
    reason: str


class Unreadable(InputError):
    """An image that cannot be read; a walk hands it over, and the reader refuses or skips it.

    Made by :func:`unreadable`: a worker process of a loader can hand on an exception only when its
    message alone makes one.
    """

    skipped: Skipped


@dataclass(frozen=True)
class Span:
    """Where a member lies inside an archive that can be read in any order.

    Attributes:
        start: Byte position of its data.
        length: Number of bytes there.
        size: Number of bytes once unpacked.
        deflated: Whether it is compressed.
        checksum: CRC-32 of the unpacked bytes; `None` where the archive keeps none.
    """

    start: int
    length: int
    size: int
    deflated: bool = False
    checksum: int | None = None


@dataclass(frozen=True)
class ImageFile:
    """Where one image lies.

    Attributes:
        parts: Path inside the collection, for example `("train", "cat", "1.png")`.
        source: The image file itself, or the archive that holds it.
        span: Its place in an archive; `None` for a file of its own.
        data: Its bytes, where the archive can only be read from front to back.
    """

    parts: tuple[str, ...]
    source: Path
    span: Span | None = None
    data: bytes | None = None

    @property
    def label(self) -> str:
        """Path inside the collection, as lists show it."""
        return _printable("/".join(self.parts))

    @property
    def name(self) -> str:
        """Path on the disk, as messages show it."""
        source = _printable(str(self.source))
        return source if self.span is None and self.data is None else f"{source}:{self.label}"

    def open(self, limits: ReadLimits) -> BinaryIO:
        """The encoded image as a stream from its first byte.

        Raises:
            Unreadable: If it is no regular file, too large, gone or damaged.
        """
        if self.data is not None:
            return io.BytesIO(self.data)
        try:
            # Asked before opening: opening a pipe waits for a writer that may never come.
            status = self.source.stat()
            if not stat.S_ISREG(status.st_mode):
                raise unreadable(self, "is not a regular file (a pipe, socket or device)")
            span = self.span
            size = status.st_size if span is None else max(span.length, span.size)
            if size > limits.file_bytes:
                raise too_many_bytes(self, size, limits)
            return self.source.open("rb") if span is None else io.BytesIO(self._unpack(span))
        except OSError as error:
            raise unreadable(self, f"cannot be read ({error.strerror})") from error

    def _unpack(self, span: Span) -> bytes:
        with self.source.open("rb") as archive:
            archive.seek(span.start)
            data = archive.read(span.length)
        try:
            if span.deflated and len(data) == span.length:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, span.size + 1)
        except zlib.error as error:
            raise unreadable(self, f"is damaged inside the archive ({error})") from error
        if len(data) != span.size or span.checksum not in (None, zlib.crc32(data)):
            raise unreadable(self, "is damaged inside the archive")
        return data


Found = ImageFile | Unreadable | Skipped


def unreadable(file: ImageFile, reason: str, advice: str = "replace or remove it") -> Unreadable:
    """The exception for an image that cannot be read: `NAME REASON: ADVICE.`."""
    error = Unreadable(f"{file.name} {reason}: {advice}.")
    error.skipped = Skipped(file.label, reason)
    return error


def explain(error: Exception) -> str:
    """What a library said of damaged bytes, to stand inside a sentence of ours."""
    said = " ".join(str(error).split()).split("<_io")[0].split(". ")[0].rstrip(" .:")
    return said[:200] or type(error).__name__


def too_many_bytes(file: ImageFile, size: int, limits: ReadLimits) -> Unreadable:
    """The exception for an encoded image that is larger than the caller allows."""
    return unreadable(
        file,
        f"has {size} bytes, more than the {limits.file_bytes} allowed",
        "remove it or raise ReadLimits.file_bytes",
    )


def _printable(text: str) -> str:
    """File names that are not UTF-8 could not be written to any table."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def is_image_name(name: str) -> bool:
    """Whether a file with this name is read as an image."""
    return name.lower().endswith(IMAGE_ENDINGS)


def judge_name(file: ImageFile) -> Found | None:
    """What a walk hands over for a regular file: the file, a word about it, or nothing.

    Hidden files, what macOS adds to archives, and files that are no images are passed over.
    """
    if not file.parts or any(_is_hidden(part) for part in file.parts):
        return None
    ending = PurePath(file.parts[-1]).suffix.lower()
    if ending in _OTHER_ENDINGS:
        return Skipped(file.label, f"is of a format that is not read ({ending}): convert it to PNG")
    return file if is_image_name(file.parts[-1]) else None


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        # A link to itself leads nowhere; what cannot be looked at is reported when it is listed.
        return error.errno != errno.ELOOP


def walk_folder(root: Path) -> Iterator[Found]:
    """All image files below a folder, those of a folder before those of the folders in it.

    Links are followed, since large collections often are links, but every real folder is read once:
    under its own name if it lies below `root`, otherwise under the first link to it in sorted
    order. Another link to it is handed over as :class:`Skipped`.
    """
    files: list[ImageFile] = []
    seen: dict[tuple[int, int], str] = {}
    folders: list[tuple[str, ...]] = [()]
    links: list[tuple[str, ...]] = []
    while folders or links:
        if not folders:
            links.sort()
        parts = folders.pop() if folders else links.pop(0)
        folder = ImageFile(parts, root.joinpath(*parts))
        try:
            status = folder.source.stat()
            before = seen.setdefault((status.st_dev, status.st_ino), folder.label)
            if before != folder.label:
                reason = f"is the folder {before or '.'} once more, which is read under that name"
                yield Skipped(folder.label, reason)
                continue
            with os.scandir(folder.source) as entries:
                for entry in entries:
                    inner = (*parts, entry.name)
                    if _is_hidden(entry.name):
                        continue
                    if _is_folder(entry):
                        (links if entry.is_symlink() else folders).append(inner)
                        continue
                    found = judge_name(ImageFile(inner, Path(entry.path)))
                    if isinstance(found, ImageFile):
                        files.append(found)
                    elif found is not None:
                        yield found
        except OSError as error:
            yield unreadable(folder, f"cannot be listed ({error.strerror})")
    files.sort(key=lambda file: [*((1, part) for part in file.parts[:-1]), (0, file.parts[-1])])
    yield from files
