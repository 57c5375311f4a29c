"""The bytes of an image: read, and checked for what Pillow does not look at.

A disk that fails says nothing about the image. Pillow raises OSError for damage as well, so the two
are told apart here, where the file is read. Messages do not name the image: `media` does.
"""

import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

from internvl_core.data.media_root import MAX_FILE_BYTES, asking
from internvl_core.errors import MediaError, OutOfMemory, Reason

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CHUNK_FRAME_BYTES = 12  # Length, kind and checksum.
_JPEG_SCAN = b"\xff\xda"
_JPEG_END = b"\xff\xd9"
# What stands between pixels or fills gaps is no mark of a segment: FF 00, restarts, reserved ones, another start.
_JPEG_MARK = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")
# An encoder makes about ten. Each goes over all pixels (0.07 s for 89 megapixels), and may have no more than 100 bytes.
_MAX_JPEG_SCANS = 100


class ImageFile(io.RawIOBase):
    """An open file for Pillow to read a header from, whose failures cannot be taken for damage to the image."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        with _reading(self._name):
            view = memoryview(buffer)
            body = self._file.read(len(view))
            view[: len(body)] = body
            return len(body)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def read_whole(file: BinaryIO, name: str) -> bytes:
    """Read an open file from its beginning to its end.

    Raises:
        MediaError: larger than `MAX_FILE_BYTES`.
        StoreUnavailable: the disk failed.
    """
    check_size(file, name)
    with _reading(name):
        return file.read()


def check_size(file: BinaryIO, name: str) -> None:
    """Refuse a huge file before any of it is read: a decoder may want all of it.

    Raises:
        MediaError: larger than `MAX_FILE_BYTES`.
        StoreUnavailable: the disk failed.
    """
    with _reading(name):
        size_bytes = file.seek(0, io.SEEK_END)
        file.seek(0)
    if size_bytes > MAX_FILE_BYTES:
        raise MediaError(f"{size_bytes} bytes are more than {MAX_FILE_BYTES >> 20} MiB.", reason=Reason.MEDIA_SIZE)


def check_png(content: bytes) -> None:
    """Compare the checksum of each chunk; Pillow skips those of the pixels and decodes whatever it finds.

    Raises:
        MediaError: one differs, or the end is missing.
    """
    view = memoryview(content)
    position = len(_PNG_SIGNATURE)
    kind = b""
    while kind != b"IEND":
        if position + _PNG_CHUNK_FRAME_BYTES > len(content):
            raise MediaError("cannot be decoded: the file ends before the image does.")
        length = int.from_bytes(content[position : position + 4])
        end = position + 8 + length
        kind = content[position + 4 : position + 8]
        if zlib.crc32(view[position + 4 : end]) != int.from_bytes(content[end : end + 4]):
            raise MediaError(f"cannot be decoded: wrong checksum at byte {end}, of chunk {kind!r}.")
        position = end + 4


def check_scans(content: bytes) -> None:
    """Refuse a JPEG that would be decoded for hours.

    Raises:
        MediaError: has more than a hundred scans.
    """
    # As a rule the bytes of a mark are not even there a hundred times, and nothing has to be walked through.
    num_scans = content.count(_JPEG_SCAN)
    if num_scans > _MAX_JPEG_SCANS:
        num_scans = _count_scans(content)
    if num_scans > _MAX_JPEG_SCANS:
        raise MediaError(f"{num_scans} scans; at most {_MAX_JPEG_SCANS} are decoded.", reason=Reason.MEDIA_SIZE)


def _count_scans(content: bytes) -> int:
    """Count the scans of the first image; phones put a film behind it, whose bytes may be any."""
    num_scans = position = 0
    while (mark := _JPEG_MARK.search(content, position)) and mark[0] != _JPEG_END:
        num_scans += mark[0] == _JPEG_SCAN
        position = mark.end() + max(2, int.from_bytes(content[mark.end() : mark.end() + 2]))
    return num_scans


@contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        with asking(name, refusals=()):
            yield
    except MemoryError:
        raise OutOfMemory(f"Reading {name} failed: no memory left. Lower dataloader_num_workers.") from None
