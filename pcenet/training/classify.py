"""Classification: what its runs load, train and measure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
)

import pcenet.data as data
from pcenet.models import SavableModel
from pcenet.nn import RoutingStatistics, record_routing
from pcenet.nn.processes import sum_over_processes
from pcenet.training.config import EvalConfig, Precision, TrainConfig
from pcenet.training.device import autocast
from pcenet.training.health import count_routings, health_of
from pcenet.training.kinds import Kind
from pcenet.training.measures import CALIBRATION_BINS, TOP_K, Evaluation, image_side, preprocessing
from pcenet.training.ranks import over_processes
from pcenet.training.tables import score_text, show
from pcenet.training.task import ClassificationTask


class Classification(Kind):
    """A label for an image."""

    task = ClassificationTask

    def open(
        self, config: TrainConfig | EvalConfig, name: str, split: data.Split, trained: SavableModel | None = None
    ) -> data.ImageSource:
        """One split of a labelled data set."""
        return data.open_source(name, split, grey_range=config.grey_range)

    def train_loader(
        self, model: SavableModel, source: Any, config: TrainConfig, *, workers: int, pin_memory: bool
    ) -> DataLoader[Any]:
        """Augmented, shuffled batches."""
        values = preprocessing(model)
        transform = data.train_transform(
            image_side(model),
            augment=config.augment,
            horizontal_flip=source.horizontal_flip,
            random_erasing=config.random_erasing,
            mean=values["mean"],
            std=values["std"],
        )
        assert config.batch_size is not None
        return data.build_loader(
            source,
            transform,
            batch_size=config.batch_size,
            seed=config.seed,
            train=True,
            workers=workers,
            pin_memory=pin_memory,
        )

    def eval_loader(
        self, model: nn.Module, source: Any, *, batch_size: int, workers: int, pin_memory: bool = False
    ) -> DataLoader[Any]:
        """Plain batches, in order."""
        return model_loader(model, source, batch_size=batch_size, workers=workers, pin_memory=pin_memory)

    def images_of(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
        """The images ``[B, 3, h, w]`` of `eval_loader`'s batches."""
        return (images for images, _ in batches)

    def make_task(self, model: nn.Module, config: TrainConfig, source: Any, steps_per_epoch: int) -> ClassificationTask:
        """The module that trains the model."""
        return ClassificationTask(model, config, steps_per_epoch)

    def evaluate(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        classes: Sequence[str],
        *,
        device: torch.device,
        precision: Precision,
    ) -> Evaluation:
        """Measure a model, see `evaluate_model`."""
        return evaluate_model(model, batches, classes, device=device, precision=precision)

    def summary(self, result: Evaluation) -> dict[str, Any]:
        """The figures that ``metrics.json`` keeps of an evaluation."""
        return {name: getattr(result, name) for name in ("images", "loss", "top1", "top5", "calibration_error")}

    def headline(self, result: Evaluation) -> str:
        """An evaluation in one line."""
        top1, top5 = (score_text(value, result.images) for value in (result.top1, result.top5))
        return f"top-1 {top1}, top-5 {top5}, of {result.images} images"

    def show(self, result: Evaluation, title: str) -> None:
        """Print an evaluation as tables."""
        show(result, title)


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

    Processes that train together each measure it on batches of their own; what comes out is of all.

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
        count_routings(routing, records)
    matrix: list[list[int]] = confusion.compute().tolist()  # torchmetrics sums over processes by itself
    return Evaluation(
        images=sum(map(sum, matrix)),
        loss=float(sum_over_processes(loss)) / sum(map(sum, matrix)),
        top1=sum(row[i] for i, row in enumerate(matrix)) / sum(map(sum, matrix)),
        top5=float(top5.compute()) if top5 else None,
        calibration_error=float(calibration.compute()),
        per_class={
            name: {"images": sum(row), "accuracy": row[i] / sum(row) if sum(row) else None}
            for i, (name, row) in enumerate(zip(classes, matrix, strict=True))
        },
        confusion=matrix,
        router={name: health_of(over_processes(statistics).compute()) for name, statistics in routing.items()},
    )


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
    model: nn.Module, source: data.ImageSource, *, batch_size: int, workers: int, pin_memory: bool = False
) -> DataLoader[tuple[Tensor, int]]:
    """Batches of a source, prepared as the model's ``pretrained_cfg`` says, in order.

    Raises:
        ValueError: as `eval_transform_of`.
    """
    transform = eval_transform_of(model)
    return data.build_loader(
        source, transform, batch_size=batch_size, train=False, workers=workers, pin_memory=pin_memory
    )
