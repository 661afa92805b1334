"""The trained networks that come with the package: folders ``pcenet/weights/DATA/NETWORK`` of `save_pretrained`.

DATA, such as ``cifar10``, is timm's tag: the weights ``cifar10/pce_nano`` are timm's ``pce_nano.cifar10``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pcenet.models.limits import check_preprocessing

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def weights_root() -> Path:
    """The folder that holds the weights which come with the package."""
    return Path(__file__).parents[1] / "weights"


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


def record_of(tag: str, folder: Path) -> dict[str, Any]:
    """timm's record of a model folder: its weights, classes and preprocessing; of masks, their values.

    Args:
        tag: timm's name of the weights.
        folder: holds ``model.safetensors`` and ``config.json``.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    names = config.get("label_names")
    masks = {key: config[key] for key in ("mask_values", "ignored_values") if key in config}
    return {
        **preprocessing_of(config),
        **masks,
        "tag": tag,
        "file": str(folder / WEIGHTS),
        "num_classes": config["num_classes"],
        "label_names": None if names is None else tuple(names),
    }


def preprocessing_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The preprocessing that a ``config.json`` names, and nothing else of its ``pretrained_cfg``: what timm would load
    from there (``url``, ``file``) is for its owner to say. See `check_preprocessing`."""
    return check_preprocessing(config["pretrained_cfg"])


def class_names_of(record: Mapping[str, Any], num_classes: int) -> list[str] | None:
    """The names of a trained network's classes; None where they are unknown, or the classifier is a fresh one.

    Args:
        record: timm's, of the weights that were loaded.
        num_classes: of the network. The classifier is a fresh one where the weights have another number of classes.
    """
    names = record.get("label_names")
    return list(names) if names is not None and record.get("num_classes") == num_classes else None
