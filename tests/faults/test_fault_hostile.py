"""Files from strangers: refused with a message, nothing executed, nothing large allocated."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import resource
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults.runs import in_a_process
from handmade import GREY, narrow_png, png, tiff
from PIL import Image, ImageCms
from safetensors.torch import load_file, save_file

from pcenet.cli import main
from pcenet.data import (
    check_data,
    cover_transform,
    eval_transform,
    open_source,
    segment_train_transform,
    train_transform,
)
from pcenet.data.base import DataError
from pcenet.data.files import FolderTree, ZipTree
from pcenet.data.images import decode_image
from pcenet.inference.batches import read_batches
from pcenet.inference.inputs import find_inputs
from pcenet.models import create_network, load_model
from pcenet.runs.config import TrainConfig
from pcenet.training.network import build_model

WEIGHTS, CONFIG = "model.safetensors", "config.json"
ROOM = 400 * 2**20  # bytes of address space that a refusal may take


class Attack:
    """What runs when a pickle of it is loaded."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.sentinel}'",)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder."""
    torch.manual_seed(0)
    model = create_network("pce_nano", num_classes=2, widths=[8, 8, 8], num_experts=2)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of the weights."""
    content = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    table = json.loads(content[8 : 8 + length])
    change(table)
    text = json.dumps(table).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def overlap(table: dict[str, Any]) -> None:
    """Two tensors of one size share their bytes."""
    names = [name for name in table if name.endswith("norm1.weight") or name.endswith("norm1.bias")]
    table[names[1]]["data_offsets"] = table[names[0]]["data_offsets"]


def huge(table: dict[str, Any]) -> None:
    table["head.fc.weight"] = {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}


def endless(table: dict[str, Any]) -> None:
    table["head.fc.weight"] = {"dtype": "F32", "shape": [0, 2**62, 2**62, 2**62], "data_offsets": [0, 0]}


def odd_numbers(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | {"head.fc.bias": tensors["head.fc.bias"].to(torch.complex64)}, folder / WEIGHTS)


def prepared(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / CONFIG).read_text())["pretrained_cfg"]
    config(folder, pretrained_cfg=values | changes)


def config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(values | changes))


def arguments(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / CONFIG).read_text())["model_args"]
    config(folder, model_args=values | changes)


def without(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors.pop("head.fc.bias")
    save_file(tensors, folder / WEIGHTS)


MODELS: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "a pickle for weights": (
        lambda folder, sentinel: (folder / WEIGHTS).write_bytes(pickle.dumps(Attack(sentinel))),
        "no safetensors file",
    ),
    "a torch file for weights": (
        lambda folder, sentinel: torch.save({"x": Attack(sentinel)}, folder / WEIGHTS),
        "no safetensors file",
    ),
    "a header of 8 EB": (
        lambda folder, _: (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**63 - 1) + b"{}"),
        "no safetensors file",
    ),
    "a header longer than the file": (
        lambda folder, _: (folder / WEIGHTS).write_bytes(struct.pack("<Q", 10**7) + b"{}"),
        "no safetensors file",
    ),
    "a tensor of 4 TB": (lambda folder, _: header(folder, huge), "no safetensors file"),
    "tensors that overlap": (lambda folder, _: header(folder, overlap), "no safetensors file"),
    "a tensor of no bytes and endless sides": (lambda folder, _: header(folder, endless), ""),
    "tensors of complex numbers": (lambda folder, _: odd_numbers(folder), "tensor 'head.fc.bias' is of type C64"),
    "images of 30,000 x 30,000 px": (
        lambda folder, _: prepared(folder, input_size=[3, 30000, 30000]),
        "input_size (3, 30000, 30000) must be three whole numbers, channels, height and width, the latter of 2048",
    ),
    "images of a billion px a side": (
        lambda folder, _: prepared(folder, input_size=[3, 10**9, 10**9]),
        "input_size (3, 1000000000, 1000000000) must be three whole",
    ),
    "images of 1 x 20,000 px": (
        lambda folder, _: prepared(folder, input_size=[3, 1, 20000]),
        "input_size (3, 1, 20000) must be three whole",
    ),
    "images of a text": (lambda folder, _: prepared(folder, input_size="32"), "input_size '32' must be three whole"),
    "a deviation of 0": (lambda folder, _: prepared(folder, std=[0, 0, 0]), "std (0, 0, 0) must be numbers above 0"),
    "patches of 5,000 x 5,000 px": (
        lambda folder, _: arguments(folder, patch_sizes=[None, 5000, 1]),
        "have 5000 x 5000 pixels, more than 1048576",
    ),
    "a capacity of 1e300": (
        lambda folder, _: arguments(folder, eval_capacity_factor=1e300),
        "eval_capacity_factor 1e+300 must be a number up to 4294967296",
    ),
    "a capacity that is no number": (
        lambda folder, _: arguments(folder, eval_capacity_factor=float("nan")),
        "NaN is no number of JSON",
    ),
    "another device": (lambda folder, _: arguments(folder, device="meta"), "device cannot be chosen by a file"),
    "another type of numbers": (lambda folder, _: arguments(folder, dtype="int8"), "dtype cannot be chosen by a file"),
    "weights from elsewhere": (
        lambda folder, sentinel: (
            config(folder, architecture="timm:resnet18"),
            arguments(folder, pretrained=True, checkpoint_path=str(sentinel)),
        ),
        "checkpoint_path, pretrained cannot be chosen by a file",
    ),
    "a million blocks of timm's": (
        lambda folder, _: config(folder, architecture="timm:resnet18", model_args={"layers": [10**6] * 4}),
        "make a network of far more tensors than the",
    ),
    "a class name of 5 MB": (
        lambda folder, _: config(folder, label_names=["a", "b" * 5_000_000]),
        "label_names has a text of 5000000 characters",
    ),
    "one name for two classes": (
        lambda folder, _: config(folder, label_names=["a", "a"]),
        "label_names: 'a' stands for the classes 0 and 1; give each its own",
    ),
    "a class name that is no text": (
        lambda folder, _: config(folder, label_names=["a", None]),
        "label_names must be 2 names",
    ),
    "a billion classes": (lambda folder, _: config(folder, num_classes=10**9), "num_classes 1000000000 must be"),
    "images of no channel": (lambda folder, _: arguments(folder, in_chans=0), "in_chans=0 must be a whole number"),
    "mask values that are texts": (
        lambda folder, _: config(folder, mask_values=["0", "1"], ignored_values=[]),
        "mask_values must be whole numbers from 0 to 65535, got ['0', '1']",
    ),
    "a mask value that counts and does not": (
        lambda folder, _: config(folder, mask_values=[0, 1], ignored_values=[1]),
        "no number may stand twice in mask_values and ignored_values",
    ),
    "a missing tensor": (lambda folder, _: without(folder), "tensor head.fc.bias is missing"),
    "a billion experts": (
        lambda folder, _: arguments(folder, num_experts=10**9),
        "num_experts 1000000000 must be a number up to",
    ),
    "layers of 10 GB": (lambda folder, _: arguments(folder, widths=[8, 8, 30000]), "expected (2, 30000"),
    "a million blocks": (lambda folder, _: arguments(folder, depths=[10**6, 1, 1]), "make more blocks than there are"),
    "a class path as the network": (
        lambda folder, _: config(folder, architecture="os.system"),
        "architecture 'os.system' is not a network of this package",
    ),
    "a path as the network": (
        lambda folder, _: config(folder, architecture="../../pce_nano"),
        "architecture '../../pce_nano' is not a network of this package",
    ),
    "a file of timm's as the network": (
        lambda folder, _: config(folder, architecture="local-dir:/tmp"),
        "no configuration of a PCE network",
    ),
    "a folder by way of timm as the network": (
        lambda folder, _: config(folder, architecture="timm:local-dir:/tmp"),
        "timm has no network 'local-dir:/tmp'",
    ),
    "a repository by way of timm as the network": (
        lambda folder, _: config(folder, architecture="timm:hf-hub:a/b"),
        "timm has no network 'hf-hub:a/b'",
    ),
    "an argument that names a class": (
        lambda folder, sentinel: arguments(folder, act_layer={"class_path": "os.system", "init_args": str(sentinel)}),
        "no configuration of a PCE network",
    ),
    "a configuration of 17 MB": (
        lambda folder, _: (folder / CONFIG).write_text("[" * (17 * 2**20)),
        "it has more than 16777216 bytes",
    ),
    "a configuration nested too deeply": (
        lambda folder, _: (folder / CONFIG).write_text("[" * 10**6),
        "no configuration of a PCE network",
    ),
}


def capped(room: int) -> None:
    """Let this process take no more address space than it has, and ``room`` bytes."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))


@pytest.mark.parametrize("attack", [pytest.param(name, marks=pytest.mark.faults(f"model: {name}")) for name in MODELS])
def test_a_model_from_a_stranger_is_refused(folder: Path, tmp_path: Path, attack: str) -> None:
    change, message = MODELS[attack]
    sentinel, log = tmp_path / "was here", tmp_path / "log"
    change(folder, sentinel)

    def load() -> int:
        capped(ROOM)
        try:
            load_model(folder)
        except ValueError as error:
            print(error)
            return 2
        return 0

    assert in_a_process(load, log) == 2, log.read_text()
    assert message in log.read_text()
    assert not sentinel.exists()


@pytest.mark.faults("model: weights from elsewhere")
def test_what_timm_would_load_is_not_taken_from_a_file(folder: Path, tmp_path: Path) -> None:
    elsewhere = {"url": "http://127.0.0.1:9/x", "file": str(tmp_path / "x"), "hf_hub_id": "a/b", "custom_load": True}
    prepared(folder, **elsewhere)
    cfg = load_model(folder).pretrained_cfg
    assert not elsewhere.items() & {(key, value) for key, value in cfg.items() if isinstance(value, str | bool)}


@pytest.mark.faults("model: images of another number of channels")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_chans": 4, "num_classes": 2}, "in_chans of the network is for 4 channels"),
        ({"num_classes": 0}, "has no classifier (num_classes is 0)"),
    ],
)
def test_networks_that_go_with_no_image_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: dict[str, Any], message: str
) -> None:
    torch.manual_seed(0)
    model = create_network("pce_nano", widths=[8, 8, 8], num_experts=2, **arguments)
    model.save_pretrained(tmp_path / "model")
    two_colours().save(tmp_path / "a.png")
    assert main(["predict", str(tmp_path / "model"), str(tmp_path / "a.png"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.faults("model: images of 30,000 x 30,000 px")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_size": 5000}, "three whole numbers, channels, height and width, the latter of 2048 pixels"),
        ({"model_args": {"patch_sizes": [None, 5000, 1]}}, "have 5000 x 5000 pixels"),
    ],
)
def test_what_could_not_be_loaded_is_not_trained(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(TrainConfig(model="pce_nano", **changes), ["0", "1"])


@pytest.mark.faults("model: a pickle for weights")
def test_the_attacks_work_where_nobody_guards_against_them(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Attack(tmp_path / "was here")))
    assert (tmp_path / "was here").exists()


YAML = {
    "a command in run/config.yaml": ["eval", "run", "--device", "cpu"],
    "a command in --config": ["train", "--config", "run/config.yaml"],
    "a command in --config of compare": ["compare", "--config", "run/config.yaml"],
}


@pytest.mark.parametrize("case", [pytest.param(name, marks=pytest.mark.faults(name)) for name in YAML])
@pytest.mark.parametrize("tag", ["object/apply:os.system", "object/new:os.system", "name:os.system"])
def test_yaml_never_runs_code(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    case: str,
    tag: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    folder.rename("run/model")
    rest = "" if tag.startswith("name") else ' ["touch sentinel"]'
    Path("run/config.yaml").write_text(f"data: digits\nmodel: !!python/{tag}{rest}\n")
    assert main(YAML[case]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pcenet: error: ")
    assert error.count("\n") == 1
    assert not Path("sentinel").exists()


# Images: red at the top left, blue at the bottom right, 2 x 2 pixels of which the diagonal is told apart.


def encoded(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def two_colours(mode: str = "RGB", side: int = 16) -> Image.Image:
    pixels = np.zeros((side, side, 3), dtype=np.uint8)
    pixels[:, : side // 2, 0] = pixels[:, side // 2 :, 2] = 255
    return Image.fromarray(pixels).convert(mode)


def with_scans(jpeg: bytes, number: int) -> bytes:
    """Empty scans before the image's end, each after a marker that has no length."""
    return jpeg.removesuffix(b"\xff\xd9") + number * b"\xff\x01\xff\xda\x00\x02" + b"\xff\xd9"


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 8  # to be turned by 90 degrees against the clock: what was right is on top
    return encoded(two_colours(), "PNG", exif=exif)


def transparent_palette() -> bytes:
    image = Image.new("P", (16, 16))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([int(index % 16 >= 8) for index in range(256)])
    return encoded(image, "PNG", transparency=1)


RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
GOOD: dict[str, tuple[str, bytes, tuple[int, ...], tuple[int, ...]]] = {  # file, content, top left, bottom right
    "turned by EXIF": ("a.png", rotated(), BLUE, RED),
    "CMYK": ("a.tif", encoded(two_colours("CMYK"), "TIFF"), RED, BLUE),
    "16 bits": (
        "a.png",
        encoded(Image.fromarray(np.repeat(np.array([[0, 65535]], np.uint16), 16, 0).repeat(8, 1)), "PNG"),
        (0, 0, 0),
        WHITE,
    ),
    "a palette with a transparent colour": ("a.png", transparent_palette(), RED, WHITE),
    "an animation": (
        "a.gif",
        encoded(two_colours(), "GIF", save_all=True, append_images=[Image.new("RGB", (16, 16))]),
        RED,
        BLUE,
    ),
    "one pixel": ("a.png", encoded(Image.new("RGB", (1, 1), RED), "PNG"), RED, RED),
    "a colour profile": (
        "a.png",
        encoded(two_colours(), "PNG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
        RED,
        BLUE,
    ),
    "another name than format": ("a.jpg", encoded(two_colours(), "PNG"), RED, BLUE),
}


def put(root: Path, name: str, content: bytes) -> None:
    """A data set whose class ``odd`` has a file between two ordinary ones."""
    for split in ("train", "val"):
        for kind in ("odd", "plain"):
            (root / split / kind).mkdir(parents=True)
            for index in (0, 2):
                two_colours().save(root / split / kind / f"{index}.png")
        (root / split / "odd" / f"1{name}").write_bytes(content)


def zipped(root: Path) -> Path:
    with zipfile.ZipFile(root.with_suffix(".zip"), "w") as archive:
        for path in sorted(root.rglob("*")):
            archive.write(path, path.relative_to(root))
    return root.with_suffix(".zip")


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.faults(f"image: {kind}")) for kind in GOOD])
def test_odd_good_images_are_decoded_alike_everywhere(tmp_path: Path, kind: str) -> None:
    name, content, top_left, bottom_right = GOOD[kind]
    put(tmp_path / "data", name, content)
    for path in (tmp_path / "data", zipped(tmp_path / "data")):
        source = open_source(path, "train")
        index = next(index for index in range(len(source)) if source.file_name(index).endswith(f"odd/1{name}"))
        assert source.labels[index] == 0
        trained = source.image(index)
        files, left_out = find_inputs([str(path)])
        predicted = next(file for file in files if file.file.endswith(f"train/odd/1{name}")).image()
        assert left_out == []
        assert trained.mode == "RGB"
        assert np.array_equal(np.asarray(trained), np.asarray(predicted))
        assert trained.getpixel((0, 0)) == top_left
        assert trained.getpixel((trained.width - 1, trained.height - 1)) == bottom_right


def postscript(sentinel: Path) -> bytes:
    """What Pillow would have Ghostscript run."""
    return f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({sentinel}) (w) file closefile\n".encode()


def bomb() -> bytes:
    """A PNG whose header promises 100,000 x 100,000 pixels."""
    content = bytearray(encoded(Image.new("L", (1, 1)), "PNG"))
    content[16:24] = struct.pack(">II", 100_000, 100_000)
    import zlib

    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


BAD: dict[str, tuple[bytes, str]] = {
    "truncated": (encoded(two_colours(), "PNG")[:60], "cannot be read as an image"),
    "empty": (b"", "it is empty"),
    "a web page": (b"<!DOCTYPE html><html></html>", "it is a web page"),
    "a decompression bomb": (bomb(), "more than PIL.Image.MAX_IMAGE_PIXELS"),
    "PostScript": (postscript(Path("sentinel")), "it is text"),
    "long and narrow": (narrow_png(60_000), "its longer side may be 32 times the shorter one at most"),
    "a JPEG of many scans": (with_scans(encoded(two_colours(), "JPEG"), 101), "a JPEG of more than 100 scans"),
    "a band that is not used": (tiff(bytes(16), (2, 2), [8] * 4, 2), "it has 4 bands, of which 3 are used"),
    "12 bits in a file of 16": (png(np.arange(256).reshape(16, 16), 16, GREY), "nearly black"),
    "a format that is not listed": (encoded(two_colours(), "ICO"), "it is in no known format; BMP, GIF, JPEG"),
}


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.faults(f"image: {kind}")) for kind in BAD])
def test_bad_images_are_named_and_shift_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    content, message = BAD[kind]
    put(tmp_path / "data", ".png", content)
    for path in (tmp_path / "data", zipped(tmp_path / "data")):
        source = open_source(path, "train")
        names = [source.file_name(index) for index in range(len(source))]
        assert names == [f"train/{file}.png" for file in ("odd/0", "odd/1", "odd/2", "plain/0", "plain/2")]
        assert list(source.labels) == [0, 0, 0, 1, 1]
        with pytest.raises(DataError, match=rf"'train/odd/1\.png': .*{re.escape(message)}"):
            source.image(1)
        for index in (0, 2, 3, 4):
            assert source.image(index).size == (16, 16)
    assert not Path("sentinel").exists()


@pytest.mark.faults("image: PostScript")
def test_pillow_would_open_it(tmp_path: Path) -> None:
    """So it is the list of formats that keeps it out."""
    content = postscript(tmp_path / "sentinel") + b"%%EndComments\n%%EOF\n"
    assert Image.open(io.BytesIO(content)).format == "EPS"
    with pytest.raises(DataError, match="cannot be read as an image"):
        decode_image(content, "a.png")


@pytest.mark.faults("image: long and narrow")
def test_a_long_and_narrow_image_costs_its_own_error_and_no_memory(tmp_path: Path) -> None:
    """Resized until its shorter side is the network's, a file of 8 kB would become one of gigabytes."""
    for height in (4_000_000, 60_000, 33):
        put(tmp_path / str(height), ".png", narrow_png(height))
    assert (tmp_path / "4000000/train/odd/1.png").stat().st_size < 10_000

    def read() -> int:
        capped(ROOM)
        for height in (4_000_000, 60_000, 33):
            path = tmp_path / str(height)
            named = f"the image has 1 x {height} pixels; its longer side may be 32 times the shorter one at most"
            with pytest.raises(DataError, match=rf"'train/odd/1\.png': {named}"):
                open_source(path, "train").image(1)
            report = check_data(path)
            assert [each.file for each in report.findings if named in each.message] == [
                "train/odd/1.png",
                "val/odd/1.png",
            ]
            assert not report.usable
            files, _ = find_inputs([str(path / "train")])
            batches = list(read_batches(files, eval_transform(32), batch_size=8, workers=0))
            assert [len(batch.files) for batch in batches if batch.files] == [1, 3]
            ((left_out,),) = [batch.left_out for batch in batches if batch.left_out]
            assert left_out.file.endswith("train/odd/1.png")
            assert named in left_out.reason
        return 0

    assert in_a_process(read, tmp_path / "log") == 0, (tmp_path / "log").read_text()


@pytest.mark.faults("image: long and narrow")
@pytest.mark.parametrize("size", [(1, 32), (32, 1)])
def test_what_is_made_of_the_narrowest_image_that_is_read_is_bounded(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    resize, interpolate = Image.Image.resize, torch.nn.functional.interpolate

    def counting(image: Image.Image, to: tuple[int, int], *args: Any, **options: Any) -> Image.Image:
        made.append(to[0] * to[1])
        return resize(image, to, *args, **options)

    def interpolating(values: torch.Tensor, size: Any, **options: Any) -> torch.Tensor:
        made.append(size[0] * size[1])
        return interpolate(values, size=size, **options)

    monkeypatch.setattr(Image.Image, "resize", counting)
    monkeypatch.setattr("torchvision.transforms.v2.functional._geometry.interpolate", interpolating)
    image, mask = (decode_image(encoded(Image.new("L", size), "PNG"), "x").convert(mode) for mode in ("RGB", "L"))
    eval_transform(16)(image)
    train_transform(16)(image)
    train_transform(16, augment="resized_crop")(image)
    cover_transform((12, 16))(image)
    segment_train_transform((12, 16))(image, mask)
    assert len(made) == 6
    assert max(made) <= 32 * 16 * 16


def link(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.create_system = 3
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return entry


ARCHIVES: dict[str, tuple[Callable[[zipfile.ZipFile], object], str]] = {
    "a name with ..": (lambda archive: archive.writestr("../up.png", b""), r"unsafe name '\.\./up\.png'"),
    "an absolute name": (lambda archive: archive.writestr("/etc/up.png", b""), "unsafe name '/etc/up.png'"),
    "a Windows path": (lambda archive: archive.writestr("C:\\up.png", b""), "unsafe name"),
    "a symbolic link": (
        lambda archive: archive.writestr(link("train/odd/9.png"), "/etc/passwd"),
        "'train/odd/9.png' is a symbolic link",
    ),
    "two names for one file": (
        lambda archive: archive.writestr(".\\train//odd/0.png", b""),
        r"'train/odd/0\.png' and '.\\train//odd/0\.png' are the same file",
    ),
}


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.faults(f"zip: {kind}")) for kind in ARCHIVES])
def test_unsafe_archives_are_refused(tmp_path: Path, kind: str) -> None:
    write, message = ARCHIVES[kind]
    put(tmp_path / "data", ".png", encoded(two_colours(), "PNG"))
    path = zipped(tmp_path / "data")
    with zipfile.ZipFile(path, "a") as archive:
        write(archive)
    with pytest.raises(DataError, match=message):
        open_source(path, "train")


@pytest.mark.slow
@pytest.mark.faults("zip: a bomb")
def test_a_file_that_unpacks_to_gigabytes_is_refused_unread(tmp_path: Path) -> None:
    """300 MB of zeros in 300 kB."""
    path, log = tmp_path / "bomb.zip", tmp_path / "log"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("a.png", "w", force_zip64=True) as file,
    ):
        for _ in range(300):
            file.write(bytes(10**6))

    def read() -> int:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 100 * 2**20, resource.RLIM_INFINITY))
        try:
            ZipTree(path).read("a.png")
        except DataError as error:
            print(error)
            return 2
        return 0

    assert in_a_process(read, log) == 2, log.read_text()
    assert "bomb.zip: 'a.png': the file has 300000000 bytes, more than 268435456" in log.read_text()


@pytest.mark.faults("a huge file named like an image")
def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    with open(tmp_path / "a.png", "wb") as file:
        file.truncate(10**12)  # of holes
    with pytest.raises(DataError, match="the file has 1000000000000 bytes"):
        FolderTree(tmp_path).read("a.png")


@pytest.mark.faults("a folder that links to itself")
def test_links_are_not_followed_in_circles(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").symlink_to(tmp_path / "a")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a" / "elsewhere").symlink_to(tmp_path / "elsewhere")
    names, faults = FolderTree(tmp_path / "a").listing()
    assert sorted(names) == ["b/", "elsewhere/"]
    assert [fault.text for fault in faults] == [
        "the folder 'b/c' is a link to a folder that it lies in. Remove the link."
    ]


@pytest.mark.faults("folders that link to each other")
def test_links_between_folders_are_not_followed_in_circles(tmp_path: Path) -> None:
    """With eight links in each, 40 levels of which the system would follow."""
    for one, other in (("a", "b"), ("b", "a")):
        (tmp_path / one).mkdir()
        for number in range(8):
            (tmp_path / one / str(number)).symlink_to(tmp_path / other)
    names, faults = FolderTree(tmp_path).listing()
    assert len(names) == 2 + 2 * 8
    assert len(faults) == 2 * 8 * 8


ENDLESS: dict[str, Callable[[Path], object]] = {
    "a pipe for an archive": os.mkfifo,
    "a device without end for an archive": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.faults(kind)) for kind in ENDLESS])
@pytest.mark.parametrize("command", ["train", "check-data", "predict"])
def test_what_has_no_end_is_refused_unread(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ENDLESS[kind](tmp_path / "x.zip")
    lines = {"train": ["train", "--data"], "check-data": ["check-data"], "predict": ["predict", "model"]}
    log = tmp_path / "log"
    code = in_a_process(lambda: main([*lines[command], "x.zip"]), log)  # which a hang would end
    said = " ".join(log.read_text().split())
    assert code == (2 if command == "train" else 1), said
    assert "regular file" in said
    assert "Traceback" not in said


@pytest.mark.faults("a name that is no valid Unicode")
def test_a_set_whose_own_name_is_no_text_has_one_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The options of a run and the paths of its weights are written where only Unicode can be."""
    name = os.fsdecode(b"d\xe9ta")
    put(tmp_path / name, ".png", encoded(two_colours(), "PNG"))
    (tmp_path / "data").symlink_to(name)
    monkeypatch.chdir(tmp_path)
    for line in (["train", "--data", name], ["train", "--data", name, "--out", "run"], ["check-data", name]):
        assert main(line) == 2
        assert r"data 'd\udce9ta' is no valid Unicode (UTF-8): rename it, or" in capsys.readouterr().err
    assert main(["train", "--out", name]) == 2
    assert r"out 'd\udce9ta' is no valid Unicode (UTF-8)" in capsys.readouterr().err
    assert main(["check-data", "data"]) == 0
    assert not Path("runs").exists()


@pytest.mark.faults("a name that is no valid Unicode")
@pytest.mark.parametrize("name", [b"h\xf6rse/0.png", b"odd/\xe9t\xe9.png", b"\xff"])
def test_names_that_are_no_text_have_one_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: bytes
) -> None:
    put(tmp_path / "data", ".png", encoded(two_colours(), "PNG"))
    path = tmp_path / "data" / "train" / os.fsdecode(name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(encoded(two_colours(side=8), "PNG"))
    refused = path.suffix == ".png"  # what is no image, outside of a class folder, is not looked at
    assert main(["check-data", str(tmp_path / "data"), "--task", "classify"]) == int(refused)
    train = ["train", "--data", str(tmp_path / "data"), "--model-args", '{"widths":[8,8,8]}', "--dry-run"]
    assert main([*train, "--batch-size", "2", "--device", "cpu", "--workers", "0"]) == 2 * int(refused)
    error = capsys.readouterr().err
    assert ("is no valid Unicode (UTF-8)" in error) is refused
    assert error.count("pcenet: error: ") == int(refused)
