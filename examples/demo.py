"""Three minutes: who does what in a street, whether it matters, and what training a network of experts is like.

Run it with ``make demo``, or with ``python examples/demo.py [FOLDER]`` where pcenet is installed with the extras
``train``, ``digits`` and ``plot``. The street is drawn by the package: nothing is downloaded, and the class of every
pixel is known. A second run continues where the first one ended.
"""

import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.table import Table

import pcenet
from pcenet.analysis import random_expert, redirect, routing_picture
from pcenet.data import SceneSource, cover_transform, open_source
from pcenet.models.preprocessing import as_pixels
from pcenet.nn import routers_of
from pcenet.reporting.tables import console

BUNDLED = ("scenes/pce_unet_nano", "scenes/dense_unet_nano")
SCENE = 5  # of those that no network has seen
TRAINED = ("pce_nano", "dense_nano")
RECIPE = {"data": "digits", "epochs": 10, "batch_size": 64}


def right(
    model: torch.nn.Module, images: Sequence[Image.Image], truth: Sequence[object], *, by_chance: bool = False
) -> float:
    """The share of the images, or of their pixels, whose class a network finds, with its own experts or random ones."""
    with redirect(model, random_expert(seed=0)) if by_chance else nullcontext():
        found = model.predict(images, precision="fp32")
    answers = [one.mask if hasattr(one, "mask") else one.label for one in found]
    return float(np.mean([np.mean(answer == true) for answer, true in zip(answers, truth, strict=True)]))


def look_at_a_street(folder: Path) -> None:
    """What a bundled network and its twin see, who served which patch, and what random experts would see."""
    image, mask = SceneSource("test").sample(SCENE)
    street = ([image], [np.asarray(mask)])
    image.save(folder / "street.png")
    for name in BUNDLED:
        model = pcenet.load_model(name)
        model.predict(image, precision="fp32")[0].picture().save(folder / f"{Path(name).name}.png")
        print(f"{name} finds the class of {right(model, *street):.1%} of a street's pixels")
    model = pcenet.load_model(BUNDLED[0])
    mean, std = (model.pretrained_cfg[name] for name in ("mean", "std"))
    prepared = cover_transform((image.height, image.width), mean=mean, std=std)(image)[None]
    with torch.no_grad(), pcenet.record_routing(model) as records:
        model(prepared)
    routing_picture(as_pixels(prepared, model), records, ["street"]).savefig(folder / "experts.png", dpi=130)
    print(f"and with every patch sent to a random expert of {right(model, *street, by_chance=True):.1%}: who serves it")
    print(f"matters. See {folder}: what both see, and experts.png, which expert of each layer served which patch\n")


def comparison(runs: dict[str, pcenet.TrainedRun]) -> Table:
    source = open_source(RECIPE["data"], "test")
    test = ([source.image(index) for index in range(len(source))], [source.classes[label] for label in source.labels])
    table = Table(title=f"{' and '.join(runs)}, {RECIPE['epochs']} epochs, on {len(source)} digits of the test split")
    columns = ("network", "top-1", "random experts", "multiply-adds", "parameters", "active", "s per epoch")
    for column in columns:
        table.add_column(column, justify="left" if column == "network" else "right")
    for name, run in runs.items():
        cost = run.metrics["complexity"]
        routed = bool(dict(routers_of(run.model)))
        table.add_row(
            name,
            f"{right(run.model, *test):.1%}",
            f"{right(run.model, *test, by_chance=True):.1%}" if routed else "",
            f"{cost['multiply_adds'] / 1e6:.1f} M",
            f"{cost['parameters'] / 1e6:.2f} M",
            f"{cost['active_parameters'] / 1e6:.2f} M",
            f"{run.metrics['epoch_seconds']:.1f}",
        )
    return table


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
    street = root / "street"
    shutil.rmtree(street, ignore_errors=True)
    street.mkdir(parents=True)
    look_at_a_street(street)
    runs = {name: pcenet.train(model=name, out=str(root / name), **RECIPE) for name in TRAINED}
    console().print(comparison(runs))
    print(
        "Drawn streets and digits are easy enough for a dense network of this size, and so the scores are alike: what"
        "\nexperts add on photographs stands in README.md. Next:\n"
        f"  pcenet explain {root / TRAINED[0]}\n"
        "  pcenet predict camvid/pce_unet_nano PHOTO_OF_A_STREET --out masks\n"
        "  pcenet train --data FOLDER_OF_PICTURES --out runs/mine"
    )


if __name__ == "__main__":
    main()
