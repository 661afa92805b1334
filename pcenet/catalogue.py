"""Which networks and which trained weights come with the package, told without torch: for `pcenet models`, and for
mistakes in names, which should cost no time.

Trained networks are folders ``pcenet/weights/DATA/NETWORK`` of `save_pretrained`. DATA, such as ``cifar10``, is timm's
tag: the weights ``cifar10/pce_nano`` are timm's ``pce_nano.cifar10``.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pcenet.choices import TaskName, did_you_mean

CONFIG = "config.json"
SIMILAR = 0.8  # how like one of our networks a name must be for no other library's to be suggested
SIMILAR_SOURCE = 0.6  # how like a word a source must be: a path may be anything


@cache
def networks() -> dict[str, dict[str, Any]]:
    """By name what `pcenet.models.describe` says of each network; ``experiments/networks.py`` writes the file."""
    return json.loads((Path(__file__).parent / "networks.json").read_text(encoding="utf-8"))


def check_network(name: str, task: TaskName) -> None:
    """Raise a ``ValueError`` for a network that there plainly is not, or that is for another task.

    Names of other libraries' networks, and what is like one of them, are for those who know them.
    """
    known = networks()
    ours = [each for each, about in known.items() if about["task"] == task]
    if name not in known:
        if ":" not in name and (hint := did_you_mean(name, ours, SIMILAR)):
            raise ValueError(f"model {name!r} is unknown{hint}")
        return
    if (other := known[name]["task"]) != task:
        raise ValueError(f"model {name!r} is made to {other}; give --task {other}, or another --model")


# The data sets that have a name of their own.
SOURCES: dict[TaskName, tuple[str, ...]] = {
    "classify": ("digits", "fashion-mnist", "cifar10", "cifar100"),
    "segment": ("scenes",),
}


def task_of_source(source: str | Path) -> TaskName | None:
    """What a data set of a name of its own is made for; None for a path."""
    return next((task for task, names in SOURCES.items() if source in names), None)


def fault_of_source(source: str | Path, names: Sequence[str] | None = None) -> str | None:
    """What is wrong with a data source of which there is nothing, with what may have been meant; else None.

    Args:
        source: a name or a path.
        names: those that it might be; None: all.
    """
    path = os.path.expanduser(source)
    known = [name for of_task in SOURCES.values() for name in of_task] if names is None else list(names)
    if os.path.exists(path) or source in known:
        return None
    siblings = glob.glob(os.path.join(glob.escape(os.path.dirname(path)), "*"))
    usable = [os.path.normpath(each) for each in siblings if os.path.isdir(each) or each.endswith((".zip", ".csv"))]
    path_of = "the path of a folder, .zip or .csv of images"
    expected = f"{', '.join(known)}, or {path_of}" if known else path_of
    hint = did_you_mean(str(source), [*known, *usable], SIMILAR_SOURCE)
    return f"data source '{source}' does not exist: it must be {expected}{hint}"


def weights_root() -> Path:
    """The folder that holds the weights which come with the package."""
    return Path(__file__).parent / "weights"


def bundled() -> list[str]:
    """Names "DATA/NETWORK" of the trained networks that come with the package."""
    return sorted("/".join(path.parts[-3:-1]) for path in weights_root().glob(f"*/*/{CONFIG}"))


def weights_of(network: str) -> dict[str, Path]:
    """The folders of a network's bundled weights by tag; the first is what ``pretrained=True`` takes."""
    names = [name.split("/") for name in bundled()]
    return {tag: weights_root() / tag / architecture for tag, architecture in names if architecture == network}


def bundled_folder(name: str | Path) -> Path | None:
    """The folder of the bundled weights "DATA/NETWORK"; None where a path of that name exists, or none are bundled."""
    return weights_root() / name if str(name) in bundled() and not Path(name).exists() else None


def or_bundled(name: str | Path) -> str:
    """``; bundled weights are ...`` to be put behind the message that there is nothing of that name.

    Empty where the name cannot have meant bundled weights: it exists, or is not of the form DATA/NETWORK.
    """
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.:-]*", str(name)) or Path(name).exists():
        return ""
    return f"; {list_bundled()}"


def list_bundled() -> str:
    """What is bundled, as the end of a message."""
    names = bundled()
    return f"bundled weights are {', '.join(names)}" if names else "no weights are bundled"
