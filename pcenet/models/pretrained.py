"""What a folder of trained weights, which `pcenet.catalogue` finds, says of its network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pcenet.catalogue import CONFIG
from pcenet.models.limits import check_preprocessing

WEIGHTS = "model.safetensors"


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
