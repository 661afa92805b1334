"""The two-minute tour: train `pce_nano` and its dense twin on real handwritten digits, compare them, draw the routing.

Run it with ``make demo``, or with ``python examples/demo.py [FOLDER]`` where pcenet is installed with the extras
``train``, ``digits`` and ``plot``. A second run continues where the first one ended.
"""

import json
import sys
from pathlib import Path

import torch
from rich.table import Table

from pcenet import load_model, record_routing
from pcenet.analysis import routing_picture
from pcenet.cli import main as pcenet
from pcenet.data import build_loader, eval_transform, open_source
from pcenet.reporting.numbers import score_text
from pcenet.reporting.tables import console, router_table

MODELS = ("pce_nano", "dense_nano")
EPOCHS = 15
PICTURES = 8


def train(model: str, folder: Path) -> dict:
    options = ["--model", model, "--data", "digits", "--epochs", str(EPOCHS), "--batch-size", "64", "--resume", "auto"]
    code = pcenet(["train", *options, "--out", str(folder)])
    if code:
        sys.exit(code)
    code = pcenet(["eval", str(folder), "--split", "test"])
    if code:
        sys.exit(code)
    return {
        **json.loads((folder / "metrics.json").read_text()),
        "test": json.loads((folder / "eval-digits-test.json").read_text()),
    }


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


def draw(folder: Path, path: Path) -> None:
    model = load_model(folder / "model")
    source = open_source("digits", "test")
    size = model.pretrained_cfg["input_size"][-1]
    plain = eval_transform(size, mean=(0, 0, 0), std=(1, 1, 1))
    normalised = eval_transform(size, mean=model.pretrained_cfg["mean"], std=model.pretrained_cfg["std"])
    images, _ = next(iter(build_loader(source, plain, batch_size=PICTURES, train=False)))
    inputs, labels = next(iter(build_loader(source, normalised, batch_size=PICTURES, train=False)))
    with torch.no_grad(), record_routing(model) as records:
        predictions = model(inputs).argmax(dim=1)
    titles = [f"{source.classes[p]} ({source.classes[t]})" for p, t in zip(predictions, labels, strict=True)]
    routing_picture(images, records, titles).savefig(path, dpi=130)


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
    results = {name: train(name, root / name) for name in MODELS}
    picture = root / "routing.png"
    draw(root / "pce_nano", picture)
    screen = console()
    screen.print(router_table(results["pce_nano"]["val_router"]))
    screen.print(comparison(results))
    print(f"which expert served which patch, prediction (truth) above each image: {picture}")


if __name__ == "__main__":
    main()
