from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Pack = Callable[[Path], Path]
Tree = Callable[[str, Mapping[str, int]], Path]


@pytest.fixture
def make_tree(tmp_path: Path) -> Tree:
    """Write ``count`` random 12 x 12 PNG images into each folder; the same numbers give the same images."""

    def make(name: str, counts: Mapping[str, int]) -> Path:
        root = tmp_path / name
        for number, (folder, count) in enumerate(counts.items()):
            (root / folder).mkdir(parents=True)
            for index in range(count):
                pixels = np.random.default_rng((number, index)).integers(0, 256, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / folder / f"{index:03}.png")
        return root

    return make


@pytest.fixture
def pack() -> Pack:
    """Zip the content of a folder, last name first, into an archive beside it."""

    def zip_folder(folder: Path) -> Path:
        archive = folder.with_suffix(".zip")
        with zipfile.ZipFile(archive, "w") as target:
            for path in sorted(folder.rglob("*"), reverse=True):
                target.write(path, path.relative_to(folder))
        return archive

    return zip_folder


@pytest.fixture
def make_pairs(tmp_path: Path) -> Tree:
    """Write ``count`` pairs into ``images/`` and ``masks/`` of each folder: 12 x 8 pixels, mask values 0, 1 and 2.

    The image is painted from the mask: red where it is 0, green where it is 1, blue where it is 2.
    """

    def make(name: str, counts: Mapping[str, int]) -> Path:
        root = tmp_path / name
        for number, (folder, count) in enumerate(counts.items()):
            for kind in ("images", "masks"):
                (root / folder / kind).mkdir(parents=True)
            for index in range(count):
                blocks = np.random.default_rng((number, index)).permutation(np.arange(24, dtype=np.uint8) % 3)
                mask = blocks.reshape(4, 6).repeat(2, axis=0).repeat(2, axis=1)
                Image.fromarray(np.eye(3, dtype=np.uint8)[mask] * 255).save(root / folder / f"images/{index:03}.png")
                Image.fromarray(mask).save(root / folder / f"masks/{index:03}.png")
        return root

    return make
