"""Draw docs/images/scenes.png: some of the generated scenes above their masks.

python experiments/draw_scenes.py docs/images/scenes.png
"""

from __future__ import annotations

import sys

from PIL import Image

from pcenet.data import SceneSource
from pcenet.reporting.colours import legend, palette

INDICES = (34, 10, 45, 31)
ENLARGED, GAP = 2, 4


def main() -> None:
    """Write the picture, with the names of the classes to the right."""
    source = SceneSource("train")
    classes = legend(source.classes)
    side = ENLARGED * source.image(0).width
    right = len(INDICES) * (side + GAP)
    sheet = Image.new("RGB", (right + classes.width, 2 * side + GAP), "white")
    for column, index in enumerate(INDICES):
        image, mask = source.sample(index)
        mask.putpalette(palette(len(source.classes)))
        for row, picture in enumerate((image, mask)):
            # Neither smoothed nor reduced to a palette: pixels repeated take no room in a PNG file.
            enlarged = picture.convert("RGB").resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (column * (side + GAP), row * (side + GAP)))
    sheet.paste(classes, (right, (sheet.height - classes.height) // 2))
    sheet.save(sys.argv[1], optimize=True)


if __name__ == "__main__":
    main()
