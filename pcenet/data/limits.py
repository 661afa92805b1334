"""What a file from anywhere may cost: limits of what is read, and of what is made of it. All commands share them.

The third limit is Pillow's, ``PIL.Image.MAX_IMAGE_PIXELS``: how many pixels an image may have.
"""

from __future__ import annotations

LARGEST_FILE = 2**28  # bytes, in an archive after unpacking; no image need be larger
# The shorter side of an image is brought to the network's size and the longer follows, so this bounds what is made of
# an image of any size: so many times the pixels of a square one.
LONGEST_SIDE = 32  # times the shorter


MOST_SCANS = 100  # of a progressive JPEG, which is decoded anew for each; usual are ten


def scans_fault(data: bytes) -> str | None:
    """What is wrong with the number of scans of a JPEG file's content, if anything."""
    if not data.startswith(b"\xff\xd8") or data.count(b"\xff\xda") <= MOST_SCANS:
        return None
    return f"the image is a JPEG of more than {MOST_SCANS} scans. Save it anew."


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
