"""Pixel values of every depth, mode and format: kept in masks, brought to 8 bits by a known range in images."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade import COLOUR, COLOUR_ALPHA, GREY, GREY_ALPHA, PALETTE, png, tiff
from PIL import Image

from pcenet.data import DataError, check_data, open_segmentation_source, open_source
from pcenet.data.images import decode_image, inspect_image
from pcenet.data.masks import decode_mask

SHADES = np.arange(256).reshape(16, 16)  # an image of 8 bits


def encode(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def shown(data: bytes, grey_range: list[int] | None = None) -> np.ndarray:
    """One band of an image that has to be grey, ``[H, W]``."""
    pixels = np.asarray(decode_image(data, "x", grey_range=grey_range))
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("transparent", [False, True])
@pytest.mark.parametrize(
    ("colour", "depth"), [(GREY, 1), (GREY, 2), (GREY, 4), (GREY, 8), (GREY, 16)] + [(PALETTE, n) for n in (1, 2, 4, 8)]
)
def test_masks_keep_the_values_of_their_file(colour: int, depth: int, transparent: bool, interlaced: bool) -> None:
    values = np.random.default_rng(depth).integers(0, min(2**depth, 256), (9, 11))
    alpha = {GREY: b"\0\1", PALETTE: b"\0"}[colour] if transparent else b""
    mask = decode_mask(png(values, depth, colour, transparent=alpha, interlaced=interlaced), "x")
    assert mask.mode == "L"
    assert np.asarray(mask).tolist() == values.tolist()


def test_images_of_few_bits_are_spread_over_black_to_white() -> None:
    for depth, white in ((1, 1), (2, 3), (4, 15)):
        assert shown(png(np.array([[0, 1, white]]), depth, GREY)).tolist() == [[0, 255 // white, 255]]


@pytest.mark.parametrize("file_format", ["JPEG", "TIFF", "BMP", "GIF", "PPM", "WEBP"])
def test_a_mask_called_png_that_is_none(file_format: str) -> None:
    data = encode(Image.fromarray(SHADES.astype(np.uint8) // 200), file_format)
    with pytest.raises(DataError, match=rf"a\.png: .*it is in the format {file_format}; only PNG can be read here"):
        decode_mask(data, "a.png")


def test_masks_of_several_depths_have_the_same_classes(tmp_path: Path) -> None:
    values = np.array([[0, 1], [2, 3]])
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for index in range(10):
        Image.new("RGB", (2, 2), (index, 0, 0)).save(tmp_path / f"images/{index}.png")
        (tmp_path / f"masks/{index}.png").write_bytes(png(values, (2, 4, 8, 16)[index % 4], GREY))
    source = open_segmentation_source(tmp_path, "train")
    assert source.classes == ("0", "1", "2", "3")
    assert all(np.asarray(source.mask(index)).tolist() == values.tolist() for index in range(len(source)))
    assert check_data(tmp_path, "segment").mask_values == dict.fromkeys(range(4), 10)


def pgm(values: np.ndarray, maximum: int, magic: str = "P5") -> bytes:
    content = values.astype(">u2").tobytes() if magic == "P5" else " ".join(map(str, values.flatten())).encode()
    return f"{magic} {values.shape[1]} {values.shape[0]} {maximum}\n".encode() + content


def packed_12(values: np.ndarray) -> bytes:
    """Two values in three bytes."""
    return b"".join(int(f"{a:012b}{b:012b}", 2).to_bytes(3, "big") for a, b in values.reshape(-1, 2).tolist())


DEEP: dict[str, Callable[[np.ndarray], bytes]] = {
    "PNG": lambda values: png(values, 16, GREY),
    "PNG, interlaced": lambda values: png(values, 16, GREY, interlaced=True),
    "TIFF": lambda values: tiff(values.astype("<u2").tobytes(), values.shape[::-1], [16], 1),
    "TIFF, big end first": lambda values: tiff(
        values.astype(">u2").tobytes(), values.shape[::-1], [16], 1, order=">"
    ),
    "TIFF, compressed": lambda values: encode(
        Image.fromarray(values.astype(np.uint16)), "TIFF", compression="tiff_deflate"
    ),
    "TIFF, signed": lambda values: tiff(values.astype("<i2").tobytes(), values.shape[::-1], [16], 1, signed=True),
    "TIFF of 32 bits": lambda values: tiff(values.astype("<u4").tobytes(), values.shape[::-1], [32], 1),
    "PGM": lambda values: pgm(values, 65535),
    "PGM as text": lambda values: pgm(values, 65535, "P2"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DEEP)
def test_values_of_12_bits_need_a_range_and_are_then_what_8_bits_show(kind: str) -> None:
    data = DEEP[kind](SHADES << 4)
    assert shown(data, [0, 4095]).tolist() == SHADES.tolist()
    message = (
        r"^x: its grey values, 0 to 4080, use 6\.2% of the range 0 to 65535: it would be nearly black\."
        r" .*--grey-range '\[0, 4095\]'"
    )
    with pytest.raises(DataError, match=message):
        decode_image(data, "x")


@pytest.mark.parametrize("kind", [kind for kind in DEEP if kind != "TIFF, signed"])
def test_values_of_16_bits_keep_their_upper_8(kind: str) -> None:
    values = SHADES * 256 + np.arange(256).reshape(16, 16)[::-1]
    data = DEEP[kind](values)
    assert shown(data).tolist() == shown(data, [0, 65535]).tolist() == SHADES.tolist()


def test_a_file_that_says_how_many_bits_it_has_needs_no_range() -> None:
    values = SHADES << 4
    packed = tiff(packed_12(values), (16, 16), [12], 1)
    for data in (packed, pgm(values, 4095), pgm(values, 4095, "P2")):
        assert shown(data).tolist() == shown(data, [0, 4095]).tolist() == SHADES.tolist()


def test_a_value_means_the_same_in_every_image() -> None:
    """No stretch to what an image happens to have: 1000 is the same grey beside 4000 and alone."""
    for others in (4000, 1000, 0):
        values = np.array([[1000, others]])
        assert shown(png(values, 16, GREY), [0, 4095])[0, 0] == 1000 * 256 // 4096 == 62


def test_a_range_that_does_not_begin_at_black() -> None:
    values = np.array([[28000, 29500, 31000]])  # a thermal camera's
    with pytest.raises(DataError, match=r"28000 to 31000, use 4\.6% .* nearly all one grey\. .* '\[28000, 31000\]'"):
        decode_image(png(values, 16, GREY), "x")
    assert shown(png(values, 16, GREY), [28000, 31000]).tolist() == [[0, 1500 * 256 // 3001, 255]]


def test_values_beyond_16_bits_and_below_0() -> None:
    wide = tiff(np.array([[0, 70000]], "<u4").tobytes(), (2, 1), [32], 1)
    signed = tiff(np.array([[-1000, 1048, 3095, 4000]], "<i2").tobytes(), (4, 1), [16], 1, signed=True)
    for data, values in ((wide, "0 to 70000"), (signed, "-1000 to 4000")):
        with pytest.raises(DataError, match=f"x: its grey values, {values}, go beyond 0 to 65535"):
            decode_image(data, "x")
    assert shown(wide, [0, 131071]).tolist() == [[0, 70000 * 256 // 131072]]
    assert shown(signed, [-1000, 3095]).tolist() == [[0, 128, 255, 255]]


def test_a_few_bright_values_do_not_hide_that_the_others_are_dark() -> None:
    """Dead pixels, or "no data": 12-bit values with one of 65535 among 1,920."""
    values = (np.arange(1920, dtype=np.uint16) * 2).reshape(40, 48)
    values[0, 0] = 65535
    with pytest.raises(DataError, match=r"all but a few of its grey values, .*--grey-range '\[0, 4095\]'"):
        decode_image(png(values, 16, GREY), "dark.png")


def test_an_image_of_one_value_has_nothing_to_lose() -> None:
    assert shown(png(np.full((2, 2), 3), 16, GREY)).max() == 0


def test_an_image_that_lies_above_the_range() -> None:
    with pytest.raises(DataError, match=r"x: 94% of its grey values, 0 to 65280, lie above 4095, .* nearly white"):
        decode_image(png(SHADES << 8, 16, GREY), "x", grey_range=[0, 4095])
    with pytest.raises(DataError, match=r"x: 100% of its grey values, 65535 to 65535, .*--grey-range '\[0, 65535\]'"):
        decode_image(png(np.full((2, 2), 65535), 16, GREY), "x", grey_range=[0, 4095])


@pytest.mark.parametrize(
    ("colour", "bands"), [(COLOUR, 3), (COLOUR_ALPHA, 4), (GREY_ALPHA, 2)], ids=["RGB", "RGBA", "LA"]
)
def test_colours_of_16_bits(colour: int, bands: int) -> None:
    values = np.repeat(SHADES[..., None], bands, axis=2)
    if bands != 3:
        values[..., -1] = 255  # opaque
    full = decode_image(png(values * 257, 16, colour), "x")
    assert np.asarray(full)[..., 0].tolist() == SHADES.tolist()
    dark = values << 4
    if bands != 3:
        dark[..., -1] = 65535
    with pytest.raises(DataError, match=r"x: its colours have 16 bits, and use 6\.2% of their range.* nearly black"):
        decode_image(png(dark, 16, colour), "x")


def test_colours_of_16_bits_in_ppm() -> None:
    values = np.repeat(SHADES[..., None], 3, axis=2)
    for shades, maximum in ((values * 257, 65535), (values * 16, 4080)):
        content = f"P6 16 16 {maximum}\n".encode() + shades.astype(">u2").tobytes()
        assert np.asarray(decode_image(content, "x")).tolist() == values.tolist()
        assert inspect_image(content, "x").oddities == ["its colours have 16 bits; the upper 8 count"]
    # 4080 of 65535 is rounded to 16 of 255.
    with pytest.raises(DataError, match=r"its colours have 16 bits, and use 6\.6% .* nearly black"):
        decode_image(b"P6 16 16 65535\n" + (values * 16).astype(">u2").tobytes(), "x")


# Bands: the first three are (200, 50, 10), what comes after is 90.
def bands(count: int, photometric: int = 2, extra: tuple[int, ...] = (), last: int = 90) -> bytes:
    pixel = [200, 50, 10, last, last][:count] if photometric == 2 else [200, last][:count]
    return tiff(bytes(pixel) * 4, (2, 2), [8] * count, photometric, extra=extra)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (bands(4), "it has 4 bands, of which 3 are used"),
        (bands(4, extra=(0,)), "it has 4 bands, of which 3 are used"),
        (bands(4, extra=(1,)), "it has 4 bands, of which 3 are used, and the last, marked as transparency, would be"),
        (bands(4, extra=(2,)), "it has 4 bands, of which 3 are used, and the last, marked as transparency, would be"),
        (bands(5, extra=(0, 0)), "it has 5 bands, of which 3 are used"),
        (bands(5, extra=(2, 0)), "it has 5 bands, of which 3 are used"),
        (bands(5), "it is a TIFF of a kind that is not read: save one band .grey. or three"),
        (bands(2, 1, extra=(2,)), "it has 2 bands, of which 1 is used, and the last"),
        (bands(2, 3, extra=(0,)), "it has 2 bands, of which 1 is used"),
    ],
)
def test_bands_that_are_not_used_are_counted(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=f"^a.tif: .*{message}"):
        decode_image(data, "a.tif")
    with pytest.raises(DataError, match=message):
        inspect_image(data, "a.tif")


def test_bands_that_are_used() -> None:
    for data in (bands(3), bands(4, extra=(2,), last=255), encode(Image.new("RGB", (2, 2), (200, 50, 10)), "TIFF")):
        assert np.asarray(decode_image(data, "x")).tolist() == [[[200, 50, 10]] * 2] * 2
    cmyk = encode(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "TIFF")
    assert np.asarray(decode_image(cmyk, "x")).tolist() == [[[255, 0, 0]] * 2] * 2


def test_check_data_says_in_numbers_what_deep_grey_uses(tmp_path: Path) -> None:
    """14 bits in files of 16: each image shows something, all together use a quarter."""
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(2):
                values = np.random.default_rng((len(name + split), index, name == "cat")).integers(0, 16384, (16, 16))
                values[0, :2] = 0, 16383
                (tmp_path / split / name / f"{index}.png").write_bytes(png(values, 16, GREY))
    report = check_data(tmp_path)
    assert report.usable
    (finding,) = [finding for finding in report.findings if finding.kind == "grey range"]
    assert (
        "the 8 grey images of more than 8 bits have values from 0 to 16383, 25.0% of the range 0 to 65535"
        in finding.message
    )
    assert "--grey-range '[0, 16383]'" in finding.message
    report = check_data(tmp_path, grey_range=[0, 16383])
    assert {finding.kind for finding in report.findings} == {"odd image"}
    assert "0 to 16383, have more than 8 bits; 0 is black and 16383 white" in report.findings[0].message
    source = open_source(tmp_path, "train", grey_range=[0, 16383])
    assert np.asarray(source.image(0))[0, :2, 0].tolist() == [0, 255]
    with pytest.raises(ValueError, match=r"grey_range must be two whole numbers.*\[0, 4095\].*, got \[5, 5\]"):
        open_source(tmp_path, "train", grey_range=[5, 5])


@pytest.mark.parametrize(("orientation", "noted"), [(0, False), (1, False), (6, True), (9, False)])
def test_only_what_is_turned_is_called_so(orientation: int, noted: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    oddities = inspect_image(encode(Image.new("RGB", (2, 3)), "JPEG", exif=exif), "x").oddities
    assert any("its side" in text for text in oddities) == noted


@pytest.mark.parametrize(
    ("file_format", "oddities"),
    [
        ("MPO", []),  # a photograph with a smaller one for the camera's screen
        ("GIF", ["it is an animation; the first frame counts"]),
        ("TIFF", ["it has several pages; the first one counts"]),
    ],
)
def test_what_has_several_pictures_is_called_what_it_is(file_format: str, oddities: list[str]) -> None:
    data = encode(Image.new("RGB", (8, 8)), file_format, save_all=True, append_images=[Image.new("RGB", (8, 8), "red")])
    assert inspect_image(data, "x").oddities == oddities
