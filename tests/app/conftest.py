"""Networks whose every figure can be worked out by hand."""

from __future__ import annotations

import io
import os
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pcenet.app.session import Explorer
from pcenet.nn import PCELayer

SIDE, PATCH = 8, 4
CLASSES = ["blue", "green", "red"]  # of the data set `pictures`
Encode = Callable[..., bytes]


def constant_expert(output: tuple[float, float, float]) -> nn.Sequential:
    """An expert whose output is the same whatever it sees: its last normalisation adds that to zeros."""
    expert = nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1, bias=False),
        nn.BatchNorm2d(3),
        nn.GELU(),
        nn.Dropout(0.0),
        nn.Conv2d(3, 3, 3, padding=1, bias=False),
        nn.BatchNorm2d(3),
    )
    with torch.no_grad():
        expert[4].weight.zero_()
        expert[5].bias.copy_(torch.tensor(output))
    return expert


def by_brightness(threshold: float, outputs: list[tuple[float, float, float]], patch: int = PATCH) -> PCELayer:
    """A layer with two experts of constant outputs. Logits of a patch: (threshold, mean of gelu(red))."""
    layer = PCELayer(
        3,
        3,
        patch_size=patch,
        num_experts=2,
        border="zero",
        router_hidden=1,
        balancing="none",
        shared_kernel=False,
        shortcut=False,
    )
    with torch.no_grad():
        layer.router.hidden.weight.zero_()
        layer.router.hidden.weight[0, 0] = 1
        layer.router.hidden.bias.zero_()
        layer.router.logits.weight.copy_(torch.tensor([[0.0], [1.0]]))
        layer.router.logits.bias.copy_(torch.tensor([threshold, 0.0]))
    for number, output in enumerate(outputs):
        layer.experts.from_sequential(number, constant_expert(output))
    return layer


class HandMade(nn.Module):
    """Two PCE layers of 2 x 2 patches on images of 8 x 8 pixels that come as they are, between 0 and 1.

    ``first``: expert 0 makes nothing, expert 1 a red of 1. ``second``: expert 0 votes for class 0, expert 1 for class
    1; nobody votes for class 2. A vote counts its gate value.
    """

    grey_range = None

    def __init__(self, task: str) -> None:
        super().__init__()
        self.task = task
        self.pretrained_cfg = {
            "architecture": "hand_made",
            "input_size": (3, SIDE, SIDE),
            "mean": (0.0, 0.0, 0.0),
            "std": (1.0, 1.0, 1.0),
            "crop_pct": 1.0,
            "interpolation": "bilinear",
        }
        self.first = by_brightness(0.4, [(0, 0, 0), (1, 0, 0)])
        self.second = by_brightness(0.2, [(1, 0, 0), (0, 1, 0)])

    def forward(self, x: Tensor) -> Tensor:
        votes = self.second(self.first(x))
        return votes.mean(dim=(2, 3)) if self.task == "classify" else votes


@pytest.fixture(scope="session")
def explorer() -> Callable[[str], Explorer]:
    """An explorer of a `HandMade` network for a task."""

    def make(task: str) -> Explorer:
        model: Any = HandMade(task)
        return Explorer(model, ["zero", "one", "two"], device=torch.device("cpu"))

    return make


@pytest.fixture(scope="session")
def encode() -> Encode:
    """The bytes of an image file."""

    def to_bytes(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, file_format, **options)
        return buffer.getvalue()

    return to_bytes


@pytest.fixture(scope="session")
def corner() -> Image.Image:
    """8 x 8 pixels, black, the upper left quarter white."""
    image = Image.new("RGB", (SIDE, SIDE))
    image.paste((255, 255, 255), (0, 0, PATCH, PATCH))
    return image


@pytest.fixture(scope="session")
def header_of() -> Callable[[int, int], bytes]:
    """A PNG file that claims to be so wide and high, and has next to no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def make(width: int, height: int) -> bytes:
        head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")

    return make


class Running(NamedTuple):
    """A server: its process, where its page is, and the folder of its files."""

    process: subprocess.Popen[str]
    url: str
    temporary: Path


@contextmanager
def running(temporary: Path, *arguments: str) -> Iterator[Running]:
    """``pcenet app`` on a free port of this machine."""
    command = [sys.executable, "-m", "pcenet", "app", *arguments, "--port", "0", "--threads", "1", "--device", "cpu"]
    environment = os.environ | {"TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=temporary
    ) as process:
        try:
            said = []
            for line in process.stdout:
                said.append(line)
                if found := re.search(r"http://\S+", line):
                    break
            else:
                raise AssertionError(f"the server did not start: {''.join(said)}")
            yield Running(process, found[0], temporary)
        finally:
            process.kill()


@pytest.fixture(scope="session")
def start() -> Callable[..., Any]:
    """Starts a server, as a context; see `running`."""
    return running


@pytest.fixture(scope="session")
def classifier(save_classifier: Callable[[list[str]], Path]) -> Path:
    return save_classifier(CLASSES)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, classifier: Path, pictures: Path) -> Iterator[Running]:
    """The page of `classifier` with samples of `pictures`, for small files alone."""
    pytest.importorskip("gradio", reason="the page needs gradio")
    limits = ("--max-megabytes", "1", "--max-pixels", "1000000")
    with running(tmp_path_factory.mktemp("server"), str(classifier), "--data", str(pictures), *limits) as server:
        yield server
