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
from PIL import Image, ImageCms
from safetensors.torch import load_file, save_file

from pcenet.cli import main
from pcenet.data import open_source
from pcenet.data.base import DataError
from pcenet.data.files import FolderTree, ZipTree
from pcenet.data.images import decode_image
from pcenet.inference.inputs import find_inputs
from pcenet.models import create_network, load_model
from pcenet.training.config import TrainConfig
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
        "input_size (3, 30000, 30000) must be three whole numbers, channels, height and width, of 16777216 pixels",
    ),
    "images of a billion px a side": (
        lambda folder, _: prepared(folder, input_size=[3, 10**9, 10**9]),
        "input_size (3, 1000000000, 1000000000) must be three whole",
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


@pytest.mark.parametrize("attack", [pytest.param(name, marks=pytest.mark.faults(f"model: {name}")) for name in MODELS])
def test_a_model_from_a_stranger_is_refused(folder: Path, tmp_path: Path, attack: str) -> None:
    change, message = MODELS[attack]
    sentinel, log = tmp_path / "was here", tmp_path / "log"
    change(folder, sentinel)

    def load() -> int:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, resource.RLIM_INFINITY))
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
        ({"input_size": 5000}, "three whole numbers, channels, height and width, of 16777216 pixels"),
        ({"model_args": {"patch_sizes": [None, 5000, 1]}}, "have 5000 x 5000 pixels"),
    ],
)
def test_what_could_not_be_loaded_is_not_trained(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(TrainConfig(model="pce_nano", **changes), 2)


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
