"""Bytes of an image file -> an upright RGB image, or a mask of whole numbers."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pcenet.choices import GreyRange
from pcenet.data.base import DataError
from pcenet.data.grey import LEAST_USED, OUTLIERS, Grey, GreyRangeError, grey_of, is_deep, packing, to_8_bits
from pcenet.data.limits import scans_fault, shape_fault

T = TypeVar("T")
# What a file that ends in one of `pcenet.data.tree.IMAGE_SUFFIXES` may be. For others Pillow may run other programs.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
ORIENTATION = 0x0112  # EXIF's tag
TURNED = range(2, 9)  # its values for images that are not upright
SAMPLES, EXTRA_SAMPLES, ALPHA = 277, 338, (1, 2, 999)  # TIFF's tags; values of the latter for transparency
USED_BANDS = {"RGB": 3, "RGBA": 3, "LAB": 3, "CMYK": 4}  # by mode; of the others one


class Inspection(NamedTuple):
    """An image as ``decode_image`` gives it, how its file describes it, and what is unusual about that.

    Attributes:
        image: the image.
        kind: its format and mode, such as "JPEG RGB".
        oddities: what is unusual, in sentences without their full stop.
        grey: of grey of more than 8 bits, the lowest and highest value, and those that become black and white.
    """

    image: Image.Image
    kind: str
    oddities: list[str]
    grey: tuple[int, int, int, int] | None = None


class _RefusedError(Exception):
    """An image that can be read, but would not show what its file holds."""


def decode_image(
    data: bytes,
    name: str,
    *,
    grey_range: GreyRange | None = None,
    max_pixels: int | None = None,
    formats: tuple[str, ...] = FORMATS,
) -> Image.Image:
    """Decode one image file to an upright image in mode RGB.

    The EXIF orientation is applied. Transparent pixels are laid on white. Colours of 16 bits keep their upper 8. Of an
    animation the first frame counts.

    Args:
        data: the file's content.
        name: what to call the file in an error.
        grey_range: of grey of more than 8 bits, the values that become black and white; None: all that the file's bits
            can hold, of 16 bits 0 to 65535. See ``pcenet.data.grey``.
        max_pixels: the most pixels that it may have; None: ``PIL.Image.MAX_IMAGE_PIXELS``, which always holds.
        formats: Pillow's names of the formats to read, such as ``("PNG",)``; by default those that data sets may have.

    Raises:
        DataError: the data is no image, is cut off or damaged, has more pixels than allowed or is too long and narrow
            (``pcenet.data.limits``), has more bands than are used, or values of more than 8 bits that use hardly any
            of their range, or floating-point pixels, whose range is unknown.
    """
    return decode(data, name, partial(_to_rgb, grey_range=grey_range), max_pixels, formats)


def picture_of(image: Image.Image, name: str, *, grey_range: GreyRange | None = None) -> Image.Image:
    """An image of Pillow as `decode_image` gives that of a file: upright, in mode RGB; the one given stays as it is.

    Raises:
        DataError: for what that refuses.
    """
    try:
        return _rgb_of(_upright(image, in_place=False), grey_range)
    except (_RefusedError, GreyRangeError, OSError, ValueError) as error:
        raise DataError(f"{name}: {error}") from error


def inspect_image(data: bytes, name: str, *, grey_range: GreyRange | None = None) -> Inspection:
    """``decode_image``, and what it passes over in silence. Arguments and errors are the same."""
    return decode(data, name, partial(_inspect, grey_range=grey_range))


def decode(
    data: bytes,
    name: str,
    convert: Callable[[Image.Image], T],
    max_pixels: int | None = None,
    formats: tuple[str, ...] = FORMATS,
) -> T:
    """What ``convert`` makes of the image in a file; whatever goes wrong is a `DataError` with the name of the file."""
    limit, limit_name = _limit(max_pixels)
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
        if limit is not None and image.width * image.height > limit:
            raise Image.DecompressionBombError  # up to twice its own limit Pillow only warns
        if fault := shape_fault(*image.size) or scans_fault(data):
            raise _RefusedError(fault)
        return convert(image)
    except (_RefusedError, GreyRangeError) as error:
        raise DataError(f"{name}: {error}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{name}: the image has more than {limit_name} pixels. Shrink or remove it.") from error
    except Exception as error:  # Pillow's plugins raise nearly any type on damaged data
        reason = _unknown(data, formats) if isinstance(error, UnidentifiedImageError) else error
        raise DataError(
            f"{name}: the file cannot be read as an image ({reason}). Replace or remove the file."
        ) from error


def _limit(max_pixels: int | None) -> tuple[int | None, str]:
    """The most pixels of an image: the caller's limit or Pillow's, whichever is lower, and what to call it."""
    if max_pixels is not None and max_pixels <= (Image.MAX_IMAGE_PIXELS or max_pixels):
        return max_pixels, str(max_pixels)
    return Image.MAX_IMAGE_PIXELS, f"PIL.Image.MAX_IMAGE_PIXELS = {Image.MAX_IMAGE_PIXELS}"


def _unknown(data: bytes, formats: tuple[str, ...]) -> str:
    """What data that is in none of the formats is instead."""
    if not data:
        return "it is empty"
    start = data[:256]
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "it is a web page"
    if start.isascii() and b"\0" not in start:
        return "it is text"
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return f"it is in the format {image.format}; only {', '.join(formats)} can be read here"
    except Exception:  # whatever damaged data bring about
        if start.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
            return "it is a TIFF of a kind that is not read: save one band (grey) or three (colours) of 8 or 16 bits"
        return f"it is in no known format; {', '.join(formats)} are read"


def _inspect(image: Image.Image, grey_range: GreyRange | None) -> Inspection:
    several = getattr(image, "is_animated", False)
    notes = {
        "it is an animation; the first frame counts": several and image.format not in ("MPO", "TIFF"),
        "it has several pages; the first one counts": several and image.format == "TIFF",
        "its colours have 16 bits; the upper 8 count": _has_deep_colours(image),
        "it is in CMYK; its colours are converted without a profile": image.mode == "CMYK",
        "it has transparency, which is laid on white": image.has_transparency_data,
        "it lies on its side or is mirrored, and is turned as its EXIF data says": (
            image.getexif().get(ORIENTATION) in TURNED
        ),
    }
    kind = f"{image.format} {image.mode}"
    oddities = [text for text, holds in notes.items() if holds]
    picture = _upright(image)
    if isinstance(picture, Image.Image):
        return Inspection(_rgb_of(picture, grey_range), kind, oddities)
    least, most = int(picture.values.min()), int(picture.values.max())
    black, white = grey_range or (picture.least, picture.most)
    oddities.append(f"its grey values, {least} to {most}, have more than 8 bits; {black} is black and {white} white")
    return Inspection(_rgb_of(picture, grey_range), kind, oddities, (least, most, black, white))


def _to_rgb(image: Image.Image, grey_range: GreyRange | None) -> Image.Image:
    return _rgb_of(_upright(image), grey_range)


def _upright(image: Image.Image, in_place: bool = True) -> Image.Image | Grey:
    """The image upright; grey of more than 8 bits as its values. Refuses what it would show wrongly."""
    packed, deep_colours = packing(image), _has_deep_colours(image)
    _check_bands(image)
    if in_place:
        ImageOps.exif_transpose(image, in_place=True)
    else:
        kind, image = image.format, ImageOps.exif_transpose(image)
        image.format = kind
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; store it with 8 or 16 bits per channel")
    if is_deep(image.mode):
        return grey_of(image, *packed)
    if deep_colours and (brightest := int(np.quantile(np.asarray(image)[..., :3], 1 - OUTLIERS))) < LEAST_USED * 255:
        raise _RefusedError(
            f"its colours have 16 bits, and use {(brightest + 1) / 256:.1%} of their range: it would be nearly black."
            " Save it with 8 bits per channel."
        )
    return image


def _has_deep_colours(image: Image.Image) -> bool:
    """Whether an image that is not decoded yet has colours of 16 bits, of which Pillow reads the upper 8."""
    raw_mode, argument = packing(image)
    return image.mode in ("RGB", "RGBA") and (";16" in raw_mode or (image.format == "PPM" and (argument or 0) > 255))


def _check_bands(image: Image.Image) -> None:
    """Refuse a TIFF with a band that would be dropped, or mixed into the colours although it may be no transparency."""
    if image.format != "TIFF":
        return
    tags = image.tag_v2  # type: ignore[attr-defined] # of TIFF images only
    used = USED_BANDS.get(image.mode, 1)
    bands = tags.get(SAMPLES, used)
    if bands <= used:
        return
    text = f"it has {bands} bands, of which {used} {'is' if used == 1 else 'are'} used"
    extra = tags.get(EXTRA_SAMPLES, ())
    if bands == used + 1 and image.mode.endswith("A") and extra and extra[0] in ALPHA:
        if image.getchannel("A").getextrema() == (255, 255):
            return
        text += ", and the last, marked as transparency, would be mixed into the colours"
    raise _RefusedError(f"{text}. Save the bands that count as an image of their own, transparency as PNG.")


def _rgb_of(picture: Image.Image | Grey, grey_range: GreyRange | None) -> Image.Image:
    """An upright image in mode RGB."""
    image = to_8_bits(picture, grey_range) if isinstance(picture, Grey) else picture
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
