"""NaN and infinity: training stops, or leaves the step out, before they reach the weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pcenet.runtime.distributed import gather, largest, own_rank
from pcenet.runtime.launcher import OtherProcessError
from pcenet.training.engine import local_part
from pcenet.training.figures import Seen

log = logging.getLogger(__name__)

NAMED = 5  # files and parameters that a message names
NUMBERED = 20  # images of which it gives the numbers


@torch.no_grad()
def is_finite(seen: Sequence[Seen], norm: Tensor | None = None) -> bool:
    """Whether input, router logits, loss and gradient of a step are finite in all processes.

    They are looked at together, so that there is one transfer to the host in a step, after its backward pass.

    Args:
        seen: the batches of the step.
        norm: of the gradient, where that is to be looked at.
    """
    parts = [part for batch in seen for part in parts_of(batch)]
    if norm is not None:
        parts.append((norm.full_tensor() if isinstance(norm, DTensor) else norm).float())
    return not any(largest([not torch.stack(parts).isfinite().all()]))  # all processes take the step, or none


def leave_out(found: str, skipped: int, limit: int) -> int:
    """Say that a step is left out, or that there were too many; returns how many now are in a row.

    Args:
        found: what is not finite, as `first_cause` says it.
        skipped: steps before it that were left out, in a row.
        limit: how many may be.

    Raises:
        ValueError: beyond the limit; in all processes but the first an `OtherProcessError`.
    """
    if skipped < limit:
        log.warning("%s; the step is left out (%d of at most %d in a row)", found, skipped + 1, limit)
        return skipped + 1
    if own_rank():
        raise OtherProcessError(found)
    row = f" and {limit} steps in a row were left out" if limit else ""
    raise ValueError(
        f"{found}{row}; the weights are those of before, and so are the checkpoints. Look at these images,"
        " lower --lr, or leave out such steps with --skip-nonfinite"
    )


def parts_of(seen: Seen) -> Iterator[Tensor]:
    """Scalars of one batch that are finite where everything is."""
    yield torch.where(seen.finite_images.all(), 0.0, torch.nan)
    yield seen.values["loss"].float()
    for routings in seen.records.values():
        yield from (routing.logits.abs().amax().float() for routing in routings)  # not the sum, which may overflow


def first_cause(seen: Sequence[Seen], model: nn.Module, loader: Any, epoch: int) -> str:
    """What is not finite in a step, the earliest cause first, with the batch and the images that it came with.

    The process that knows most says it: gradients that are not finite reach all, their cause is in one.

    Args:
        seen: the batches of the step.
        model: the network, with its gradients.
        loader: of the training images.
        epoch: the one at work, from 0.
    """
    found = gather(explain(seen, model, loader, epoch))
    rank, (_, text) = max(enumerate(found), key=lambda item: item[1][0])
    return text if len(found) == 1 else f"process {rank}, {text}"


def explain(seen: Sequence[Seen], model: nn.Module, loader: Any, epoch: int) -> tuple[int, str]:
    """What this process knows of it; before it, how much that says: 2 for a cause, 1 for parameters, 0 for neither."""
    for batch in seen:
        cause, rows = cause_of(batch)
        if cause:
            return 2, f"{place(batch, epoch)}: {cause}, {images_of(batch, loader, epoch, rows)}"
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    names = [name for name, gradient in gradients.items() if not local_part(gradient).isfinite().all()]
    named = ", ".join(names[:NAMED]) or "as a whole: its norm overflows"
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    last = seen[-1]
    text = f"{place(last, epoch)}: the gradient is not finite ({named}{more}), {images_of(last, loader, epoch)}"
    return int(bool(names)), text


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


def place(seen: Seen, epoch: int) -> str:
    """Epoch and batch, counted from 1."""
    return f"epoch {epoch + 1}, batch {seen.batch + 1}"


def images_of(seen: Seen, loader: Any, epoch: int, rows: Tensor | None = None) -> str:
    """The numbers of images of a batch in the data set, and the files of the first.

    Args:
        seen: the batch.
        loader: where it came from.
        epoch: and when, from 0.
        rows: ``[B]``, which of its images; None: all.
    """
    start = seen.batch * loader.batch_size
    order = islice(loader.sampler.order(epoch), start, start + seen.images)
    named = [True] * seen.images if rows is None else rows.tolist()
    chosen = [index for index, name in zip(order, named, strict=True) if name]
    numbers = ", ".join(map(str, chosen[:NUMBERED])) + (", ..." if len(chosen) > NUMBERED else "")
    files = ", ".join(map(loader.dataset.source.file_name, chosen[:NAMED])) + (", ..." if len(chosen) > NAMED else "")
    return f"images {numbers} ({files})"
