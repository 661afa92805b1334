"""Any image file becomes an upright RGB image, or an error that names it."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pcenet.data.base import DataError
from pcenet.data.images import decode_image
from pcenet.data.limits import scans_fault


def encode(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> list[list[list[int]]]:
    image = decode_image(data, "x")
    assert image.mode == "RGB"
    return np.asarray(image).tolist()


RED, BLUE, WHITE = [255, 0, 0], [0, 0, 255], [255, 255, 255]


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [(1, [[RED, BLUE]]), (2, [[BLUE, RED]]), (3, [[BLUE, RED]]), (6, [[RED], [BLUE]]), (8, [[BLUE], [RED]])],
)
def test_exif_orientation(orientation: int, upright: list[list[list[int]]]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation  # 6: the camera's first column is the top row of what was seen
    image = Image.fromarray(np.array([[RED, BLUE]], dtype=np.uint8))
    assert pixels(encode(image, exif=exif)) == upright


def test_transparency_is_laid_on_white() -> None:
    rgba = Image.fromarray(np.array([[[255, 0, 0, 255], [0, 0, 255, 0], [255, 0, 0, 102]]], dtype=np.uint8))
    assert pixels(encode(rgba)) == [[RED, WHITE, [255, 153, 153]]]  # 255 * (1 - 102 / 255)
    grey_alpha = Image.fromarray(np.array([[[80, 255], [80, 0]]], dtype=np.uint8), mode=None).convert("LA")
    assert pixels(encode(grey_alpha)) == [[[80] * 3, WHITE]]


def test_palette_with_and_without_a_transparent_entry() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, *BLUE])
    palette.putdata([0, 1])
    assert pixels(encode(palette)) == [[RED, BLUE]]
    assert pixels(encode(palette, transparency=1)) == [[RED, WHITE]]


def test_a_transparent_colour_of_an_rgb_image() -> None:
    image = Image.fromarray(np.array([[RED, BLUE]], dtype=np.uint8))
    assert pixels(encode(image, transparency=(0, 0, 255))) == [[RED, WHITE]]


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_keeps_its_upper_byte(file_format: str) -> None:
    values = np.array([[0, 255, 256, 32767, 65535]], dtype=np.uint16)
    expected = [[[value] * 3 for value in (0, 0, 1, 127, 255)]]
    assert pixels(encode(Image.fromarray(values), file_format)) == expected


def test_grey_bilevel_and_cmyk() -> None:
    assert pixels(encode(Image.new("L", (1, 1), 77))) == [[[77] * 3]]
    assert pixels(encode(Image.new("1", (1, 1), 1))) == [[WHITE]]
    assert pixels(encode(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF")) == [[RED]]


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (1, 1), "red"), Image.new("RGB", (1, 1), "blue")]
    assert pixels(encode(frames[0], "GIF", save_all=True, append_images=frames[1:])) == [[RED]]


JPEG = encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it is empty"),
        (b"<!DOCTYPE html>", "it is a web page"),
        (b"see elsewhere", "it is text"),
        (b"PK\x03\x04\xff\x00", "it is in no known format; BMP, GIF"),
        (JPEG[: len(JPEG) // 2], "image file is truncated"),
        (JPEG[:20], ""),
    ],
)
def test_data_that_cannot_be_read_names_the_file(data: bytes, reason: str) -> None:
    message = rf"^cat/7\.jpg: the file cannot be read as an image \({reason}.*Replace or remove"
    with pytest.raises(DataError, match=message):
        decode_image(data, "cat/7.jpg")


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(DataError, match=r"x\.tif: .*floating-point"):
        decode_image(encode(Image.new("F", (1, 1)), "TIFF"), "x.tif")


@pytest.mark.parametrize("warnings_are", ["ignore", "error"])
@pytest.mark.parametrize("side", [4, 40])
def test_too_many_pixels(side: int, warnings_are: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow only warns up to twice its limit; here the limit holds."""
    data = encode(Image.new("L", (side, side)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", side * side)
    decode_image(data, "x")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15)
    with warnings.catch_warnings():
        warnings.simplefilter(warnings_are, Image.DecompressionBombWarning)
        with pytest.raises(DataError, match=r"^big\.png: .* more than PIL\.Image\.MAX_IMAGE_PIXELS = 15 pixels"):
            decode_image(data, "big.png")


def test_a_lower_limit_than_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(Image.new("RGB", (4, 3)))
    assert decode_image(data, "x", max_pixels=12).size == (4, 3)
    with pytest.raises(DataError, match=r"^big.png: the image has more than 11 pixels\. Shrink or remove it\.$"):
        decode_image(data, "big.png", max_pixels=11)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # over twice that Pillow raises, below it warns
    for limit, named in ((11, "PIL.Image.MAX_IMAGE_PIXELS = 10"), (9, "9"), (10, "10")):
        with pytest.raises(DataError, match=f"more than {named} pixels"):
            decode_image(data, "big.png", max_pixels=limit)


def test_formats_that_are_not_asked_for() -> None:
    data = encode(Image.new("RGB", (1, 1)), "BMP")
    assert decode_image(data, "x", formats=("PNG", "BMP")).size == (1, 1)
    with pytest.raises(DataError, match="x: the file cannot be read as an image"):
        decode_image(data, "x", formats=("PNG",))


@pytest.mark.parametrize("after", [200 * b"\xff\xda", 101 * b"\xff\xda\x00\x02"])
def test_what_follows_a_photograph_in_its_file_is_no_part_of_it(after: bytes) -> None:
    """Telephones append a film, in which any bytes may be."""
    photograph, end = encode(Image.new("RGB", (16, 16)), "JPEG"), b"\xff\xd9"
    assert scans_fault(photograph + after) is None
    assert scans_fault(photograph.removesuffix(end) + 99 * b"\xff\xda\x00\x02" + end) is None  # and its own
    # What the length of a comment or the like reaches over is no scan for decoders, either; reserved markers have no
    # length for them. And no image needs so many markers.
    over = (2 + 4 * 101).to_bytes(2, "big") + 101 * b"\xff\xda\x00\x02"
    assert scans_fault(photograph[:2] + b"\xff\xe1" + over + photograph[2:]) is None
    assert scans_fault(photograph.removesuffix(end) + b"\xff\x02" + over + end) is not None
    assert scans_fault(photograph[:2] + 20_000 * b"\xff\xe1\x00\x02" + 101 * b"\xff\xda\x00\x02") is not None
