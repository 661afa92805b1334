"""What a file from anywhere may cost: limits of what is read, and of what is made of it. All commands share them.

The third limit is Pillow's, ``PIL.Image.MAX_IMAGE_PIXELS``: how many pixels an image may have.
"""

from __future__ import annotations

import re

LARGEST_FILE = 2**28  # bytes, in an archive after unpacking; no image need be larger
# The shorter side of an image is brought to the network's size and the longer follows, so this bounds what is made of
# an image of any size: so many times the pixels of a square one.
LONGEST_SIDE = 32  # times the shorter


MOST_SCANS = 100  # of a progressive JPEG, which is decoded anew for each; usual are ten
MOST_MARKERS = 10_000  # each of 64 KiB at most
SCAN, END = b"\xff\xda", b"\xff\xd9"
ALONE = (b"\xff\x01", b"\xff\xd8")  # all others are followed by the length of what belongs to them
# Neither a byte 255 of a scan's content nor where decoders may restart; nor what is reserved, which they drop alone.
MARKER = re.compile(rb"\xff[\x01\xc0-\xcf\xd8-\xfe]")


def scans_fault(data: bytes) -> str | None:
    """What is wrong with the number of scans of a JPEG file's content, if anything."""
    # The bytes of a scan's marker are common by chance, above all in the film that telephones append to a photograph.
    if not data.startswith(b"\xff\xd8") or data.count(SCAN) <= MOST_SCANS or scans_of(data) <= MOST_SCANS:
        return None
    return f"the image is a JPEG of more than {MOST_SCANS} scans. Save it anew."


def scans_of(data: bytes) -> int:
    """The scans of a JPEG image, counted by its markers up to the one that ends it; ``MOST_SCANS + 1`` for more, or
    where the image has more markers than any needs."""
    scans, position = 0, 2
    for _ in range(MOST_MARKERS):
        marker = MARKER.search(data, position)
        if marker is None or marker[0] == END or scans > MOST_SCANS:
            return scans
        scans += marker[0] == SCAN
        position = marker.end()
        if marker[0] not in ALONE:
            position += int.from_bytes(data[position : position + 2], "big")
    return MOST_SCANS + 1


def file_fault(size: int) -> str | None:
    """What is wrong with a file of ``size`` bytes, if anything."""
    if size <= LARGEST_FILE:
        return None
    return f"the file has {size} bytes, more than {LARGEST_FILE}. Shrink or remove it."


def shape_fault(width: int, height: int) -> str | None:
    """What is wrong with the shape of an image, if anything."""
    if max(width, height) <= LONGEST_SIDE * min(width, height):
        return None
    return (
        f"the image has {width} x {height} pixels; its longer side may be {LONGEST_SIDE} times the shorter one at most."
        " Crop or remove it."
    )
