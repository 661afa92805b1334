"""Classification: what its runs load, train, measure and show."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

import pcenet.data as data
from pcenet.choices import Part, Precision
from pcenet.models import SavableModel
from pcenet.models.preprocessing import image_side, preprocessing
from pcenet.nn import RoutingStatistics
from pcenet.nn.processes import sum_over_processes
from pcenet.reporting.numbers import score_text
from pcenet.reporting.tables import console, router_table
from pcenet.runs.config import EvalConfig, TrainConfig
from pcenet.runs.health import count_routings, health_of
from pcenet.runtime.device import autocast, widest
from pcenet.runtime.distributed import over_processes
from pcenet.tasks.answers import answer
from pcenet.tasks.base import Objective, Task, mirrors
from pcenet.tasks.means import EpochMeans
from pcenet.tasks.mixing import make_mixing
from pcenet.tasks.results import CALIBRATION_BINS, TOP_K, Evaluation

WIDEST_CONFUSION = 12


class ClassificationObjective(Objective):
    """Logits ``[B, num_classes]``, class numbers ``[B]``, or, of mixed images, shares ``[B, num_classes]``."""

    score = "top1"
    train_score = "top1"

    def __init__(self, config: TrainConfig, num_classes: int, normalize: nn.Module | None = None) -> None:
        super().__init__()
        self.normalize = normalize  # of images that come to a GPU as uint8
        self.num_classes = num_classes
        self.label_smoothing = config.label_smoothing
        self.mixing = make_mixing(config.mixup, config.cutmix)
        self.validation = EpochMeans()

    def mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The batch, normalised by now, with mixup or cutmix, where the options ask for it."""
        if images.dtype == torch.uint8:
            assert self.normalize is not None
            images = self.normalize(images)
        if self.mixing is None:
            return images, targets
        return self.mixing(images, F.one_hot(targets, self.num_classes).float())

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy with label smoothing."""
        return F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)

    def right(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Top-1 accuracy; of a mixed image the class with the largest share counts."""
        targets = targets if targets.ndim == 1 else targets.argmax(1)
        return (logits.argmax(1) == targets).float().mean()

    def validate(self, forward: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> None:
        """Unsmoothed cross-entropy, top-1 and, from five classes on, top-5."""
        from torchmetrics.functional.classification import multiclass_accuracy

        images, labels = batch
        logits = forward(images)
        classes = logits.shape[1]
        accuracy = partial(multiclass_accuracy, logits, labels, num_classes=classes, average="micro")
        values = {"val/loss": F.cross_entropy(logits, labels), "val/top1": accuracy(top_k=1)}
        if classes >= TOP_K:
            values["val/top5"] = accuracy(top_k=TOP_K)
        self.validation.update(values, len(labels))

    def scores(self) -> dict[str, Tensor]:
        """The means over the split."""
        means = self.validation.compute()
        self.validation.reset()
        return means


class Classification(Task):
    """A label for an image."""

    objective = ClassificationObjective

    def open(
        self, config: TrainConfig | EvalConfig, name: str, split: Part, trained: SavableModel | None = None
    ) -> data.ImageSource:
        """One split of a labelled data set."""
        return data.open_source(name, split, grey_range=config.grey_range)

    def train_loader(
        self, model: SavableModel, source: Any, config: TrainConfig, *, workers: int, pin_memory: bool
    ) -> DataLoader[Any]:
        """Augmented, shuffled batches; uint8 where they go to a GPU, which the objective's `mix` normalises."""
        values = preprocessing(model)
        transform = data.train_transform(
            image_side(model),
            augment=config.augment,
            horizontal_flip=mirrors(config, source),
            random_erasing=config.random_erasing,
            mean=values["mean"],
            std=values["std"],
            normalize=not pin_memory or config.random_erasing > 0,  # else on the GPU: a quarter of the bytes to bring
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

    def image_transform(self, model: nn.Module) -> data.Transform:
        """Resized and cropped to the network's square."""
        return eval_transform_of(model)

    def images_of(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
        """The images ``[B, 3, h, w]`` of `eval_loader`'s batches."""
        return (images for images, _ in batches)

    def make_objective(self, model: SavableModel, config: TrainConfig, source: Any) -> ClassificationObjective:
        """What trains the model."""
        assert isinstance(model.num_classes, int)
        values = preprocessing(model)
        return ClassificationObjective(config, model.num_classes, data.Normalize(values["mean"], values["std"]))

    def evaluate(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        classes: Sequence[str],
        *,
        device: torch.device,
        precision: Precision,
        tta: bool = False,
    ) -> Evaluation:
        """Measure a model, see `evaluate_model`."""
        return evaluate_model(model, batches, classes, device=device, precision=precision, tta=tta)

    def summary(self, result: Evaluation) -> dict[str, Any]:
        """The figures that ``metrics.json`` keeps of an evaluation."""
        return {name: getattr(result, name) for name in ("images", "loss", "top1", "top5", "calibration_error")}

    def headline(self, result: Evaluation) -> str:
        """An evaluation in one line."""
        top1, top5 = (score_text(value, result.images) for value in (result.top1, result.top5))
        return f"top-1 {top1}, top-5 {top5}, of {result.images} images"

    def show(self, result: Evaluation, title: str) -> None:
        """Print an evaluation as tables."""
        _show(result, title)


@torch.inference_mode()
def evaluate_model(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    classes: Sequence[str],
    *,
    device: torch.device,
    precision: Precision,
    tta: bool = False,
) -> Evaluation:
    """Measure ``model``, which is put on ``device`` and in evaluation mode.

    Processes that train together each measure it on batches of their own; what comes out is of all.

    Args:
        model: images ``[B, 3, H, W]`` to logits ``[B, len(classes)]``.
        batches: images and their class numbers ``[B]``.
        classes: class names, by class number.
        device: where to compute.
        precision: a resolved one.
        tta: see `answer`; router health is that of the images, not of their mirror images.
    """
    from torchmetrics import classification as metrics

    model = model.to(device).to(memory_format=torch.channels_last).eval()
    count = len(classes)
    confusion = metrics.MulticlassConfusionMatrix(count).to(device)
    calibration = metrics.MulticlassCalibrationError(count, n_bins=CALIBRATION_BINS).to(device)
    top5 = metrics.MulticlassAccuracy(count, top_k=TOP_K, average="micro").to(device) if count >= TOP_K else None
    loss = torch.zeros((), device=device, dtype=widest(device))
    routing: defaultdict[str, RoutingStatistics] = defaultdict(RoutingStatistics)
    for images, labels in batches:
        images, labels = images.to(device, memory_format=torch.channels_last), labels.to(device)
        with autocast(precision, device):
            logits, records = answer(model, images, tta=tta)
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


def _show(result: Evaluation, title: str) -> None:
    """Print an evaluation as tables."""
    screen = console()
    summary = Table(title=title, show_header=False)
    images = result.images
    top5 = score_text(result.top5, images) if result.top5 is not None else f"n/a (fewer than {TOP_K} classes)"
    for label, value in (
        ("images", str(images)),
        ("top-1", score_text(result.top1, images)),
        ("top-5", top5),
        ("cross-entropy", f"{result.loss:.4f}"),
        (f"calibration error ({CALIBRATION_BINS} bins)", score_text(result.calibration_error, images)),
    ):
        summary.add_row(label, value)
    screen.print(summary)
    names = list(result.per_class)
    wide = len(names) > WIDEST_CONFUSION
    table = Table("class", "images", "accuracy", *([] if wide else names), title="per class; right: predicted as")
    for name, row in zip(names, result.confusion, strict=True):
        entry = result.per_class[name]
        accuracy = score_text(entry["accuracy"], entry["images"])
        table.add_row(name, str(entry["images"]), accuracy, *([] if wide else map(str, row)))
    screen.print(table)
    if result.router:
        screen.print(router_table(result.router))
