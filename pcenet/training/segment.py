"""Segmentation: what its runs load, train and measure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import pcenet.data as data
from pcenet.choices import GreyRange
from pcenet.models import SavableModel
from pcenet.nn import RoutingStatistics, record_routing
from pcenet.nn.processes import sum_over_processes
from pcenet.training.config import EvalConfig, Precision, TrainConfig
from pcenet.training.device import autocast
from pcenet.training.health import count_routings, health_of
from pcenet.training.kinds import Kind
from pcenet.training.measures import PixelEvaluation, image_size, preprocessing
from pcenet.training.pixels import PixelBatches, PixelScores
from pcenet.training.ranks import over_processes
from pcenet.training.tables import score_text, show_pixels
from pcenet.training.task import SegmentationTask


class Segmentation(Kind):
    """A label for every pixel."""

    task = SegmentationTask

    def open(
        self, config: TrainConfig | EvalConfig, name: str, split: data.Split, trained: SavableModel | None = None
    ) -> data.SegmentationSource:
        """One split of a data set of images and masks."""
        return data.open_segmentation_source(
            name,
            split,
            classes=config.classes,
            ignore_index=config.ignore_index,
            grey_range=config.grey_range,
            known_classes=known_masks(trained),
        )

    def tell_of_data(self, model: SavableModel, source: data.SegmentationSource, grey_range: GreyRange | None) -> None:
        """Let a network know the data that it is trained on, the values of their masks among it."""
        super().tell_of_data(model, source, grey_range)
        model.mask_values, model.ignored_values = list(source.mask_values), list(source.ignored_values)

    def train_loader(
        self, model: SavableModel, source: Any, config: TrainConfig, *, workers: int, pin_memory: bool
    ) -> DataLoader[Any]:
        """Augmented, shuffled batches (images ``[B, 3, h, w]``, masks ``[B, h, w]``)."""
        values, augmented = preprocessing(model), config.augment != "none"
        transform = data.segment_train_transform(
            image_size(model),
            scale=(config.min_scale, config.max_scale) if augmented else (1.0, 1.0),
            jitter=config.jitter if augmented else 0.0,
            horizontal_flip=source.horizontal_flip and augmented,
            mean=values["mean"],
            std=values["std"],
        )
        assert config.batch_size is not None
        return data.build_segmentation_loader(
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
        """Batches of whole images of one size each, with their masks at full size, in order."""
        values = preprocessing(model)
        transform = data.segment_eval_transform(image_size(model), mean=values["mean"], std=values["std"])
        return data.build_segmentation_loader(
            source, transform, batch_size=batch_size, train=False, workers=workers, pin_memory=pin_memory
        )

    def images_of(self, batches: Iterable[PixelBatches]) -> Iterator[Tensor]:
        """The images ``[B, 3, h, w]`` of `eval_loader`'s batches."""
        return (images for batch in batches for images, _ in batch)

    def make_task(self, model: nn.Module, config: TrainConfig, source: Any, steps_per_epoch: int) -> SegmentationTask:
        """The module that trains the model; class weights are counted in the source's masks."""
        weights = median_weights(pixel_counts(source)) if config.class_weights == "median" else None
        return SegmentationTask(model, config, steps_per_epoch, weights)

    @torch.inference_mode()
    def evaluate(
        self,
        model: nn.Module,
        batches: Iterable[PixelBatches],
        classes: Sequence[str],
        *,
        device: torch.device,
        precision: Precision,
    ) -> PixelEvaluation:
        """Measure ``model``, which is put on ``device`` and in evaluation mode, at the size of the masks.

        Processes that train together each measure it on batches of their own; what comes out is of all."""
        model = model.to(device).to(memory_format=torch.channels_last).eval()
        scores = PixelScores(len(classes), device)
        routing: defaultdict[str, RoutingStatistics] = defaultdict(RoutingStatistics)
        count = torch.zeros((), dtype=torch.int64, device=device)
        for images, masks in (group for batch in batches for group in batch):
            with autocast(precision, device), record_routing(model) as records:
                logits = model(images.to(device, memory_format=torch.channels_last))
            scores.update(logits, masks)
            count += len(images)
            count_routings(routing, records)
        counts = scores.compute()
        matrix: list[list[int]] = counts.confusion.tolist()
        pixels = sum(map(sum, matrix))
        return PixelEvaluation(
            images=int(sum_over_processes(count)),
            pixels=pixels,
            loss=counts.loss,
            miou=counts.miou,
            pixel_accuracy=counts.pixel_accuracy,
            per_class={
                name: {
                    "share": sum(row) / pixels if pixels else 0.0,
                    "iou": None if math.isnan(iou) else iou,
                    "accuracy": row[i] / sum(row) if sum(row) else None,
                }
                for i, (name, row, iou) in enumerate(zip(classes, matrix, counts.iou.tolist(), strict=True))
            },
            confusion=matrix,
            router={name: health_of(over_processes(statistics).compute()) for name, statistics in routing.items()},
        )

    def summary(self, result: PixelEvaluation) -> dict[str, Any]:
        """The figures that ``metrics.json`` keeps of an evaluation."""
        figures = {name: getattr(result, name) for name in ("images", "pixels", "loss", "miou", "pixel_accuracy")}
        return figures | {"iou": {name: values["iou"] for name, values in result.per_class.items()}}

    def headline(self, result: PixelEvaluation) -> str:
        """An evaluation in one line."""
        miou, accuracy = (score_text(value, result.images) for value in (result.miou, result.pixel_accuracy))
        return f"mIoU {miou}, pixel accuracy {accuracy}, of {result.images} images"

    def show(self, result: PixelEvaluation, title: str) -> None:
        """Print an evaluation as tables."""
        show_pixels(result, title)


def known_masks(trained: SavableModel | None) -> data.MaskClasses | None:
    """What a trained network knows of its masks; None where it was saved before networks knew."""
    if trained is None or trained.class_names is None or trained.mask_values is None:
        return None
    ignored = frozenset(trained.ignored_values or ())
    return data.MaskClasses(tuple(trained.class_names), tuple(trained.mask_values), ignored)


def pixel_counts(source: data.SegmentationSource) -> Tensor:
    """``[K]`` float64: how many pixels of each class the masks of a source have."""
    counts = np.zeros(data.IGNORE + 1, dtype=np.int64)
    for index in range(len(source)):
        counts += np.bincount(np.asarray(source.mask(index)).ravel(), minlength=len(counts))
    return torch.from_numpy(counts[: len(source.classes)]).double()


def median_weights(counts: Tensor) -> Tensor:
    """The weight of each class that balances the loss: the median share of the classes that occur over its own share
    (Eigen and Fergus, 2015); 0 for a class that does not occur.

    Args:
        counts: ``[K]``, pixels of each class.
    """
    share = counts / counts.sum().clamp(min=1)
    return torch.where(counts > 0, share[counts > 0].quantile(0.5) / share, 0.0).float()
