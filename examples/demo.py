"""Three minutes: who does what in a street, whether it matters, and what training a network of experts is like.

Run it with ``make demo``, or with ``python examples/demo.py [FOLDER]`` where pcenet is installed with the extras
``train`` and ``plot``. The streets are drawn by the package: nothing is downloaded, and the truth of every pixel is
known. A second run continues where the first one ended.
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
from pcenet.data import SceneSource, cover_transform
from pcenet.nn import routers_of
from pcenet.reporting.tables import console

BUNDLED = ("scenes/pce_unet_nano", "scenes/dense_unet_nano")
TRAINED = ("pce_unet_nano", "dense_unet_nano")
RECIPE = {"data": "scenes", "epochs": 6, "input_size": "64x64", "batch_size": 8, "label_smoothing": 0.0}
SCENES = 50  # of those that no network has seen

Scene = tuple[Image.Image, Image.Image]  # an image and its mask


def right(model: torch.nn.Module, scenes: Sequence[Scene], *, by_chance: bool = False) -> float:
    """The share of pixels whose class a network finds, with its own experts or with random ones."""
    with redirect(model, random_expert(seed=0)) if by_chance else nullcontext():
        found = model.predict([image for image, _ in scenes], precision="fp32")
    return float(np.mean([one.mask == np.asarray(mask) for one, (_, mask) in zip(found, scenes, strict=True)]))


def look_at_a_street(scene: Scene, folder: Path) -> None:
    """What a bundled network and its twin see, who served which patch, and what random experts would see."""
    image, _ = scene
    image.save(folder / "street.png")
    for name in BUNDLED:
        model = pcenet.load_model(name)
        model.predict(image, precision="fp32")[0].picture().save(folder / f"{Path(name).name}.png")
        print(f"{name} finds the class of {right(model, [scene]):.1%} of a street's pixels")
    model = pcenet.load_model(BUNDLED[0])
    size = (image.height, image.width)
    plain, prepared = (
        cover_transform(size, mean=mean, std=std)(image)[None]
        for mean, std in (((0,) * 3, (1,) * 3), (model.pretrained_cfg["mean"], model.pretrained_cfg["std"]))
    )
    with torch.no_grad(), pcenet.record_routing(model) as records:
        model(prepared)
    routing_picture(plain, records, ["street"]).savefig(folder / "experts.png", dpi=130)
    print(f"and with every patch sent to a random expert of {right(model, [scene], by_chance=True):.1%}: who serves it")
    print(f"matters. See {folder}: what both see, and experts.png, which expert of each layer served which patch\n")


def comparison(runs: dict[str, pcenet.TrainedRun], scenes: Sequence[Scene]) -> Table:
    table = Table(title=f"{' and '.join(runs)}, {RECIPE['epochs']} epochs, on {len(scenes)} new streets")
    columns = ("network", "pixels right", "random experts", "multiply-adds", "parameters", "active", "s per epoch")
    for column in columns:
        table.add_column(column, justify="left" if column == "network" else "right")
    for name, run in runs.items():
        cost = run.metrics["complexity"]
        routed = bool(dict(routers_of(run.model)))
        table.add_row(
            name,
            f"{right(run.model, scenes):.1%}",
            f"{right(run.model, scenes, by_chance=True):.1%}" if routed else "",
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
    source = SceneSource("test")
    scenes = [source.sample(index) for index in range(SCENES)]
    look_at_a_street(scenes[0], street)
    runs = {name: pcenet.train(model=name, out=str(root / name), **RECIPE) for name in TRAINED}
    console().print(comparison(runs, scenes))
    print(
        "Next:\n"
        f"  pcenet explain {root / TRAINED[0]}\n"
        "  pcenet predict camvid/pce_unet_nano PHOTO_OF_A_STREET --out masks\n"
        "  pcenet train --data FOLDER_OF_PICTURES --out runs/mine"
    )


if __name__ == "__main__":
    main()
