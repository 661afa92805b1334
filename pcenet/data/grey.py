"""Grey values of more than 8 bits -> 0 to 255.

Which value is white is not in most files: cameras write 10, 12 or 14 bits into files of 16, whose picture is then
nearly black. The range is given, and a network keeps the one that it was trained with; else it is all that the file's
bits can hold, and an image that uses hardly any of it is refused. It is never stretched to what an image happens to
have: then a pixel's meaning would depend on the brightest one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from pcenet.choices import GreyRange

LEAST_USED = 1 / 8  # of the range: the share from an image's lowest to its highest value below which it is refused
OUTLIERS = 1 / 1000  # of an image's values at either end, which do not count for that share: dead pixels, "no data"
MOST_ABOVE = 1 / 2  # of an image's values that may lie above a range that was given


class GreyRangeError(ValueError):
    """The range does not suit an image; the text says what its values are."""


class Grey(NamedTuple):
    """Grey values of more than 8 bits.

    Attributes:
        values: ``[H, W]``, as they are in the file.
        least, most: the lowest and the highest that the file can hold; of PGM the latter is what its header says.
    """

    values: npt.NDArray[Any]
    least: int
    most: int


def is_deep(mode: str) -> bool:
    """Whether Pillow's mode is of grey values of more than 8 bits."""
    return mode == "I" or mode.startswith("I;16")


def packing(image: Image.Image) -> tuple[str, Any]:
    """How the values of an image that is not decoded yet lie in its file: Pillow's raw mode, and its argument or None.

    Such as ``("L;2", None)``, or for PGM and PPM, whose header names the highest value, ``("L", 4095)``.
    """
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else ""
    if isinstance(arguments, str):
        return arguments, None
    return str(arguments[0]), arguments[1] if len(arguments) > 1 else None


def grey_of(image: Image.Image, raw_mode: str, argument: Any) -> Grey:
    """The values of a deep image (see `is_deep`); ``raw_mode`` and ``argument`` as ``packing`` gave them before."""
    values = np.asarray(image)
    if image.format == "PPM" and argument:  # Pillow has spread them over 16 bits
        return Grey(np.rint(values * (argument / 65535)).astype(np.int32), 0, argument)
    return Grey(values, 0, 4095 if raw_mode == "I;12" else 65535)


def to_8_bits(grey: Grey, given: GreyRange | None) -> Image.Image:
    """An image in mode L: the lowest value of the range becomes 0, the highest 255, and what lies beyond likewise.

    Args:
        grey: the values.
        given: the values of black and white; None: all that the file can hold.

    Raises:
        GreyRangeError: without ``given``, a value lies outside the file's range, or the image uses less than an eighth
            of it; with it, most values lie above.
    """
    fault = _fault_of_given(grey.values, given[1]) if given else _fault_of_file(grey)
    if fault:
        raise GreyRangeError(fault)
    low, high = given or (grey.least, grey.most)
    picture = np.empty(grey.values.shape, np.uint8)
    for shades, values in zip(picture, grey.values, strict=True):  # line by line, for the sake of memory
        # Of 16 bits the upper 8, of 12 likewise.
        shades[:] = (values.astype(np.int64).clip(low, high) - low) * 256 // (high - low + 1)
    return Image.fromarray(picture)


def _fault_of_given(values: npt.NDArray[Any], high: int) -> str | None:
    above = float((values > high).mean())
    if above <= MOST_ABOVE:
        return None
    least, most = int(values.min()), int(values.max())
    return (
        f"{above:.0%} of its grey values, {least} to {most}, lie above {high}, which is white in grey_range: it would"
        f" be nearly white. {way_out(least, most)}"
    )


def _fault_of_file(grey: Grey) -> str | None:
    least, most, extent = int(grey.values.min()), int(grey.values.max()), grey.most - grey.least
    if least < grey.least or most > grey.most:
        return f"its grey values, {least} to {most}, go beyond {grey.least} to {grey.most}. {way_out(least, most)}"
    which = "its grey values"
    if most - least >= LEAST_USED * extent:
        least, most = (int(value) for value in np.quantile(grey.values, (OUTLIERS, 1 - OUTLIERS)))
        which = "all but a few of its grey values"
    used = (most - least) / extent
    if least == most or used >= LEAST_USED:  # an image of one value has nothing to lose
        return None
    looks = "nearly black" if most - grey.least < LEAST_USED * extent else "nearly all one grey"
    return (
        f"{which}, {least} to {most}, use {used:.1%} of the range {grey.least} to {grey.most}: it would be"
        f" {looks}. {way_out(least, most)}"
    )


def way_out(least: int, most: int) -> str:
    """The option, with a range that suits values from ``least`` to ``most``."""
    bits = 2 ** max(most, 1).bit_length() - 1
    narrow = most > least and (least < 0 or most - least < LEAST_USED * bits)
    low, high = (least, most) if narrow else (0, bits)
    return f"Say which values are black and white in all of the files: --grey-range '[{low}, {high}]' (grey_range)."
