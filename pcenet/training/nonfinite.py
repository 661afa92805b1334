"""NaN and infinity: training stops, or leaves the step out, before they reach the weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.distributed.tensor import DTensor
from typing_extensions import override

from pcenet.runtime.distributed import gather, largest, own_rank
from pcenet.runtime.launcher import OtherProcessError
from pcenet.training.module import Seen, TrainingModule
from pcenet.training.strategies import local_part

log = logging.getLogger(__name__)

NAMED = 5  # files and parameters that a message names
NUMBERED = 20  # images of which it gives the numbers


class FiniteSteps(Callback):
    """Looks at input, router logits, loss and gradient of every step before the optimiser does.

    They are looked at together, so that there is one transfer to the host in a step, after its backward pass.

    Args:
        limit: steps in a row that may be left out; at 0 the first that is not finite ends training.

    Attributes:
        skipped: steps in a row that were left out last.
        left_out: the last of all that were, counted from 0; None before.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.skipped = 0
        self.left_out: int | None = None
        self._buffers: list[Tensor] = []

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        if self.limit and not pl_module.seen:  # a forward pass writes what it sees into running statistics
            self._buffers = [buffer.clone() for buffer in pl_module.buffers()]

    @override
    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Raise a ``ValueError`` that names step, cause and images; or take the step back, with a warning."""
        assert isinstance(pl_module, TrainingModule)
        gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        parts = [part for seen in pl_module.seen for part in parts_of(seen)]
        norm = torch.nn.utils.get_total_norm(gradients).float()
        parts.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        finite = bool(torch.stack(parts).isfinite().all())
        if not any(largest([not finite])):  # all processes take the step, or none
            self.skipped = 0
            return
        found = f"step {trainer.global_step + 1}, {first_cause(trainer, pl_module)}"
        if self.skipped >= self.limit:
            row = f" and {self.limit} steps in a row were left out" if self.limit else ""
            if own_rank():
                raise OtherProcessError(found)
            raise ValueError(
                f"{found}{row}; the weights are those of before, and so are the checkpoints. Look at these images,"
                " lower --lr, or leave out such steps with --skip-nonfinite"
            )
        self.skipped += 1
        self.left_out = trainer.global_step
        log.warning("%s; the step is left out (%d of at most %d in a row)", found, self.skipped, self.limit)
        optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(pl_module.buffers(), self._buffers, strict=True):
            buffer.copy_(before)
        pl_module.seen.clear()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "left_out": self.left_out}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self.left_out = state_dict["skipped"], state_dict["left_out"]


def parts_of(seen: Seen) -> Iterator[Tensor]:
    """Scalars of one batch that are finite where everything is."""
    yield torch.where(seen.finite_images.all(), 0.0, torch.nan)
    yield seen.values["loss"].float()
    for routings in seen.records.values():
        yield from (routing.logits.abs().amax().float() for routing in routings)  # not the sum, which may overflow


def first_cause(trainer: L.Trainer, task: TrainingModule) -> str:
    """`explain` by the process that knows most: gradients that are not finite reach all, their cause is in one."""
    found = gather(explain(trainer, task))
    rank, (_, text) = max(enumerate(found), key=lambda item: item[1][0])
    return text if len(found) == 1 else f"process {rank}, {text}"


def explain(trainer: L.Trainer, task: TrainingModule) -> tuple[int, str]:
    """What is not finite, the earliest cause first, with the batch and the images that it came with; before it, how
    much that says: 2 for a cause, 1 for parameters, 0 for neither."""
    for seen in task.seen:
        cause, rows = cause_of(seen)
        if cause:
            return 2, f"{place(trainer, seen)}: {cause}, {images_of(trainer, seen, rows)}"
    gradients = {name: parameter.grad for name, parameter in task.named_parameters() if parameter.grad is not None}
    names = [name for name, gradient in gradients.items() if not local_part(gradient).isfinite().all()]
    named = ", ".join(name.removeprefix("model.") for name in names[:NAMED]) or "as a whole: its norm overflows"
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    last = task.seen[-1]
    return int(
        bool(names)
    ), f"{place(trainer, last)}: the gradient is not finite ({named}{more}), {images_of(trainer, last)}"


def cause_of(seen: Seen) -> tuple[str | None, Tensor | None]:
    """What of one batch is not finite, if anything, and the rows ``[B]`` in which, where it is known."""
    if not seen.finite_images.all():
        return "the input is not finite", ~seen.finite_images
    for layer, routings in seen.records.items():
        for routing in routings:
            wrong = ~routing.logits.isfinite().all(1).view(routing.grid.batch, -1).all(1)
            if wrong.any():
                return f"the router logits of layer {layer} are not finite", wrong
    return ("the loss is not finite", None) if not seen.values["loss"].isfinite() else (None, None)


def place(trainer: L.Trainer, seen: Seen) -> str:
    """Epoch and batch, counted from 1."""
    return f"epoch {trainer.current_epoch + 1}, batch {seen.batch + 1}"


def images_of(trainer: L.Trainer, seen: Seen, rows: Tensor | None = None) -> str:
    """The numbers of images of a batch in the data set, and the files of the first.

    Args:
        trainer: at work on the epoch of the batch.
        seen: the batch.
        rows: ``[B]``, which of its images; None: all.
    """
    loader: Any = trainer.train_dataloader
    start = seen.batch * loader.batch_size
    order = islice(loader.sampler.order(trainer.current_epoch), start, start + seen.images)
    named = [True] * seen.images if rows is None else rows.tolist()
    chosen = [index for index, name in zip(order, named, strict=True) if name]
    numbers = ", ".join(map(str, chosen[:NUMBERED])) + (", ..." if len(chosen) > NUMBERED else "")
    files = ", ".join(map(loader.dataset.source.file_name, chosen[:NAMED])) + (", ..." if len(chosen) > NAMED else "")
    return f"images {numbers} ({files})"
