"""The LightningModule that trains networks, and its parameter groups."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from lightning_utilities.core.apply_func import apply_to_collection
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from pcenet.nn import Routing, RoutingStatistics, aux_terms, record_routing
from pcenet.nn.experts import SharedConv2d
from pcenet.nn.processes import process_count
from pcenet.runs.config import TrainConfig
from pcenet.runs.health import TRAINED, count_routings, logit_spread
from pcenet.runtime.distributed import gather, own_rank, share_statistics
from pcenet.tasks import Objective
from pcenet.tasks.means import EpochMeans
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
        gates=routing.gates.detach(),
    )


def add_counts(statistics: RoutingStatistics, counts: Mapping[str, Tensor | None]) -> None:
    """Add the counts of another object's state to router statistics."""
    total = dict(counts)
    for name, own in statistics.state_dict().items():
        count = counts[name]
        total[name] = count if own is None or count is None else own + count
    statistics.load_state_dict(total)


class TrainingModule(L.LightningModule):
    """Trains a network with the loss of its task and, where it has PCE layers, their auxiliary losses.

    Args:
        model: images ``[B, 3, H, W]`` to logits.
        objective: the task's.
        config: the options.
        steps_per_epoch: steps of the optimiser in one pass over the training images.

    Attributes:
        seen: batches that the optimiser has not used yet; it, or whoever leaves them out, clears them.
        means: the means of the figures over the batches that it has used, since somebody reset them.
        routing: what happened in each PCE layer with these.
        val_routing: what happened in each PCE layer in the validation that is at work.
    """

    def __init__(self, model: nn.Module, objective: Objective, config: TrainConfig, steps_per_epoch: int) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.config = config
        self.schedules = Schedules(config, steps_per_epoch)
        self.seen: list[Seen] = []
        self.means = EpochMeans()
        self.routing: defaultdict[str, RoutingStatistics] = defaultdict(RoutingStatistics)
        self.val_routing: defaultdict[str, RoutingStatistics] = defaultdict(RoutingStatistics)
        self.train()

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

    def forward_and_count(self, images: Tensor) -> Tensor:
        """The logits of validation images; their routing, that of the network as it will be used, is counted."""
        with record_routing(self.model) as records:
            logits: Tensor = self(images)
        count_routings(self.val_routing, records)
        return logits

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Counts a batch, with the averaged weights."""
        self.objective.validate(self.forward_and_count, batch)

    def on_validation_epoch_end(self) -> None:
        """Logs the figures of the whole split."""
        self.log_dict(dict(self.objective.scores()))

    def batch_number(self, batch_idx: int) -> int:
        """A number for each batch of the run; the optimiser's step where every batch makes one."""
        return self.current_epoch * self.schedules.steps_per_epoch * self.config.accumulate + batch_idx

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Task loss plus auxiliary losses; `seen` takes notes, without a transfer to the host."""
        images, targets = batch
        finite_images = images.isfinite().flatten(1).all(1)
        share_statistics(self)
        torch.manual_seed(step_seed(self.config.seed, self.batch_number(batch_idx), own_rank()))
        images, targets = self.objective.mix(images, targets)
        with record_routing(self.model) as records:
            logits = self(images)
        task = self.objective.loss(logits, targets)
        balance, z = aux_terms(records, synchronised=process_count() > 1)
        # A term of weight 0 is left out, not multiplied: it may be infinite.
        weights = (self.schedules.balance(self.global_step), self.config.z)
        weighted = [w * term for w, term in zip(weights, (balance, z), strict=True) if w]
        loss = sum(weighted, task)
        losses = {"loss": loss, "task_loss": task, "balance_loss": balance, "z_loss": z}
        values = losses | {self.objective.train_score: self.objective.right(logits, targets)}
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
