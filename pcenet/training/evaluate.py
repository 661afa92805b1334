"""Measuring a trained network: accuracy, confusion matrix, calibration, router health."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
)

import pcenet.data as data
from pcenet.models import load_model
from pcenet.nn import RoutingStatistics, record_routing
from pcenet.training.config import EvalConfig, Precision
from pcenet.training.device import autocast, resolve_device, resolve_precision, resolve_workers, set_threads
from pcenet.training.folder import RunFolder, write_json
from pcenet.training.measures import CALIBRATION_BINS, TOP_K, Evaluation, health_of, image_side, preprocessing
from pcenet.training.tables import show


@torch.inference_mode()
def evaluate_model(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    classes: Sequence[str],
    *,
    device: torch.device,
    precision: Precision,
) -> Evaluation:
    """Measure ``model``, which is put on ``device`` and in evaluation mode.

    Args:
        model: images ``[B, 3, H, W]`` to logits ``[B, len(classes)]``.
        batches: images and their class numbers ``[B]``.
        classes: class names, by class number.
        device: where to compute.
        precision: ``"bf16"`` or ``"fp32"``.
    """
    model = model.to(device).to(memory_format=torch.channels_last).eval()
    count = len(classes)
    confusion = MulticlassConfusionMatrix(count).to(device)
    calibration = MulticlassCalibrationError(count, n_bins=CALIBRATION_BINS).to(device)
    top5 = MulticlassAccuracy(count, top_k=TOP_K, average="micro").to(device) if count >= TOP_K else None
    loss = torch.zeros((), device=device, dtype=torch.float64)
    routing: defaultdict[str, RoutingStatistics] = defaultdict(RoutingStatistics)
    for images, labels in batches:
        images, labels = images.to(device, memory_format=torch.channels_last), labels.to(device)
        with autocast(precision, device), record_routing(model) as records:
            logits = model(images)
        logits = logits.float()
        loss += F.cross_entropy(logits, labels, reduction="sum")
        probs = logits.softmax(1)
        for metric in (confusion, calibration, *([top5] if top5 else [])):
            metric.update(probs, labels)
        for name, routings in records.items():
            for record in routings:
                routing[name].update(record)
    matrix: list[list[int]] = confusion.compute().tolist()
    return Evaluation(
        images=sum(map(sum, matrix)),
        loss=float(loss) / sum(map(sum, matrix)),
        top1=sum(row[i] for i, row in enumerate(matrix)) / sum(map(sum, matrix)),
        top5=float(top5.compute()) if top5 else None,
        calibration_error=float(calibration.compute()),
        per_class={
            name: {"images": sum(row), "accuracy": row[i] / sum(row) if sum(row) else None}
            for i, (name, row) in enumerate(zip(classes, matrix, strict=True))
        },
        confusion=matrix,
        router={name: health_of(statistics.compute()) for name, statistics in routing.items()},
    )


def check_classes(expected: Sequence[str], found: Sequence[str], expected_by: str, found_in: str) -> None:
    """Raise a ``ValueError`` that names the difference unless both lists are the same, in the same order."""
    if list(expected) == list(found):
        return
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    if missing or extra:
        difference = "; ".join(
            f"only {where}: {', '.join(names)}"
            for where, names in ((f"in {expected_by}", missing), (f"in {found_in}", extra))
            if names
        )
    else:
        difference = f"the same classes in another order, {', '.join(expected)} and {', '.join(found)}"
    raise ValueError(f"classes of {found_in} are not those of {expected_by}: {difference}")


def eval_transform_of(model: nn.Module) -> data.Transform:
    """The transform that a timm model's ``pretrained_cfg`` asks for.

    Raises:
        ValueError: if it asks for another crop or interpolation than that of `pcenet.data.eval_transform`.
    """
    values = preprocessing(model)
    for name, done in (("crop_pct", 1.0), ("interpolation", "bilinear")):
        if values[name] != done:
            raise ValueError(
                f"{name}={values[name]!r} in the model's pretrained_cfg: images are only ever prepared with {done!r};"
                f" make the model with pretrained_cfg_overlay={{{name!r}: {done!r}}} if that suits it"
            )
    return data.eval_transform(image_side(model), mean=values["mean"], std=values["std"])


def model_loader(
    model: nn.Module, source: data.ImageSource, *, batch_size: int, workers: int
) -> Iterable[tuple[Tensor, Tensor]]:
    """Batches of a source, prepared as the model's ``pretrained_cfg`` says, in order.

    Raises:
        ValueError: as `eval_transform_of`.
    """
    loader: Iterable[tuple[Tensor, Tensor]] = data.build_loader(
        source, eval_transform_of(model), batch_size=batch_size, seed=0, train=False, workers=workers
    )
    return loader


def evaluate(config: EvalConfig) -> Evaluation:
    """``pcenet eval``: measure a trained model, print tables, write ``eval-<data>-<split>.json``.

    Raises:
        FileNotFoundError: if there is no model where ``config.run`` points.
        ValueError: if no data set is known, or if its classes are not the model's.
    """
    set_threads(config.threads)
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    model_folder, run = find_model(Path(config.run))
    name = config.data or (run.read_config().data if run else None)
    if name is None:
        raise ValueError(f"data: {config.run} is a model folder, which names no data; give --data SOURCE")
    model = load_model(model_folder)
    if model.class_names is None:
        raise ValueError(f"{model_folder}: config.json names no classes (label_names)")
    source = data.open_source(name, config.split)
    check_classes(model.class_names, source.classes, str(model_folder), source.name)
    workers = resolve_workers(config.workers, device)
    batches = model_loader(model, source, batch_size=config.batch_size, workers=workers)
    result = evaluate_model(model, batches, source.classes, device=device, precision=precision)
    out = Path(config.out) if config.out else run.path if run else Path()
    out.mkdir(parents=True, exist_ok=True)
    path = result_path(out, Path(source.name).stem, name, config.split)
    about = {"model": model.pretrained_cfg["architecture"], "data": source.name, "split": config.split}
    write_json(path, about | {"source": name} | asdict(result))
    show(result, f"{config.run} on {source.name}, {config.split}")
    print(f"wrote {path}")
    return result


def result_path(folder: Path, data_name: str, source: str, split: data.Split) -> Path:
    """``eval-<data>-<split>.json`` in ``folder``; with a number where the figures of another source have that name."""
    stems = (data_name if number == 1 else f"{data_name}-{number}" for number in count(1))
    paths = (folder / f"eval-{stem}-{split}.json" for stem in stems)
    return next(path for path in paths if not path.exists() or written_for(path) == source)


def written_for(path: Path) -> str | None:
    """The source whose figures a file of `evaluate` holds; None for any other file."""
    try:
        source: str | None = json.loads(path.read_text(encoding="utf-8"))["source"]
    except (ValueError, KeyError, TypeError):
        return None
    return source


def find_model(path: Path) -> tuple[Path, RunFolder | None]:
    """The model folder that ``path`` is or holds, and the run folder around it, if it is one.

    Raises:
        FileNotFoundError: if there is neither.
    """
    for folder in (path / "model", path):
        if (folder / "config.json").is_file():
            run = RunFolder(folder.parent)
            return folder, run if run.config.is_file() else None
    reason = "training has not finished there" if (path / "config.yaml").is_file() else "there is no model/config.json"
    raise FileNotFoundError(f"run: {path} is no run folder or model folder: {reason}")
