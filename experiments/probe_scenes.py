"""What networks trained on the generated scenes still know of the objects that they segment.

    python experiments/probe_scenes.py --first runs/scenes/pce-* --second runs/scenes/dense-* --threads 1

A run folder is what ``pcenet train --config experiments/scenes.yaml`` leaves; a model folder does as well. Runs are
paired in the order in which they are given: give the seeds of both in one order. Every network is frozen, and a linear
classifier reads the attributes of the objects (colour of clothes and leaves, pattern of pavements, roughness of walls)
from its features, learnt on the training images, measured on those of ``--split``. Two controls say what that is worth:
the mean colours of the patches themselves, and each architecture with fresh weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from probes import PER_OBJECT, ProbeResult, paired_difference, probe_modules
from torch import nn

from pcenet.benchmark.machine import describe, machine
from pcenet.data import SceneSource, cover_transform
from pcenet.data.scenes import VERSION
from pcenet.models import PCEUNet, SavableModel, create_network, load_model
from pcenet.models.preprocessing import image_size
from pcenet.runs.finding import find_model

RESULT = Path(__file__).parent / "results" / "scenes-probes.json"
PIXELS = "pixels"

Results = Mapping[str, ProbeResult]  # by layer
Sources = tuple[SceneSource, SceneSource]  # to learn from, to measure on


def layers_of(model: SavableModel, chosen: Sequence[str] | None) -> dict[str, str]:
    """What to probe: a name for people, and the module's."""
    if chosen:
        return {name: name for name in chosen}
    if not isinstance(model, PCEUNet):
        raise ValueError(
            f"{type(model).__name__} is no U-shaped network of this package: name its modules with --modules"
        )
    stages = len(model.stages)
    return {"first stage": "stages.0", "deepest stage": f"stages.{stages - 1}", "last features": "norm"}


def probe_network(model: SavableModel, options: argparse.Namespace, sources: Sources) -> Results:
    """The probes of a network, by layer."""
    layers = layers_of(model, options.modules)
    found = probe_modules(
        model, *sources, modules=list(layers.values()), patch=options.patch, per_object=options.per_object
    )
    return {layer: found[module] for layer, module in layers.items()}


def fresh(model: SavableModel) -> SavableModel:
    """The same network, untrained."""
    torch.manual_seed(0)
    record = model.pretrained_cfg
    return create_network(
        record["architecture"], pretrained_cfg_overlay=record, num_classes=model.num_classes, **model.model_args
    )


def figures(results: Results) -> dict[str, Any]:
    """Probes as JSON can hold them."""
    names = ("accuracy", "balanced", "chance", "categories", "train_patches", "train_objects", "patches", "objects")
    return {
        layer: {
            "module": result.module,
            "accuracy": result.accuracy,
            "balanced": result.balanced,
            "chance": result.chance,
            "attributes": {
                attribute: {name: getattr(probe, name) for name in names}
                for attribute, probe in result.attributes.items()
            },
        }
        for layer, result in results.items()
    }


def differences(first: Results, second: Results) -> dict[str, Any]:
    """First minus second, by layer and attribute, on the same patches."""
    return {
        layer: {
            attribute: paired_difference(probe, second[layer].attributes[attribute])._asdict()
            for attribute, probe in result.attributes.items()
        }
        for layer, result in first.items()
        if layer in second
    }


def over_pairs(pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean of the pairs' differences, and their standard deviation (None for one pair), by layer and attribute."""
    summary: dict[str, Any] = {}
    for layer, attributes in pairs[0].items():
        summary[layer] = {}
        for attribute in attributes:
            values = [pair[layer][attribute]["value"] for pair in pairs]
            spread = statistics.stdev(values) if len(values) > 1 else None
            summary[layer][attribute] = {"mean": statistics.mean(values), "spread": spread, "pairs": len(values)}
    return summary


def show(title: str, results: Results) -> None:
    """A line for each layer."""
    for layer, result in results.items():
        each = ", ".join(f"{name} {probe.accuracy:.1%}" for name, probe in result.attributes.items())
        print(f"{title}, {layer}: mean {result.accuracy:.1%} (chance {result.chance:.1%}); {each}", flush=True)


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", nargs="+", required=True, metavar="RUN", help="run or model folders")
    parser.add_argument(
        "--second", nargs="+", required=True, metavar="RUN", help="as many, what they are compared with"
    )
    parser.add_argument(
        "--modules", nargs="+", help="modules to probe; by default first and deepest stage, and the end"
    )
    parser.add_argument("--split", choices=("val", "test"), default="val", help="where probes are measured")
    parser.add_argument("--patch", type=int, default=8, help="side of a patch in pixels")
    parser.add_argument("--per-object", type=int, default=PER_OBJECT, help="most patches of one object")
    parser.add_argument("--images", type=int, nargs=2, metavar=("TRAIN", "OTHER"), help="fewer images, for a trial")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--json", type=Path, default=RESULT)
    options = parser.parse_args()
    if len(options.first) != len(options.second):
        parser.error(f"--first has {len(options.first)} runs, --second {len(options.second)}: give as many of both")
    return options


def main() -> None:
    """Probe all networks and the controls, compare them, and write the figures."""
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    counts = options.images or (None, None)
    sources = (SceneSource("train", count=counts[0]), SceneSource(options.split, count=counts[1]))
    about = machine(torch.device("cpu"))
    print(describe(about))
    networks: list[dict[str, Any]] = []
    probes: dict[str, list[Results]] = {"first": [], "second": []}
    controls: dict[str, Results] = {}
    for side, found in probes.items():
        for run in getattr(options, side):
            model = load_model(find_model(Path(run))[0])
            name = model.pretrained_cfg["architecture"]
            if PIXELS not in controls:
                plain = cover_transform(image_size(model), mean=(0, 0, 0), std=(1, 1, 1))
                control = probe_modules(
                    nn.Identity(),
                    *sources,
                    modules=[""],
                    patch=options.patch,
                    per_object=options.per_object,
                    transform=plain,
                )
                controls[PIXELS] = {PIXELS: control[""]}
                show(PIXELS, controls[PIXELS])
            if f"untrained {name}" not in controls:
                controls[f"untrained {name}"] = probe_network(fresh(model), options, sources)
                show(f"untrained {name}", controls[f"untrained {name}"])
            found.append(probe_network(model, options, sources))
            show(Path(run).name, found[-1])
            networks.append({"side": side, "run": Path(run).name, "network": name, "layers": figures(found[-1])})
    pairs = [differences(*pair) for pair in zip(probes["first"], probes["second"], strict=True)]
    record = {
        "machine": about,
        "data": {"name": "scenes", "version": VERSION, "train": len(sources[0]), options.split: len(sources[1])},
        "patch": options.patch,
        "per_object": options.per_object,
        "networks": networks,
        "controls": {name: figures(control) for name, control in controls.items()},
        "differences": pairs,
        "mean_differences": over_pairs(pairs),
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for layer, attributes in record["mean_differences"].items():
        for attribute, value in attributes.items():
            print(f"{layer}, {attribute}: first minus second {100 * value['mean']:+.1f} points")
    print(f"wrote {options.json}")


if __name__ == "__main__":
    main()
