"""Loads and scores of a trained network at evaluation, under other forms of the routers' biases.

    python experiments/evaluation_bias.py cifar10/pce_nano --data cifar10.zip --threads 1
    python experiments/evaluation_bias.py camvid/pce_unet_nano --data camvid.zip --threads 1

The first row is the network as it was saved, with the running mean of training's biases if it was trained before
`pcenet.nn.update_expert_bias` existed, as the bundled networks were. The others are what that function makes of it from
training images, with ``centring`` as given. Rows of other networks in ``results/evaluation-bias.json`` stay.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pcenet.data as data
from pcenet.benchmark.machine import machine
from pcenet.nn import update_expert_bias
from pcenet.runs.config import EvalConfig
from pcenet.runtime.device import set_threads
from pcenet.tasks.evaluation import EVAL_BATCH_SIZE, open_trained
from pcenet.training.preparation import bias_count
from pcenet.writing import write_json

RESULT = Path(__file__).parent / "results" / "evaluation-bias.json"


def main() -> None:
    """Measure one network and keep its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network")
    parser.add_argument("--data", required=True)
    parser.add_argument("--centring", type=float, nargs="+", default=[0.0, 0.3, 0.6, 0.8, 1.0])
    parser.add_argument("--images", type=int, help="of training, for the biases; default: as many as training takes")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    set_threads(options.threads)
    known = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else []
    rows = measure(options.network, options.data, options.centring, options.images)
    write_json(RESULT, [row for row in known if row["network"] != options.network] + rows)


def measure(network: str, source: str, centrings: list[float], images: int | None) -> list[dict[str, Any]]:
    """A row for the network as it is and for each centring."""
    val, train = (open_trained(EvalConfig(run=network, data=source, split=split)) for split in ("val", "train"))
    count = images or bias_count(len(train.source))
    size = EVAL_BATCH_SIZE[val.model.task]
    some = val.task.eval_loader(val.model, data.first_images(train.source, count), batch_size=size, workers=0)
    whole = list(val.task.eval_loader(val.model, val.source, batch_size=size, workers=0))
    rows = []
    for centring in [None, *centrings]:
        if centring is not None:
            update(val.model, val.task.images_of(some), centring)
        result = val.task.evaluate(val.model, whole, val.source.classes, device=torch.device("cpu"), precision="fp32")
        rows.append(
            {
                "network": network,
                "data": Path(source).name,
                "centring": centring,
                "training_images": None if centring is None else count,
                "val": val.task.summary(result),
                "router": result.router,
                "machine": machine(torch.device("cpu")),
            }
        )
        print(network, centring, val.task.headline(result), [layer["max_min"] for layer in result.router.values()])
    return rows


def update(model: nn.Module, images: Any, centring: float) -> None:
    """`update_expert_bias` on images in the layout that evaluation uses."""
    update_expert_bias((batch.to(memory_format=torch.channels_last) for batch in images), model, centring=centring)


if __name__ == "__main__":
    main()
