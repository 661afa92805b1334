"""The LightningModules that train networks, their schedule and their parameter groups."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Self

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from lightning_utilities.core.apply_func import apply_to_collection
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.functional.classification import multiclass_accuracy
from typing_extensions import override

from pcenet.data import IGNORE
from pcenet.nn import Routing, RoutingStatistics, aux_terms, record_routing
from pcenet.nn.experts import SharedConv2d
from pcenet.nn.processes import process_count, sum_over_processes
from pcenet.training.config import TrainConfig
from pcenet.training.health import TRAINED, count_routings, logit_spread
from pcenet.training.means import EpochMeans
from pcenet.training.measures import TOP_K
from pcenet.training.mixing import make_mixing, make_pasting
from pcenet.training.pixels import PixelBatches, PixelScores
from pcenet.training.ranks import gather, own_rank, share_statistics
from pcenet.training.schedules import Schedules


def parameter_groups(
    model: nn.Module, weight_decay: float, difference_decay: float | None = None
) -> list[dict[str, Any]]:
    """AdamW's groups: biases, one-dimensional parameters and what ``no_weight_decay()`` lists do not decay.

    Experts are stacked, so a norm's scale has two dimensions ``[E, C]`` there: dimensions alone do not tell.

    Args:
        model: the network.
        weight_decay: of all others.
        difference_decay: of the experts' differences from their shared kernels; None: as the others.
    """
    listed: Collection[str] = getattr(model, "no_weight_decay", tuple)()
    groups: list[dict[str, Any]] = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=listed)
    if difference_decay is None:
        return groups
    differences = [m.difference for m in model.modules() if isinstance(m, SharedConv2d)]
    apart = {id(parameter) for parameter in differences}
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in apart]
    return [*groups, {"params": differences, "weight_decay": difference_decay}] if differences else groups


def make_optimizer(model: nn.Module, config: TrainConfig, schedules: Schedules) -> tuple[AdamW, LambdaLR]:
    """AdamW with the parameters of a network, and its learning rate, a pure function of the step."""
    optimizer = AdamW(parameter_groups(model, config.weight_decay, config.difference_decay), lr=config.lr)
    return optimizer, LambdaLR(optimizer, schedules.learning_rate)


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """The random seed of one batch: dropout, mixing and noise in it depend on (seed, step, rank) alone."""
    own = [rank] if rank else []
    return int(np.random.SeedSequence([seed, step, *own]).generate_state(1, np.uint64)[0])


@dataclass(frozen=True)
class Seen:
    """A batch between its forward pass and the optimiser's step; nothing here has a gradient.

    Attributes:
        batch: its number in the epoch.
        images: how many.
        finite_images: ``[images]``, whether all pixels are finite.
        values: figures by name, scalars; ``"loss"`` is what is minimised.
        records: the Routings by layer.
    """

    batch: int
    images: int
    finite_images: Tensor
    values: dict[str, Tensor]
    records: Mapping[str, Sequence[Routing]]


def without_gradient(routing: Routing) -> Routing:
    """A Routing that keeps no graph alive."""
    return replace(
        routing,
        logits=routing.logits.detach(),
        probs=routing.probs.detach(),
        choice_weight=routing.choice_weight.detach(),
    )


def add_counts(statistics: RoutingStatistics, counts: Mapping[str, Tensor | None]) -> None:
    """Add the counts of another object's state to router statistics."""
    total = dict(counts)
    for name, own in statistics.state_dict().items():
        count = counts[name]
        total[name] = count if own is None or count is None else own + count
    statistics.load_state_dict(total)


class TrainingTask(L.LightningModule, ABC):
    """Trains a network with the loss of its task and, where it has PCE layers, their auxiliary losses.

    Args:
        model: images ``[B, 3, H, W]`` to logits.
        config: the options.
        steps_per_epoch: steps of the optimiser in one pass over the training images.

    Attributes:
        score: name of the figure of merit that ``validation_step`` logs as ``val/<score>``; higher is better.
        train_score: name of the figure that ``training_step`` logs as ``train/<train_score>``.
        seen: batches that the optimiser has not used yet; it, or whoever leaves them out, clears them.
        means: the means of the figures over the batches that it has used, since somebody reset them.
        routing: what happened in each PCE layer with these.
        val_routing: what happened in each PCE layer in the validation that is at work.
    """

    score: ClassVar[str]
    train_score: ClassVar[str]

    def __init__(self, model: nn.Module, config: TrainConfig, steps_per_epoch: int) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.schedules = Schedules(config, steps_per_epoch)
        self.seen: list[Seen] = []
        self.means = EpochMeans()
        self.routing: defaultdict[str, RoutingStatistics] = defaultdict(RoutingStatistics)
        self.val_routing: defaultdict[str, RoutingStatistics] = defaultdict(RoutingStatistics)
        self.train()

    def mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The batch that is trained on; a task may mix its images."""
        return images, targets

    @abstractmethod
    def task_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss that the task is about, a scalar."""

    @abstractmethod
    def right(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The share of the targets that the logits hit, a scalar."""

    @override
    def train(self, mode: bool = True) -> Self:
        """What is frozen whole stays in evaluation mode: its statistics are part of what it is."""
        super().train(mode)
        for module in self.model.modules():
            requires_grad = [parameter.requires_grad for parameter in module.parameters()]
            if requires_grad and not any(requires_grad):
                module.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits, in float32 at least."""
        logits: Tensor = self.model(images.to(memory_format=torch.channels_last))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def validate(self, images: Tensor) -> Tensor:
        """The logits of validation images; their routing, that of the network as it will be used, is counted."""
        with record_routing(self.model) as records:
            logits: Tensor = self(images)
        count_routings(self.val_routing, records)
        return logits

    def batch_number(self, batch_idx: int) -> int:
        """A number for each batch of the run; the optimiser's step where every batch makes one."""
        return self.current_epoch * self.schedules.steps_per_epoch * self.config.accumulate + batch_idx

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Task loss plus auxiliary losses; `seen` takes notes, without a transfer to the host."""
        images, targets = batch
        finite_images = images.isfinite().flatten(1).all(1)
        share_statistics(self)
        torch.manual_seed(step_seed(self.config.seed, self.batch_number(batch_idx), own_rank()))
        images, targets = self.mix(images, targets)
        with record_routing(self.model) as records:
            logits = self(images)
        task = self.task_loss(logits, targets)
        balance, z = aux_terms(records, synchronised=process_count() > 1)
        # A term of weight 0 is left out, not multiplied: it may be infinite.
        weights = (self.schedules.balance(self.global_step), self.config.z)
        weighted = [w * term for w, term in zip(weights, (balance, z), strict=True) if w]
        loss = sum(weighted, task)
        losses = {"loss": loss, "task_loss": task, "balance_loss": balance, "z_loss": z}
        values = losses | {self.train_score: self.right(logits, targets)}
        values |= {f"{TRAINED}/{name}/logit_spread": logit_spread(routings) for name, routings in records.items()}
        self.seen.append(
            Seen(
                batch_idx,
                len(images),
                finite_images,
                {name: value.detach() for name, value in values.items()},
                {name: [without_gradient(routing) for routing in routings] for name, routings in records.items()},
            )
        )
        self.log_dict({f"step/{k}": v for k, v in losses.items()})
        self.log("loss", loss, prog_bar=True, logger=False)
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"], on_step=True, on_epoch=False)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """The batches enter the figures of the epoch."""
        for seen in self.seen:
            self.means.update(seen.values, seen.images)
            count_routings(self.routing, seen.records)
        self.seen.clear()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The figures of the epoch so far, which may be interrupted, are part of the state: those of each process."""
        routing = {name: statistics.state_dict() for name, statistics in self.routing.items()}
        own = {"means": self.means.state_dict(), "routing": routing}
        first, *others = gather(apply_to_collection(own, Tensor, Tensor.cpu))
        checkpoint["epoch_so_far"] = {**first, "others": others}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on with them; where there are more or fewer processes than before, the first with all."""
        first = checkpoint["epoch_so_far"]
        states = [first, *first.get("others", [])]
        for state in [states[own_rank()]] if len(states) == process_count() else states if own_rank() == 0 else []:
            self.means.add(state["means"])
            for name, counts in state["routing"].items():
                add_counts(self.routing[name], counts)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, its learning rate a pure function of the step."""
        optimizer, scheduler = make_optimizer(self.model, self.config, self.schedules)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class ClassificationTask(TrainingTask):
    """Logits ``[B, num_classes]``, class numbers ``[B]``, or, of mixed images, shares ``[B, num_classes]``."""

    score = "top1"
    train_score = "top1"

    def __init__(self, model: nn.Module, config: TrainConfig, steps_per_epoch: int) -> None:
        super().__init__(model, config, steps_per_epoch)
        self.mixing = make_mixing(config.mixup, config.cutmix)
        self.validation = EpochMeans()

    def mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The batch with mixup or cutmix, where the options ask for it."""
        if self.mixing is None:
            return images, targets
        assert isinstance(self.model.num_classes, int)
        return self.mixing(images, F.one_hot(targets, self.model.num_classes).float())

    def task_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy with label smoothing."""
        return F.cross_entropy(logits, targets, label_smoothing=self.config.label_smoothing)

    def right(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Top-1 accuracy; of a mixed image the class with the largest share counts."""
        targets = targets if targets.ndim == 1 else targets.argmax(1)
        return (logits.argmax(1) == targets).float().mean()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Unsmoothed cross-entropy, top-1 and, from five classes on, top-5, with the averaged weights."""
        images, labels = batch
        logits = self.validate(images)
        classes = logits.shape[1]
        accuracy = partial(multiclass_accuracy, logits, labels, num_classes=classes, average="micro")
        values = {"val/loss": F.cross_entropy(logits, labels), "val/top1": accuracy(top_k=1)}
        if classes >= TOP_K:
            values["val/top5"] = accuracy(top_k=TOP_K)
        self.validation.update(values, len(labels))

    def on_validation_epoch_end(self) -> None:
        """Logs the means over the split."""
        self.log_dict(self.validation.compute())
        self.validation.reset()


class SegmentationTask(TrainingTask):
    """Logits ``[B, num_classes, H, W]``, class numbers ``[B, H, W]``; pixels of ``pcenet.data.IGNORE`` do not count.

    Args:
        class_weights: ``[num_classes]``, weight of each class in the loss; None: all equal.
    """

    score = "miou"
    train_score = "pixel_accuracy"

    def __init__(
        self, model: nn.Module, config: TrainConfig, steps_per_epoch: int, class_weights: Tensor | None = None
    ) -> None:
        super().__init__(model, config, steps_per_epoch)
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.class_weights: Tensor | None
        self.pixels: PixelScores | None = None
        self.pasting = make_pasting(config.cutmix)

    def mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The batch with cutmix, where the options ask for it."""
        return (images, targets) if self.pasting is None else self.pasting(images, targets)

    def task_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
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
            label_smoothing=self.config.label_smoothing,
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

    def validation_step(self, batch: PixelBatches, batch_idx: int) -> None:
        """Counts pixels at the size of the masks, with the averaged weights."""
        for images, masks in batch:
            logits = self.validate(images)
            if self.pixels is None:
                self.pixels = PixelScores(logits.shape[1], self.device)
            self.pixels.update(logits, masks)

    def on_validation_epoch_end(self) -> None:
        """Logs loss, mIoU and pixel accuracy of the whole split."""
        assert self.pixels is not None
        scores = self.pixels.compute()
        self.pixels = None
        self.log_dict({"val/loss": scores.loss, "val/miou": scores.miou, "val/pixel_accuracy": scores.pixel_accuracy})
