"""PNG and TIFF files by hand, of depths and bands that Pillow does not write."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy.typing as npt

GREY, COLOUR, PALETTE, GREY_ALPHA, COLOUR_ALPHA = 0, 2, 3, 4, 6  # PNG's colour types
WHOLE = ((0, 0, 1, 1),)  # left, top, step to the right, step down
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def png(
    values: npt.NDArray[Any], depth: int, colour: int, *, transparent: bytes = b"", interlaced: bool = False
) -> bytes:
    """A PNG file whose samples are ``values``, ``[H, W]`` or ``[H, W, C]``, each of ``depth`` bits."""
    height, width = values.shape[:2]
    lines = []
    for left, top, right, down in ADAM7 if interlaced else WHOLE:
        for row in values[top::down, left::right]:
            bits = "".join(f"{value:0{depth}b}" for value in row.flatten().tolist())
            padded = bits + "0" * (-len(bits) % 8)
            if padded:
                lines.append(b"\0" + int(padded, 2).to_bytes(len(padded) // 8, "big"))
    palette = bytes(range(256)) * 3 if colour == PALETTE else b""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)),
        (b"PLTE", palette[: 3 * 2**depth]),
        (b"tRNS", transparent),
        (b"IDAT", zlib.compress(b"".join(lines))),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks if data or kind == b"IEND")


def narrow_png(height: int) -> bytes:
    """A black PNG file of one bit per pixel, one pixel wide, made without its pixels."""
    header = struct.pack(">IIBBBBB", 1, height, 1, GREY, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(2 * height))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def tiff(
    samples: bytes,
    size: tuple[int, int],
    bits: Sequence[int],
    photometric: int,
    *,
    extra: Iterable[int] = (),
    signed: bool = False,
    order: str = "<",
) -> bytes:
    """A TIFF file of one strip.

    Args:
        samples: its content.
        size: width and height.
        bits: of each band.
        photometric: 1: grey, 2: red, green and blue, 3: palette.
        extra: ExtraSamples: for each band beyond those 0 (unspecified), 1 or 2 (transparency); empty: no such tag.
        signed: whether the samples are.
        order: "<" or ">".
    """
    start = 8 + len(samples)
    entries = [
        (256, size[:1]),
        (257, size[1:]),
        (258, bits),
        (259, (1,)),
        (262, (photometric,)),
        (273, (8,)),
        (277, (len(bits),)),
        (278, size[1:]),
        (279, (len(samples),)),
        *([(320, [value * 257 for value in range(256)] * 3)] if photometric == 3 else []),
        *([(338, tuple(extra))] if extra else []),
        *([(339, (2,) * len(bits))] if signed else []),
    ]
    directory, beyond = struct.pack(f"{order}H", len(entries)), b""
    after = start + 2 + 12 * len(entries) + 4
    for tag, values in entries:
        content = struct.pack(f"{order}{len(values)}H", *values)
        if len(content) > 4:
            content, beyond = struct.pack(f"{order}I", after + len(beyond)), beyond + content
        directory += struct.pack(f"{order}HHI", tag, 3, len(values)) + content.ljust(4, b"\0")
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(f"{order}I", start) + samples + directory + bytes(4) + beyond
