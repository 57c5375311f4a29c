"""Pictures that tests make on the spot, sound and otherwise."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image


def noise(width: int = 64, height: int = 64) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encode(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(width: int, height: int, *, bits: int = 8, before_pixels: bytes = b"") -> bytes:
    """A grey PNG of one colour, small on disk whatever its size."""
    compressor = zlib.compressobj(9)
    row = bytes(1 + (width * bits + 7) // 8) if width < 1 << 20 else b""
    body = b"".join(compressor.compress(row) for _ in range(height if row else 0)) + compressor.flush()
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + before_pixels + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def with_exif(orientation: int, *, file_format: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(noise(96, 64), file_format, exif=exif)


def damaged(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :]


def sixteen_bits(*values: int) -> np.ndarray[Any, Any]:
    return np.array([values] * 8, dtype=np.uint16).repeat(8, axis=1)


def many_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan, some hundred bytes, comes again and again."""
    content = encode(Image.new("L", (64, 64), 128), "JPEG", progressive=True)
    scan = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + scan * count + content[-2:]
