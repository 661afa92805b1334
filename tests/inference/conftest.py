from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pcenet.models import create_network

CLASSES = ["ant", "bee", "cat", "dog", "emu", "fox", "gnu"]
Encode = Callable[..., bytes]


@pytest.fixture(scope="session")
def model_folder(save_classifier: Callable[[list[str]], Path]) -> Path:
    return save_classifier(CLASSES)


@pytest.fixture(scope="session")
def segmenter_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pce_unet_nano` untrained, for images of 32 x 48, its head strong enough for several classes to be predicted."""
    torch.manual_seed(0)
    model = create_network("pce_unet_nano", num_classes=4, pretrained_cfg_overlay={"input_size": (3, 32, 48)})
    model.class_names = ["sky", "road", "tree", "car"]
    with torch.no_grad():
        model.head[1].bias.zero_()
        model.head[1].weight.mul_(30)
    folder = tmp_path_factory.mktemp("trained") / "segmenter"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def noise() -> Callable[..., Image.Image]:
    """A picture of random blocks, the same for the same seed."""

    def make(seed: int, width: int = 40, height: int = 36) -> Image.Image:
        blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        return Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC)

    return make


@pytest.fixture(scope="session")
def encode() -> Encode:
    """The bytes of an image file."""

    def to_bytes(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
        buffer = BytesIO()
        image.save(buffer, file_format, **options)
        return buffer.getvalue()

    return to_bytes


@pytest.fixture
def lay_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, bytes]], None]:
    """Write files into an empty folder, which becomes the current one. A name ``a.zip!b`` is b in the archive a.zip."""
    monkeypatch.chdir(tmp_path)

    def write(files: Mapping[str, bytes]) -> None:
        for name, content in files.items():
            outer, _, inner = name.partition("!")
            path = tmp_path / outer
            path.parent.mkdir(parents=True, exist_ok=True)
            if inner:
                with zipfile.ZipFile(path, "a") as archive:
                    archive.writestr(inner, content)
            else:
                path.write_bytes(content)

    return write
