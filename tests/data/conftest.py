"""A small picture, and encoders for it."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    """61 x 47 RGB: smooth, coloured, with odd sides (so that chroma and rows are padded)."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (16, 20, 3), np.uint8))
    return small.resize((61, 47), Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def encode():
    """`encode(image, "PNG", **options)` -> bytes, by Pillow."""

    def to_bytes(image: Image.Image, kind: str, **options) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    return to_bytes


@pytest.fixture(scope="session")
def png():
    """`png(width, height, bits, colour, data, interlace)` -> a PNG written chunk by chunk."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    def to_bytes(width, height, bits, colour, rows: bytes, interlace=0) -> bytes:
        header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlace)
        return (
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", header)
            + chunk(b"IDAT", zlib.compress(rows, 1))
            + chunk(b"IEND", b"")
        )

    return to_bytes


@pytest.fixture(scope="session")
def bmp():
    """`bmp(width, height, bits, compression, body, colours)` -> a BMP with a 40-byte header."""

    def to_bytes(width, height, bits, compression=0, body=b"", palette=b"") -> bytes:
        start = 54 + len(palette)
        head = struct.pack("<2sIHHI", b"BM", start + len(body), 0, 0, start)
        info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(body), 0, 0, 0, 0)
        return head + info[:32] + struct.pack("<II", len(palette) // 4, 0) + palette + body

    return to_bytes
