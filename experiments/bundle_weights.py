"""Put the network of a finished run among the weights that come with the package.

    python experiments/bundle_weights.py runs/pce_nano-0 cifar10/pce_nano

The model folder goes to ``pcenet/weights/cifar10/pce_nano``, where it replaces what was there; its card gets the data,
the validation score and the recipe of the run.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from pcenet import catalogue
from pcenet.catalogue import CONFIG
from pcenet.models import create_network, load_model
from pcenet.models.pretrained import WEIGHTS
from pcenet.publish.card import recipe, score_of
from pcenet.reporting.numbers import SCORES
from pcenet.runs.config import TrainConfig
from pcenet.runs.folder import RunFolder
from pcenet.writing import write_atomically

CARD = "README.md"
# What is known of the terms of the data, none of which is part of the package.
DATA = {
    "cifar10": "CIFAR-10 (Krizhevsky, 2009) is a set of images collected from the web; no licence of it is known.",
    "camvid": "CamVid (Brostow et al., 2009) was published for research; no licence of it is known.",
    "scenes": "The streets are drawn by the package, and so under its licence, too.",
}
LIMIT = 6 * 10**6  # bytes of a file: whoever installs the package downloads all of them
LICENSE = "apache-2.0"


def main(argv: Sequence[str] | None = None) -> None:
    """Bundle a run's network; a mistake ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="the run folder")
    parser.add_argument("name", metavar="NAME", help="DATA/NETWORK, such as cifar10/pce_nano")
    parser.add_argument("--half", action="store_true", help="store kernels in float16, at half the size")
    arguments = parser.parse_args(argv)
    try:
        print(f"wrote {bundle(RunFolder(arguments.run), arguments.name, half=arguments.half)}")
    except ValueError as error:
        parser.error(str(error))


def bundle(run: RunFolder, name: str, *, half: bool = False) -> Path:
    """Copy a model folder to its place in the package, with a card; returns that place. ``half``: see `copy_model`.

    Raises:
        ValueError: if the run is unfinished, or its network may not be bundled under that name.
    """
    if not run.finished:
        raise ValueError(f"RUN {run.path} is no finished run: it lacks metrics.json or model/; finish it")
    check(run.model, name, half)
    metrics = json.loads(run.metrics.read_text(encoding="utf-8"))
    environment = json.loads(run.environment.read_text(encoding="utf-8"))
    card = ModelCard.load(run.model / CARD)
    card.data.license = LICENSE
    stored = "kernels in float16, scored in float32" if half else "float32"
    text = card_text(name, run.read_config(), metrics, environment, load_model(run.model).class_names or [], stored)

    def write(folder: Path) -> None:
        copy_model(run.model, folder, half=half)
        (folder / CARD).write_text(f"---\n{card.data.to_yaml()}\n---\n\n{text}", encoding="utf-8")

    place = catalogue.weights_root() / name
    write_atomically(place, write)
    return place


def copy_model(source: Path, target: Path, *, half: bool) -> None:
    """Copy a model folder's weights and configuration into a new folder; ``half`` stores kernels in float16.

    All else, biases and statistics among it, is small and stays as it is: rounded, it sends patches to other experts.

    Raises:
        ValueError: if a number is too large for float16.
    """
    target.mkdir(parents=True)
    for file in (WEIGHTS, CONFIG):
        shutil.copyfile(source / file, target / file)
    if half:
        tensors = load_file(target / WEIGHTS)
        halves = {key: each.half() if each.ndim >= 4 else each for key, each in tensors.items()}
        if not all(each.isfinite().all() for each in halves.values()):
            raise ValueError(f"{source / WEIGHTS} has numbers beyond float16; store it in float32")
        save_file(halves, target / WEIGHTS, {"format": "pt"})


def check(folder: Path, name: str, half: bool) -> None:
    """Raise a ``ValueError`` unless a model folder may be bundled as "DATA/NETWORK"."""
    data, _, network = name.partition("/")
    if not data or not network or "/" in network:
        raise ValueError(f"NAME {name!r} must be DATA/NETWORK, such as cifar10/pce_nano")
    for file in sorted(folder.iterdir()):
        size = file.stat().st_size // (2 if half and file.name == WEIGHTS else 1)
        if size >= LIMIT:
            raise ValueError(f"{file} has {size} bytes, a bundled file at most {LIMIT - 1}; take a smaller network")
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if config["architecture"] != network:
        raise ValueError(f"{folder} holds a {config['architecture']}, not a {network}; name it {data}/...")
    made = json.loads(json.dumps(create_network(network).model_args))
    for key in sorted(made.keys() | config["model_args"].keys()):
        found, wanted = (arguments.get(key, "nothing") for arguments in (config["model_args"], made))
        if found != wanted:
            raise ValueError(
                f"{folder / CONFIG}: {key} is {found}, {network} has {wanted}; train it without that option"
            )
    if load_model(folder).class_names is None:
        raise ValueError(f"{folder / CONFIG} names no classes (label_names); train it with pcenet train")


def card_text(
    name: str,
    config: TrainConfig,
    metrics: dict[str, Any],
    environment: dict[str, Any],
    classes: Sequence[str],
    stored: str,
) -> str:
    """The body of the card. No path of the machine that trained is in it."""
    network, val = name.partition("/")[2], metrics["val"]
    score, options = score_of(val), recipe(config)
    about = DATA.get(name.partition("/")[0], "Look at the terms of the data before you use the weights for business.")
    versions = ", ".join(f"{part} {environment['versions'][part]}" for part in ("torch", "timm"))
    return f"""# {name}

`{network}` of the package pcenet, trained by `pcenet train`; `pcenet.load_model("{name}")` loads it.

| | |
|---|---|
| data | {options["data"]} |
| classes | {", ".join(classes)} |
| validation | {SCORES[score]} {val[score]:.2%} of {val["images"]} images |
| epochs | {metrics["epochs"]} |
| stored in | {stored} |
| made with | pcenet {environment["pcenet"]}, {versions}, {environment["precision"]} on {environment["device"]} |

The weights are under the licence of the package. {about}

The recipe, as `pcenet train --config` reads it:

```yaml
{yaml.safe_dump(options, sort_keys=False).strip()}
```
"""


if __name__ == "__main__":
    main()
