"""Bytes of an image file -> an upright RGB image, or a mask of whole numbers."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pcenet.data.base import DataError

T = TypeVar("T")
# What a file that ends in one of `pcenet.data.layout.IMAGE_SUFFIXES` may be. For others Pillow may run other programs.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
ORIENTATION = 0x0112  # EXIF's tag; 1: upright


class Inspection(NamedTuple):
    """An image as ``decode_image`` gives it, how its file describes it, and what is unusual about that."""

    image: Image.Image
    kind: str
    oddities: list[str]


def decode_image(
    data: bytes, name: str, *, max_pixels: int | None = None, formats: tuple[str, ...] = FORMATS
) -> Image.Image:
    """Decode one image file to an upright image in mode RGB.

    The EXIF orientation is applied. Transparent pixels are laid on white. Grey images of 16 bits keep their
    upper 8 bits, as Pillow does for 16-bit colour. Of an animation the first frame counts.

    Args:
        data: the file's content.
        name: what to call the file in an error.
        max_pixels: the most pixels that it may have; None: ``PIL.Image.MAX_IMAGE_PIXELS``, which always holds.
        formats: Pillow's names of the formats to read, such as ``("PNG",)``; by default those that data sets may have.

    Raises:
        DataError: the data is no image, is cut off or damaged, has more pixels than allowed, or has floating-point
            pixels, whose range is unknown.
    """
    return _decode(data, name, _to_rgb, max_pixels, formats)


def inspect_image(data: bytes, name: str) -> Inspection:
    """``decode_image``, and what it passes over in silence. Arguments and errors are the same."""
    return _decode(data, name, _inspect)


def decode_mask(data: bytes, name: str) -> Image.Image:
    """Decode one mask to an upright image in mode L whose pixels are the file's values.

    Read are grey (1, 8 or 16 bits per pixel) and palette images; of the latter the index is the value.

    Args:
        data: the file's content.
        name: what to call the file in an error.

    Raises:
        DataError: as ``decode_image``; the mask has colour or transparency, or a value over 255.
    """
    return _decode(data, name, _to_values)


def _decode(
    data: bytes,
    name: str,
    convert: Callable[[Image.Image], T],
    max_pixels: int | None = None,
    formats: tuple[str, ...] = FORMATS,
) -> T:
    limit, limit_name = _limit(max_pixels)
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
        if limit is not None and image.width * image.height > limit:
            raise Image.DecompressionBombError  # up to twice its own limit Pillow only warns
        return convert(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{name}: the image has more than {limit_name} pixels. Shrink or remove it.") from error
    except Exception as error:  # Pillow's plugins raise nearly any type on damaged data
        reason = _unknown(data) if isinstance(error, UnidentifiedImageError) else error
        raise DataError(
            f"{name}: the file cannot be read as an image ({reason}). Replace or remove the file."
        ) from error


def _limit(max_pixels: int | None) -> tuple[int | None, str]:
    """The most pixels of an image: the caller's limit or Pillow's, whichever is lower, and what to call it."""
    if max_pixels is not None and max_pixels <= (Image.MAX_IMAGE_PIXELS or max_pixels):
        return max_pixels, str(max_pixels)
    return Image.MAX_IMAGE_PIXELS, f"PIL.Image.MAX_IMAGE_PIXELS = {Image.MAX_IMAGE_PIXELS}"


def _unknown(data: bytes) -> str:
    """What data that is no image is instead."""
    if not data:
        return "it is empty"
    start = data[:256]
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "it is a web page"
    known = f"it is in no known format; {', '.join(FORMATS)} are read"
    return "it is text" if start.isascii() and b"\0" not in start else known


def _inspect(image: Image.Image) -> Inspection:
    notes = {
        "it is an animation; the first frame counts": getattr(image, "is_animated", False),
        "it has 16 bits per pixel; the upper 8 count": image.mode == "I" or image.mode.startswith("I;16"),
        "it is in CMYK; its colours are converted without a profile": image.mode == "CMYK",
        "it has transparency, which is laid on white": image.has_transparency_data,
        "it lies on its side or is mirrored, and is turned as its EXIF data says": (
            image.getexif().get(ORIENTATION, 1) != 1
        ),
    }
    kind = f"{image.format} {image.mode}"
    return Inspection(_to_rgb(image), kind, [text for text, holds in notes.items() if holds])


def _to_rgb(image: Image.Image) -> Image.Image:
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; store it with 8 or 16 bits per channel")
    if image.mode == "I" or image.mode.startswith("I;16"):  # "I" is how Pillow opens some 16-bit formats
        high_byte = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(high_byte.clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _to_values(image: Image.Image) -> Image.Image:
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "L":
        image.load()
        return image
    if image.mode not in ("1", "P", "I") and not image.mode.startswith("I;16"):
        raise ValueError(
            f"its mode is {image.mode}; a mask has one channel of whole numbers, the class of each pixel:"
            f" save it as a grey or palette PNG, not as the colours that stand for the classes"
        )
    values = np.asarray(image)
    if values.max() > 255:
        raise ValueError(f"it has the value {values.max()}; the values of a mask are 0 to 255")
    return Image.fromarray(values.astype(np.uint8))
