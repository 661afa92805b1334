"""Images a second that one core loads for training, decoding and augmentation included, without any network.

    python benchmarks/loader.py

JPEG files of 500 x 375 pixels, ImageNet's usual size, made here, at 224 pixels; and the images of 32 pixels of a named
data set or an archive, which lie in memory. As many workers as there are cores multiply the figure as long as memory
keeps up.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

import pcenet.data as data
from pcenet.runtime.device import processor_name

FILES = 200
ROUNDS = 5


def write_files(folder: Path) -> None:
    """Photographs' size and, about, their bytes: blurred noise of two classes."""
    generator = np.random.default_rng(0)
    for number in range(FILES):
        small = Image.fromarray(generator.integers(0, 256, (47, 63, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        small.resize((500, 375), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        for split in ("train", "val"):
            path = folder / split / f"class{number % 2}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(buffer.getvalue())


def loader_of(name: str, side: int, augment: Any, normalize: bool) -> DataLoader[Any]:
    """Training batches, loaded in this process."""
    source = data.open_source(name, "train")
    transform = data.train_transform(side, augment=augment, normalize=normalize)
    return data.build_loader(source, transform, batch_size=64, train=True)


def images_per_second(loader: DataLoader[Any], batches: int) -> float:
    """The median over some rounds."""
    rates = []
    for _ in range(ROUNDS):
        begin, count = time.perf_counter(), 0
        for _, (images, _labels) in zip(range(batches), loader, strict=False):
            count += len(images)
        rates.append(count / (time.perf_counter() - begin))
    return statistics.median(rates)


def main() -> None:
    """Print one line of JSON for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", default="cifar10", help="images of 32 pixels, as pcenet's --data takes them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder))
        cases = ((folder, 224, "resized_crop", 3), (folder, 224, "randaugment", 3), (options.small, 32, "crop", 40))
        for name, side, augment, batches in cases:
            for normalize in (True, False):
                rate = images_per_second(loader_of(name, side, augment, normalize), batches)
                case = {"side": side, "augment": augment, "as": "float32" if normalize else "uint8"}
                record = case | {"images_per_second": round(rate), "processor": processor_name()}
                print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
