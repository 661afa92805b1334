"""What a trained classifier owes to routing by content: its score on `val` when content may not choose.

    python experiments/routing_content.py cifar10/pce_nano --data cifar10.zip --threads 1

Everything but the choice of experts stays as it is, gate values too. The scores of a network:

- ``as it is``;
- ``commonest of its place``: in each layer a patch goes to the expert that patches of its place go to most often;
- ``another image's``: a patch goes where the router sends the patch of its place in another image, drawn at random;
- ``random``: each patch goes to any expert.

For each layer the share of patches that go to the commonest expert of their place anyway is kept, too. Results of other
networks in ``results/routing-content.json`` stay.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcenet.analysis import random_expert, redirect
from pcenet.analysis.effects import Intervention, tallies
from pcenet.benchmark.machine import machine
from pcenet.nn import Routing, record_routing
from pcenet.runs.config import EvalConfig
from pcenet.runtime.device import set_threads
from pcenet.tasks.evaluation import EVAL_BATCH_SIZE, open_trained
from pcenet.writing import write_json

RESULT = Path(__file__).parent / "results" / "routing-content.json"
Choose = Callable[[str, Routing], Tensor]


def main() -> None:
    """Measure networks and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+")
    parser.add_argument("--data", required=True)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    set_threads(options.threads)
    known = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else []
    for network in options.networks:
        found = measure(network, options.data)
        known = [each for each in known if each["network"] != found["network"]] + [found]
        write_json(RESULT, known)
        print(json.dumps(found))


def measure(network: str, source: str) -> dict[str, Any]:
    """The scores of one network, images in random order."""
    val = open_trained(EvalConfig(run=network, data=source, split="val"))
    model, size = val.model.eval().to(memory_format=torch.channels_last), EVAL_BATCH_SIZE[val.model.task]
    images, labels = (
        torch.cat(parts)
        for parts in zip(*val.task.eval_loader(model, val.source, batch_size=size, workers=0), strict=True)
    )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images = images[order].contiguous(memory_format=torch.channels_last)
    batches = list(zip(images.split(size), labels[order].split(size), strict=True))
    counts = choices_by_place(model, [batch for batch, _ in batches])
    changes: dict[str, Choose] = {
        "commonest of its place": commonest(counts),
        "another image's": of_another_image(seed=0),
        "random": random_expert(seed=0),
    }
    interventions = [Intervention(name, partial(redirect, choose=choose)) for name, choose in changes.items()]
    base, others = tallies(model, batches, interventions, len(val.source.classes))
    names = ("as it is", *changes)
    return {
        "network": network,
        "data": Path(source).name,
        "top1": {
            name: float(each.hits.sum() / each.out_of.sum()) for name, each in zip(names, (base, *others), strict=True)
        },
        "commonest": {layer: float(each.max(1).values.sum() / each.sum()) for layer, each in counts.items()},
        "machine": machine(torch.device("cpu")),
    }


@torch.inference_mode()
def choices_by_place(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """For each layer how many patches of each place go to each expert, ``[rows * columns, E]``."""
    counts: dict[str, Tensor] = {}
    for images in batches:
        with record_routing(model) as records:
            model(images)
        for layer, (routing,) in records.items():
            chosen = F.one_hot(routing.expert_ids[:, 0], routing.num_experts)
            counts[layer] = counts.get(layer, 0) + chosen.unflatten(0, (routing.grid.batch, -1)).sum(0)
    return counts


def commonest(counts: dict[str, Tensor]) -> Choose:
    """Every patch to the expert that is chosen most often at its place."""
    return lambda layer, routing: counts[layer].argmax(1).repeat(routing.grid.batch)[:, None]


def of_another_image(seed: int) -> Choose:
    """Every patch to where the patch of its place in another image of the batch would go."""
    generator = torch.Generator().manual_seed(seed)

    def choose(_layer: str, routing: Routing) -> Tensor:
        of_images = routing.expert_ids.unflatten(0, (routing.grid.batch, -1))
        return of_images[torch.randperm(len(of_images), generator=generator)].flatten(0, 1)

    return choose


if __name__ == "__main__":
    main()
