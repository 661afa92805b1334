"""Makes the data on which choices are made: the training images alone, some of them held out as ``val``.

Final tables are of `val`, which therefore must not choose anything. ``experiments/dev/NAME.txt`` lists the images of
``NAME.zip`` that are held out of its ``train``: 500 of each class of CIFAR-10, the drive 0001TP of CamVid, whose
neighbouring frames are nearly equal, and 25 of each class of Tiny-ImageNet.

    python experiments/dev.py cifar10.zip dev/cifar10
    pcenet train --data dev/cifar10 ...
"""

from __future__ import annotations

import argparse
from pathlib import Path, PurePosixPath
from zipfile import ZipFile

LISTS = Path(__file__).parent / "dev"


def split_of(name: PurePosixPath, held_out: frozenset[str]) -> str | None:
    """Where a file of an archive goes, `train` or `val`; None where it is left out. A mask goes with its image."""
    if len(name.parts) < 4 or name.parts[1] != "train":
        return None
    return "val" if f"{name.parts[2].replace('masks', 'images')}/{name.stem}" in held_out else "train"


def divide(archive: Path, held_out: frozenset[str], out: Path) -> dict[str, int]:
    """Write the training files of an archive into ``out/train`` and ``out/val``; how many went where."""
    counts = {"train": 0, "val": 0}
    with ZipFile(archive) as source:
        for entry in source.namelist():
            name = PurePosixPath(entry)
            split = split_of(name, held_out)
            if split is None or entry.endswith("/"):
                continue
            target = out.joinpath(split, *name.parts[2:])
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read(entry))
            counts[split] += 1
    return counts


def main() -> None:
    """Divide one archive by the list of its name."""
    parser = argparse.ArgumentParser(description="training images of an archive, some of them held out as val")
    parser.add_argument(
        "archive", type=Path, help=f"one of {', '.join(sorted(p.stem for p in LISTS.glob('*.txt')))}.zip"
    )
    parser.add_argument("out", type=Path, help="a folder, which is made")
    arguments = parser.parse_args()
    held_out = frozenset((LISTS / f"{arguments.archive.stem}.txt").read_text(encoding="utf-8").split())
    counts = divide(arguments.archive, held_out, arguments.out)
    print(f"{counts['train']} files in train, {counts['val']} in val")


if __name__ == "__main__":
    main()
