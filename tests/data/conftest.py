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
