"""What differs between the tasks, in one place: opening data, loading, training, measuring, showing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pcenet.choices import GreyRange, Split, Task
from pcenet.models import SavableModel
from pcenet.models.limits import check_class_names
from pcenet.training.config import EvalConfig, Precision, TrainConfig
from pcenet.training.task import TrainingTask


class Kind(ABC):
    """One kind of task. Sources, batches and results are of its own types; all else is the same for every kind.

    Attributes:
        task: the class of the Lightning module, which names the score.
    """

    task: ClassVar[type[TrainingTask]]

    @abstractmethod
    def open(
        self, config: TrainConfig | EvalConfig, name: str, split: Split, trained: SavableModel | None = None
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
    def images_of(self, batches: Iterable[Any]) -> Iterator[Tensor]:
        """The images ``[B, 3, h, w]`` of `eval_loader`'s batches."""

    @abstractmethod
    def make_task(self, model: nn.Module, config: TrainConfig, source: Any, steps_per_epoch: int) -> TrainingTask:
        """The module that trains the model on a source."""

    @abstractmethod
    def evaluate(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        classes: Sequence[str],
        *,
        device: torch.device,
        precision: Precision,
    ) -> Any:
        """Measure a model on the batches of `eval_loader`: a dataclass with ``router`` among its fields."""

    @abstractmethod
    def summary(self, result: Any) -> dict[str, Any]:
        """The figures that ``metrics.json`` keeps of an evaluation."""

    @abstractmethod
    def headline(self, result: Any) -> str:
        """An evaluation in one line."""

    @abstractmethod
    def show(self, result: Any, title: str) -> None:
        """Print an evaluation as tables."""


def kind_of(task: Task) -> Kind:
    """The kind of a task."""
    from pcenet.training.classify import Classification
    from pcenet.training.segment import Segmentation

    return Classification() if task == "classify" else Segmentation()
