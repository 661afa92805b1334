"""Model cards: what a network says of itself, as Markdown with the metadata that the Hugging Face Hub reads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from pcenet.choices import TaskName
from pcenet.texts import shown
from pcenet.writing import write_text

PURPOSE: dict[TaskName, str] = {
    "classify": "says which class an image is of",
    "segment": "says of what class each pixel is",
}
PIPELINE: dict[TaskName, str] = {"classify": "image-classification", "segment": "image-segmentation"}
# How an image becomes the network's input, by task.
TRANSFORM: dict[TaskName, str] = {
    "classify": "eval_transform({width}",
    "segment": "cover_transform(({height}, {width})",
}
ANSWER: dict[TaskName, str] = {
    "classify": "print(model.class_names[model(images).argmax(1)])",
    "segment": "print(model(images).argmax(1))  # class numbers, by model.class_names",
}


def model_card(
    config: Mapping[str, Any],
    repo: str | None = None,
    sections: Sequence[str] = (),
    *,
    license: str | None = None,
    results: list[EvalResult] | None = None,
) -> ModelCard:
    """A card: what the network is, its classes, how to load it, and sections with what else is known.

    Args:
        config: the network's ``config.json``, as ``SavableModel.config`` gives it.
        repo: its name on the Hub, "OWNER/NAME"; None: it lies in a folder.
        sections: further Markdown, each with its heading.
        license: of the weights, as the Hub names it; None: the card states none.
        results: scores for the Hub's own tables.
    """
    architecture, task = config["architecture"], config["task"]
    title = architecture if repo is None else repo.rpartition("/")[2]
    inner = architecture.rpartition(":")[2]
    routed = inner.startswith("pce_") or config["model_args"].get("upcycling") is not None
    data = ModelCardData(
        library_name="pcenet",
        tags=["pytorch", *(["mixture-of-experts"] if routed else [])],
        license=license,
        pipeline_tag=PIPELINE[task],
        model_name=title if results else None,
        eval_results=results,
    )
    names = config.get("label_names")
    classes = f"{config['num_classes']} classes" + (f": {', '.join(map(plain, names))}." if names else ".")
    about = f"`{architecture}`, trained with the package pcenet, {PURPOSE[task]}."
    if routed:
        about += " In its PCE layers each patch is filtered by the convolutional expert that a router chooses for it."
    text = "\n\n".join((f"# {plain(title)}", about, classes, _usage(config, repo), *sections))
    return WholeCard("\n".join(map(shown, f"---\n{data.to_yaml()}\n---\n\n{text}\n".split("\n"))))


class WholeCard(ModelCard):
    """A card whose file is whole or not there."""

    def save(self, filepath: str | Path) -> None:
        """Write it, atomically."""
        write_text(Path(filepath), str(self))


def _usage(config: Mapping[str, Any], repo: str | None) -> str:
    """How to load the network and run it."""
    task, cfg = config["task"], config["pretrained_cfg"]
    _, height, width = cfg["input_size"]
    transform = TRANSFORM[task].format(height=height, width=width)
    where = "FOLDER" if repo is None else repo
    download = "" if repo is None else f"hf download {repo} --local-dir {repo.rpartition('/')[2]}\n"
    folder = where.rpartition("/")[2]
    return f"""## Use

```python
import torch
from PIL import Image
from pcenet.data import {transform.partition("(")[0]}
from pcenet.models import SavableModel

model = SavableModel.from_pretrained("{where}")
transform = {transform}, mean={tuple(cfg["mean"])}, std={tuple(cfg["std"])})
images = transform(Image.open("picture.jpg").convert("RGB"))[None]
with torch.no_grad():
    {ANSWER[task]}
```

```
pip install pcenet
{download}pcenet predict {folder} pictures
```"""


def plain(text: str) -> str:
    """A name as Markdown that has it as it is `shown`, in a table, too."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", shown(text))
