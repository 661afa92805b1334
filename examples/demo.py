"""Three minutes: who does what in a street scene, whether it matters, and what training a network of experts is like.

Run it with ``make demo``, or with ``python examples/demo.py [FOLDER]`` in a checkout where pcenet is installed with the
extras ``train``, ``digits`` and ``plot``. A second run continues where the first one ended.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from PIL import Image
from rich.table import Table

import pcenet
from pcenet.analysis import random_expert, redirect, routing_picture
from pcenet.cli import main as program
from pcenet.data import cover_transform
from pcenet.reporting.numbers import score_text
from pcenet.reporting.tables import console

# A validation image of CamVid (Brostow et al., 2009), with what a network makes of it on its right.
STREET = Path(__file__).parents[1] / "docs" / "images" / "scene.jpg"
BUNDLED = ("camvid/pce_unet_nano", "camvid/dense_unet_nano")
SIZE = (192, 256)
TRAINED = ("pce_nano", "dense_nano")
EPOCHS = 10


def look_at_a_street(folder: Path) -> None:
    """What the bundled network and its twin see, who served which patch, and what random experts would see."""
    photo = Image.open(STREET).crop((0, 0, 480, 360))
    masks = {}
    for name in BUNDLED:
        model = pcenet.load_model(name)
        (found,) = model.predict(photo, precision="fp32")
        masks[name] = found.mask
        found.picture().save(folder / f"{name.replace('/', '-')}.png")
        print(f"{name} sees {found}".replace(f" {found.file}:", ""))
    model = pcenet.load_model(BUNDLED[0])
    plain = cover_transform(SIZE, mean=(0, 0, 0), std=(1, 1, 1))(photo)[None]
    images = cover_transform(SIZE, mean=model.pretrained_cfg["mean"], std=model.pretrained_cfg["std"])(photo)[None]
    with torch.no_grad():
        with pcenet.record_routing(model) as records:
            before = model(images).argmax(1)
        with redirect(model, random_expert(seed=0)):
            after = model(images).argmax(1)
    routing_picture(plain, records, ["street"]).savefig(folder / "experts.png", dpi=130)
    kept = (before == after).float().mean().item()
    print(f"with every patch sent to a random expert {kept:.0%} of the pixels keep their class: who serves it matters")
    print(f"see {folder}: what both networks see, and experts.png, which expert of each layer served which patch\n")


def train(model: str, folder: Path) -> dict:
    options = ["--model", model, "--data", "digits", "--epochs", str(EPOCHS), "--batch-size", "64", "--resume", "auto"]
    for command in (["train", *options, "--out", str(folder)], ["eval", str(folder), "--split", "test"]):
        if code := program(command):
            sys.exit(code)
    found = json.loads((folder / "metrics.json").read_text())
    return {**found, "test": json.loads((folder / "eval-digits-test.json").read_text())}


def comparison(results: dict[str, dict]) -> Table:
    table = Table(title=f"pce_nano and its dense twin on digits, {EPOCHS} epochs")
    columns = ("network", "val top-1", "test top-1", "multiply-adds", "parameters", "active", "s per epoch")
    for column in columns:
        table.add_column(column, justify="left" if column == "network" else "right")
    for name, result in results.items():
        cost = result["complexity"]
        table.add_row(
            name,
            *(score_text(result[split]["top1"], result[split]["images"]) for split in ("val", "test")),
            f"{cost['multiply_adds'] / 1e6:.1f} M",
            f"{cost['parameters'] / 1e6:.2f} M",
            f"{cost['active_parameters'] / 1e6:.2f} M",
            f"{result['epoch_seconds']:.1f}",
        )
    return table


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
    street = root / "street"
    shutil.rmtree(street, ignore_errors=True)
    street.mkdir(parents=True)
    look_at_a_street(street)
    results = {name: train(name, root / name) for name in TRAINED}
    console().print(comparison(results))
    print(
        "Digits of 8x8 pixels are too easy for experts to make a difference: this is what training is like, and costs."
        "\nWhat experts bring where it is harder stands in README.md. Next:\n"
        f"  pcenet predict {BUNDLED[0]} PHOTO_OF_A_STREET --out masks\n"
        "  pcenet train --data FOLDER_OF_PICTURES --out runs/mine\n"
        "  pcenet explain runs/mine"
    )


if __name__ == "__main__":
    main()
