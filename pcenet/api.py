"""The commands as functions: ``pcenet.train(data="pictures", model="pce_nano", epochs=15)``.

Options have the commands' names, with underscores, and the same defaults; the functions print what the commands print.
The exception is `predict`: it prints nothing, returns its results, and takes the options of a network's ``predict``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pcenet.choices import did_you_mean

if TYPE_CHECKING:
    from pcenet.exporting.command import Export
    from pcenet.inference.predictions import Predictions
    from pcenet.models import SavableModel
    from pcenet.tasks.results import Evaluation, PixelEvaluation


C = TypeVar("C")


@dataclass(frozen=True)
class TrainedRun:
    """A finished run.

    Attributes:
        path: its folder.
        metrics: the content of ``metrics.json``.
    """

    path: Path
    metrics: Mapping[str, Any]

    @cached_property
    def model(self) -> SavableModel:
        """The trained network, in evaluation mode on the processor."""
        from pcenet.models import load_model

        return load_model(self.path / "model")

    @property
    def score(self) -> float:
        """Top-1 accuracy, or mIoU, on the validation images, from 0 to 1."""
        return float(self.metrics["val"][self.score_name])

    @property
    def score_name(self) -> str:
        """``"top1"`` or ``"miou"``."""
        return "top1" if self.metrics["task"] == "classify" else "miou"

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        about = f"{self.metrics['model']}, {self.score_name} {self.score:.4f}, {self.metrics['epochs']} epochs"
        return f"TrainedRun({str(self.path)!r}: {about})"


def train(**options: Any) -> TrainedRun:
    """Train a network, as ``pcenet train`` does; a run that has begun in ``out`` is gone on with (``resume="auto"``).

    ``run = pcenet.train(data="pictures", model="pce_nano", epochs=15)``, then ``run.score``, ``run.model``.

    Args:
        options: those of ``pcenet train``: ``data``, ``model``, ``epochs``, ``lr``, ``out``, ``resume`` ... ``task`` is
            inferred from the data by default.

    Returns:
        The run: its path, score and network.

    Raises:
        TypeError: for an unknown option.
        ValueError: for a value that breaks its rule, or faulty data.
    """
    from pcenet.runs.config import TrainConfig
    from pcenet.training.run import train as train_run

    folder = train_run(config_of(TrainConfig, {"resume": "auto", **with_task(options)}))
    return TrainedRun(folder.path, json.loads(folder.metrics.read_text(encoding="utf-8")))


def config_of(config_class: type[C], options: Mapping[str, Any]) -> C:
    """The options of a command as its config.

    Raises:
        TypeError: for an option that there is not; names the nearest.
    """
    known = [item.name for item in fields(config_class)]  # type: ignore[arg-type] # all configs are dataclasses
    for name in options:
        if name not in known:
            raise TypeError(f"unknown option {name!r}{did_you_mean(name, known)}")
    return config_class(**options)


def with_task(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with the task of the data, where they give none."""
    from pcenet.parsing import task_of_the_data
    from pcenet.runs.config import TrainConfig
    from pcenet.runs.options import plain

    if "task" in options:
        return dict(options)
    return {"task": task_of_the_data(plain(options.get("data", TrainConfig.data))), **options}


def evaluate(run: str | os.PathLike[str], data: str | None = None, **options: Any) -> Evaluation | PixelEvaluation:
    """Measure a trained network, as ``pcenet eval`` does.

    Args:
        run: a run folder, a model folder, the name of bundled weights, or a `TrainedRun`.
        data: the data set; None: the one that it was trained on.
        options: the others of ``pcenet eval``, such as ``split="test"``.
    """
    from pcenet.runs.config import EvalConfig
    from pcenet.tasks.evaluation import evaluate as evaluate_run

    found: Evaluation | PixelEvaluation = evaluate_run(
        config_of(EvalConfig, {"run": os.fspath(run), "data": data, **options})
    )
    return found


def predict(run: str | os.PathLike[str], inputs: Any, **options: Any) -> Predictions:
    """Apply a trained network to images; by its method ``predict``.

    Args:
        run: a run folder, a model folder, the name of bundled weights, or a `TrainedRun`.
        inputs: files, folders, archives, PIL images, arrays, tensors, or a list of them.
        options: ``top``, ``tta``, ``sliding_window``, ``overlap``, ``batch_size``, ``precision``.
    """
    from pcenet.models import load_model
    from pcenet.runs.finding import find_model

    predictions: Predictions = load_model(find_model(os.fspath(run))[0]).predict(inputs, **options)
    return predictions


def explain(run: str | os.PathLike[str], data: str | None = None, **options: Any) -> Path:
    """Write the page on what each expert does, as ``pcenet explain``; returns its path. Arguments as in `evaluate`."""
    from pcenet.explanation.command import explain as explain_run
    from pcenet.explanation.config import ExplainConfig

    return explain_run(config_of(ExplainConfig, {"run": os.fspath(run), "data": data, **options}))


def export(run: str | os.PathLike[str], **options: Any) -> Export:
    """Write a trained network to a file, as ``pcenet export``; returns what was written, with ``path``."""
    from pcenet.exporting.command import export as export_run
    from pcenet.exporting.config import ExportConfig

    return export_run(config_of(ExportConfig, {"run": os.fspath(run), **options}))


def compare(models: list[str] | None = None, **options: Any) -> dict[str, Any]:
    """Train several networks with several seeds under one recipe, as ``pcenet compare``.

    Args:
        models: networks, and labels of ``variants``; None: all of these.
        options: those of ``pcenet compare`` (``seeds``, ``variants``, ``baseline``, ``out``) and of ``pcenet train``.

    Returns:
        The content of ``comparison.json``.
    """
    from pcenet.comparison.config import OF_A_RUN, CompareConfig
    from pcenet.comparison.run import compare as compare_runs
    from pcenet.comparison.run import status
    from pcenet.runs.config import TrainConfig

    for name in OF_A_RUN:
        if name in options and name != "out":
            raise TypeError(f"{name} is of a single run, and set by the comparison; see seeds, and status")

    of_comparison = {item.name for item in fields(CompareConfig)} - {"models", "recipe"}
    own = {name: options.pop(name) for name in of_comparison & options.keys()}
    recipe = config_of(TrainConfig, with_task(options))
    config = config_of(CompareConfig, {"models": [] if models is None else models, "recipe": recipe, **own})
    return (status if config.status else compare_runs)(config)
