"""Segmentation: what its runs load, train, measure and show."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

import pcenet.data as data
from pcenet.choices import GreyRange, Part, Precision
from pcenet.data import IGNORE
from pcenet.models import SavableModel
from pcenet.models.preprocessing import image_size, preprocessing
from pcenet.nn import RoutingStatistics
from pcenet.nn.processes import process_count, sum_over_processes
from pcenet.reporting.numbers import percent, score_text
from pcenet.reporting.tables import console, router_table
from pcenet.runs.config import EvalConfig, TrainConfig
from pcenet.runs.health import count_routings, health_of
from pcenet.runtime.device import autocast
from pcenet.runtime.distributed import over_processes
from pcenet.tasks.answers import answer
from pcenet.tasks.base import Objective, Task, mirrors
from pcenet.tasks.mixing import make_pasting
from pcenet.tasks.pixels import PixelBatches, PixelScores
from pcenet.tasks.results import PixelEvaluation


class SegmentationObjective(Objective):
    """Logits ``[B, num_classes, H, W]``, class numbers ``[B, H, W]``; pixels of ``pcenet.data.IGNORE`` do not count.

    Args:
        class_weights: ``[num_classes]``, weight of each class in the loss; None: all equal.
    """

    score = "miou"
    train_score = "pixel_accuracy"

    def __init__(self, config: TrainConfig, class_weights: Tensor | None = None) -> None:
        super().__init__()
        self.label_smoothing = config.label_smoothing
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.class_weights: Tensor | None
        self.pixels: PixelScores | None = None
        self.pasting = make_pasting(config.cutmix)

    def mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The batch with cutmix, where the options ask for it."""
        return (images, targets) if self.pasting is None else self.pasting(images, targets)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy over the pixels that count, weighted by class, with label smoothing; 0 where none counts.

        Where several processes train, what is divided by is the mean over their batches, so that the mean of their
        losses is that of one batch, however unevenly the pixels that count are spread.
        """
        total = F.cross_entropy(
            logits,
            targets,
            weight=self.class_weights,
            ignore_index=IGNORE,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )
        counted = targets != IGNORE
        weight = counted.sum() if self.class_weights is None else self.class_weights[targets[counted]].sum()
        return total / self.mean_weight(weight).to(total.dtype).clamp(min=1e-12)

    def right(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Pixel accuracy; 0 where no pixel counts."""
        counted = targets != IGNORE
        return ((logits.argmax(1) == targets) & counted).sum() / self.mean_weight(counted.sum()).float().clamp(
            min=1e-12
        )

    @staticmethod
    def mean_weight(weight: Tensor) -> Tensor:
        """The mean over processes of what each of their batches is divided by."""
        return sum_over_processes(weight.double()) / process_count()

    def validate(self, forward: Callable[[Tensor], Tensor], batch: PixelBatches) -> None:
        """Counts pixels at the size of the masks."""
        for images, masks in batch:
            logits = forward(images)
            if self.pixels is None:
                self.pixels = PixelScores(logits.shape[1], logits.device)
            self.pixels.update(logits, masks)

    def scores(self) -> dict[str, float]:
        """Loss, mIoU and pixel accuracy of the whole split."""
        assert self.pixels is not None
        scores = self.pixels.compute()
        self.pixels = None
        return {"val/loss": scores.loss, "val/miou": scores.miou, "val/pixel_accuracy": scores.pixel_accuracy}


class Segmentation(Task):
    """A label for every pixel."""

    objective = SegmentationObjective

    def open(
        self, config: TrainConfig | EvalConfig, name: str, split: Part, trained: SavableModel | None = None
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
            horizontal_flip=mirrors(config, source) and augmented,
            centre=not augmented,
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
        multiple = size_multiple(model)
        transform = data.segment_eval_transform(
            image_size(model), mean=values["mean"], std=values["std"], multiple=multiple
        )
        return data.build_segmentation_loader(
            source, transform, batch_size=batch_size, train=False, workers=workers, pin_memory=pin_memory
        )

    def image_transform(self, model: nn.Module) -> data.Transform:
        """Enlarged or reduced so that it covers the network's rectangle."""
        values, multiple = preprocessing(model), size_multiple(model)
        return data.cover_transform(image_size(model), mean=values["mean"], std=values["std"], multiple=multiple)

    def images_of(self, batches: Iterable[PixelBatches]) -> Iterator[Tensor]:
        """The images ``[B, 3, h, w]`` of `eval_loader`'s batches."""
        return (images for batch in batches for images, _ in batch)

    def make_objective(self, model: SavableModel, config: TrainConfig, source: Any) -> SegmentationObjective:
        """What trains the model; class weights are counted in the source's masks."""
        weights = median_weights(pixel_counts(source)) if config.class_weights == "median" else None
        return SegmentationObjective(config, weights)

    @torch.inference_mode()
    def evaluate(
        self,
        model: nn.Module,
        batches: Iterable[PixelBatches],
        classes: Sequence[str],
        *,
        device: torch.device,
        precision: Precision,
        tta: bool = False,
    ) -> PixelEvaluation:
        """Measure ``model``, which is put on ``device`` and in evaluation mode, at the size of the masks.

        For ``tta`` see `answer`; router health is that of the images, not of their mirror images.
        Processes that train together each measure it on batches of their own; what comes out is of all."""
        model = model.to(device).to(memory_format=torch.channels_last).eval()
        scores = PixelScores(len(classes), device)
        routing: defaultdict[str, RoutingStatistics] = defaultdict(RoutingStatistics)
        count = torch.zeros((), dtype=torch.int64, device=device)
        for images, masks in (group for batch in batches for group in batch):
            with autocast(precision, device):
                logits, records = answer(model, images.to(device, memory_format=torch.channels_last), tta=tta)
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
        _show(result, title)


def size_multiple(model: nn.Module) -> int | None:
    """What the sides of a network's images are multiples of: 1 but for exported files; None for one that takes images
    of one size."""
    return getattr(model, "size_multiple", 1)


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

    Raises:
        ValueError: if there are none.
    """
    if not counts.any():
        raise ValueError(
            "class_weights 'median' needs pixels that count, and the masks for training have none: look at classes and "
            "ignore_index, or give none"
        )
    share = counts / counts.sum().clamp(min=1)
    return torch.where(counts > 0, share[counts > 0].quantile(0.5) / share, 0.0).float()


def _show(result: PixelEvaluation, title: str) -> None:
    """Print an evaluation of a segmentation network as tables."""
    screen = console()
    summary = Table(title=title, show_header=False)
    for label, value in (
        ("images", str(result.images)),
        ("mIoU", score_text(result.miou, result.images)),
        ("pixel accuracy", score_text(result.pixel_accuracy, result.images)),
        ("cross-entropy", f"{result.loss:.4f}"),
    ):
        summary.add_row(label, value)
    screen.print(summary)
    table = Table("class", "share of pixels", "IoU", "accuracy")
    for name, entry in result.per_class.items():
        scores = (score_text(entry[key], result.images) for key in ("iou", "accuracy"))
        table.add_row(name, percent(entry["share"]), *scores)
    screen.print(table)
    if result.router:
        screen.print(router_table(result.router))
