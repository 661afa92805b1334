"""Draw the pictures of docs/gallery.md from what `pcenet explain` wrote.

    pcenet explain camvid/pce_unet_nano --data camvid.zip --out explanation   # with the options that the gallery gives
    python experiments/draw_gallery.py explanation camvid --layer stages.2.1 --images 3 5

writes ``camvid-experts.jpg`` (images with the experts of every layer laid over them), ``camvid-patches.jpg`` (the
surest patches of the layer's experts), and the layer's heat map and the interventions as they are, to ``docs/images``.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from pcenet.explanation.command import FIGURES, NUMBERS
from pcenet.explanation.figures import slug

IMAGES = Path(__file__).parents[1] / "docs" / "images"
WIDTH, GAP, TITLE = 240, 6, 22  # pixels: of a column, between pictures, above a picture


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("explanation", type=Path, help="the folder that pcenet explain wrote")
    parser.add_argument("name", help="how the pictures' names begin")
    parser.add_argument("--layer", required=True, help="whose heat map and patches are shown")
    parser.add_argument("--images", type=int, nargs="+", required=True, help="numbers of the images, from 1 on")
    arguments = parser.parse_args()
    figures = arguments.explanation / FIGURES
    report = json.loads((arguments.explanation / NUMBERS).read_text(encoding="utf-8"))
    layers = [layer["title"] for layer in report["layers"]]
    experts = next(layer["experts"] for layer in report["layers"] if layer["title"] == arguments.layer)
    shown = slug(arguments.layer)

    columns = ["image", "prediction", *layers]
    kinds = [("", ""), ("", "-prediction"), *((f"{slug(layer)}-", "") for layer in layers)]
    rows = [[figures / f"{before}image-{n}{after}.png" for before, after in kinds] for n in arguments.images]
    if not rows[0][1].is_file():  # a classifier has no picture of its prediction
        columns, rows = columns[:1] + columns[2:], [row[:1] + row[2:] for row in rows]
    save(sheet(columns, rows, WIDTH), f"{arguments.name}-experts.jpg")

    patches = [figures / f"{shown}-expert-{expert}-gallery.png" for expert in range(experts)]
    titles = [f"expert {expert} of {arguments.layer}" for expert in range(experts)]
    pairs = [sheet(titles[i : i + 2], [patches[i : i + 2]], 548) for i in range(0, experts, 2)]
    save(below_each_other(pairs), f"{arguments.name}-patches.jpg")
    for source, target in ((f"{shown}-classes", "classes"), ("interventions", "interventions")):
        shutil.copyfile(figures / f"{source}.png", IMAGES / f"{arguments.name}-{target}.png")


def sheet(titles: Sequence[str], rows: Sequence[Sequence[Path]], width: int) -> Image.Image:
    """Pictures in rows, all of one width, below the titles of their columns."""
    header = Image.new("RGB", (len(titles) * (width + GAP) - GAP, TITLE), "white")
    for column, title in enumerate(titles):
        ImageDraw.Draw(header).text((column * (width + GAP), 2), title, "black", ImageFont.load_default(14))
    return below_each_other([header, *(beside_each_other([resized(path, width) for path in row]) for row in rows)])


def resized(path: Path, width: int) -> Image.Image:
    """A picture in another width."""
    with Image.open(path) as picture:
        height = round(picture.height * width / picture.width)
        return picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)


def beside_each_other(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size in a row."""
    step = pictures[0].width + GAP
    result = Image.new("RGB", (step * len(pictures) - GAP, pictures[0].height), "white")
    for index, picture in enumerate(pictures):
        result.paste(picture, (index * step, 0))
    return result


def below_each_other(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of any heights in a column."""
    tops = list(accumulate((picture.height + GAP for picture in pictures), initial=0))
    result = Image.new("RGB", (max(picture.width for picture in pictures), tops[-1] - GAP), "white")
    for picture, top in zip(pictures, tops, strict=False):
        result.paste(picture, (0, top))
    return result


def save(picture: Image.Image, name: str) -> None:
    """Write a picture to the documentation."""
    picture.save(IMAGES / name, quality=85, optimize=True)
    print(f"wrote {IMAGES / name}, {picture.width} x {picture.height}")


if __name__ == "__main__":
    main()
