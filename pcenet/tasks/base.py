"""What differs between the tasks, in one place: opening data, loading, loss, measuring, showing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pcenet.choices import GreyRange, Part, Precision
from pcenet.models import SavableModel
from pcenet.models.limits import check_class_names
from pcenet.runs.config import EvalConfig, TrainConfig


class Objective(nn.Module, ABC):
    """What a network is trained on, and what is watched of it meanwhile.

    Attributes:
        score: name of the figure of merit among `scores`, as ``val/<score>``; higher is better.
        train_score: name of what `right` gives.
    """

    score: ClassVar[str]
    train_score: ClassVar[str]

    def mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The batch that is trained on; a task may mix its images."""
        return images, targets

    @abstractmethod
    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss that the task is about, a scalar."""

    @abstractmethod
    def right(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The share of the targets that the logits hit, a scalar."""

    @abstractmethod
    def validate(self, forward: Callable[[Tensor], Tensor], batch: Any) -> None:
        """Count a batch of validation images, whose logits ``forward`` gives."""

    @abstractmethod
    def scores(self) -> Mapping[str, Tensor | float]:
        """The figures of all that was counted, as ``val/<name>``; counting starts anew."""


def mirrors(config: TrainConfig, source: Any) -> bool:
    """Whether half of the training images are mirrored: as the options say, else as the images allow."""
    return bool(source.horizontal_flip if config.horizontal_flip is None else config.horizontal_flip)


class Task(ABC):
    """What depends on whether images are classified or segmented; all else is the same.

    Sources, batches and results are of a task's own types.

    Attributes:
        objective: its class, which names the score.
    """

    objective: ClassVar[type[Objective]]

    @abstractmethod
    def open(
        self, config: TrainConfig | EvalConfig, name: str, split: Part, trained: SavableModel | None = None
    ) -> Any:
        """One split of the data set ``name``, with ``name``, ``classes`` and a length; what the data do not say of
        their classes a trained network does."""

    def tell_of_data(self, model: SavableModel, source: Any, grey_range: GreyRange | None) -> None:
        """Let a network know the data that it is trained on: classes, and how deep grey images are read."""
        model.class_names = check_class_names(list(source.classes), len(source.classes))
        model.grey_range = grey_range

    @abstractmethod
    def train_loader(
        self, model: SavableModel, source: Any, config: TrainConfig, *, workers: int, pin_memory: bool
    ) -> DataLoader[Any]:
        """Augmented, shuffled batches (images, targets), whose sampler is a `pcenet.data.EpochSampler`."""

    @abstractmethod
    def eval_loader(
        self, model: nn.Module, source: Any, *, batch_size: int, workers: int, pin_memory: bool = False
    ) -> DataLoader[Any]:
        """Plain batches, prepared as the model's ``pretrained_cfg`` says, in order."""

    @abstractmethod
    def image_transform(self, model: nn.Module) -> Callable[[Image.Image], Tensor]:
        """What prepares a single image, as ``pcenet eval`` does."""

    @abstractmethod
    def images_of(self, batches: Iterable[Any]) -> Iterator[Tensor]:
        """The images ``[B, 3, h, w]`` of `eval_loader`'s batches."""

    @abstractmethod
    def make_objective(self, model: SavableModel, config: TrainConfig, source: Any) -> Objective:
        """What trains a model on a source."""

    @abstractmethod
    def evaluate(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        classes: Sequence[str],
        *,
        device: torch.device,
        precision: Precision,
        tta: bool = False,
    ) -> Any:
        """Measure a model on the batches of `eval_loader`: a dataclass with ``router`` among its fields.

        For ``tta`` see `pcenet.tasks.answers.answer`; router health is that of the images, not of their mirror images.
        """

    @abstractmethod
    def summary(self, result: Any) -> dict[str, Any]:
        """The figures that ``metrics.json`` keeps of an evaluation."""

    @abstractmethod
    def headline(self, result: Any) -> str:
        """An evaluation in one line."""

    @abstractmethod
    def show(self, result: Any, title: str) -> None:
        """Print an evaluation as tables."""
