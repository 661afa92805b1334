"""Lightning callbacks: averaged weights, throughput, figures of an epoch, router health, the history of a run."""

from __future__ import annotations

import csv
import io
import logging
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, RichProgressBar, WeightAveraging
from torch import Tensor
from typing_extensions import override

from pcenet.nn import update_expert_bias
from pcenet.reporting.numbers import score_digits
from pcenet.runs.health import EVALUATED, TRAINED, bias_spreads, columns_of
from pcenet.runtime.distributed import over_processes, share_statistics
from pcenet.texts import say
from pcenet.training.module import TrainingModule
from pcenet.training.nonfinite import FiniteSteps
from pcenet.training.strategies import Sharded, gather_weights, local_part, release_weights
from pcenet.writing import write_text

log = logging.getLogger(__name__)


@torch.no_grad()
def update_average(averaged: list[Tensor], current: list[Tensor], count: Tensor | int, decay: float) -> None:
    """One update in place of an exponential moving average; integers, such as counters, are taken over.

    Args:
        averaged: the averages so far, all of one type.
        current: what enters them, in the same order.
        count: updates so far, n. The decay is ``min(decay, (1 + n) / (10 + n))``, so that a short run does
            not end on its initial weights. Read once: on a GPU each reading waits for the device.
        decay: the average's weight in the long run.
    """
    if averaged[0].is_floating_point():
        n = int(count)
        averaged, current = ([local_part(tensor) for tensor in tensors] for tensors in (averaged, current))
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (10 + n)))
    else:
        torch._foreach_copy_(averaged, current)


class Averaging(WeightAveraging):
    """Lightning's weight averaging, with `update_average` for parameters and buffers, after every step.

    Validation and the checkpoints' ``state_dict`` use the averaged weights. Where the weights are divided between
    processes, so are their averages.

    Args:
        decay: of the average.
        finite: knows which step was left out, so that it leaves no trace in the average either.
    """

    def __init__(self, decay: float, finite: FiniteSteps) -> None:
        super().__init__(multi_avg_fn=partial(update_average, decay=decay))
        self.finite = finite

    @override
    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None and step_idx != self.finite.left_out

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if isinstance(trainer.strategy, Sharded):
            assert self._average_model is not None
            trainer.strategy.divide(self._average_model.module)

    @override
    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """All processes validate the network that the checkpoint will have."""
        super().on_validation_epoch_start(trainer, pl_module)
        share_statistics(pl_module)
        gather_weights(pl_module)

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        release_weights(pl_module)
        super().on_validation_epoch_end(trainer, pl_module)


class ExpertBiases(Callback):
    """Finds the routers' biases anew for the averaged weights, before each validation; see `update_expert_bias`.

    It follows `Averaging`, which puts these weights in place. All processes see the same images, and find the same.

    Args:
        images: gives batches of training images, prepared as for evaluation, the same ones each time.
    """

    def __init__(self, images: Callable[[], Iterable[Tensor]]) -> None:
        self.images = images

    @override
    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        batches = (images.to(pl_module.device) for images in self.images())
        with trainer.precision_plugin.forward_context():
            update_expert_bias(batches, pl_module)


class Throughput(Callback):
    """Logs images per second, loading included, of all processes, and the seconds of the training part of each epoch.

    Where an epoch was interrupted, what lies between the checkpoint and its going on does not count.
    """

    def __init__(self) -> None:
        self.images = 0
        self.seconds = 0.0

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start = time.perf_counter() - self.seconds

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.images = 0
        self.start = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.images += len(batch[0])
        # Validation comes next and does not count.
        if (trainer.is_last_batch or trainer.should_stop) and pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self.seconds = time.perf_counter() - self.start

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.log("train/epoch_seconds", self.seconds)
        pl_module.log("train/images_per_second", trainer.world_size * self.images / self.seconds)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"images": self.images, "seconds": self.seconds}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.images, self.seconds = state_dict["images"], state_dict["seconds"]


class EpochFigures(Callback):
    """Logs the means of the training figures over each epoch."""

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        means = pl_module.means.compute()
        pl_module.log_dict(
            {name if name.startswith(TRAINED) else f"train/{name}": mean for name, mean in means.items()}
        )
        pl_module.means.reset()


class RouterHealth(Callback):
    """Logs, once per epoch, the health of each PCE layer in the validation, and what its routing in training tells."""

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        for name, statistics in pl_module.val_routing.items():
            columns = columns_of(over_processes(statistics).compute())
            pl_module.log_dict({f"{EVALUATED}/{name}/{key}": value for key, value in columns.items()})
        pl_module.val_routing.clear()

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        for name, statistics in pl_module.routing.items():
            pl_module.log(f"{TRAINED}/{name}/drop_rate", over_processes(statistics).compute().drop_rate)
            statistics.reset()
        spreads = bias_spreads(pl_module.model)
        pl_module.log_dict({f"{TRAINED}/{name}/bias_spread": spread for name, spread in spreads.items()})


class History(Callback):
    """One row of figures per epoch: printed, written to ``logs/metrics.csv``, and kept in checkpoints.

    Keeping the rows in the checkpoint makes the file of a resumed run whole: every epoch once, none lost.

    Args:
        path: the CSV file.
        images: how many there are in training and in validation.
    """

    def __init__(self, path: Path, images: tuple[int, int]) -> None:
        self.path = path
        self.images = images
        self.rows: list[dict[str, float]] = []

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        kinds = ("train/", "val/", f"{TRAINED}/", f"{EVALUATED}/")
        values = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(kinds)}
        row = {"epoch": trainer.current_epoch + 1, "step": trainer.global_step, **values}
        self.rows.append(row)
        if not trainer.is_global_zero:
            return
        self._write()
        assert isinstance(pl_module, TrainingModule)
        say(
            epoch_line(
                row, trainer.max_epochs or 0, pl_module.objective.train_score, pl_module.objective.score, self.images
            )
        )

    def _write(self) -> None:
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.path, text.getvalue())

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = state_dict["rows"]


def epoch_line(row: dict[str, float], epochs: int, train_score: str, score: str, images: tuple[int, int]) -> str:
    """What a user reads while training runs.

    Args:
        row: the figures of the epoch.
        epochs: how many there will be.
        train_score: the name of the score in training, see `TrainingModule`.
        score: that in validation.
        images: how many there are in training and in validation.
    """
    train_digits, val_digits = map(score_digits, images)
    dead = sum(value for name, value in row.items() if name.startswith(f"{EVALUATED}/") and name.endswith("/dead"))
    parts = (
        f"epoch {row['epoch']:.0f}/{epochs}",
        f"loss {row['train/loss']:.4f} (task {row['train/task_loss']:.4f}, "
        f"balance {row['train/balance_loss']:.4f}, z {row['train/z_loss']:.4f})",
        f"train {row[f'train/{train_score}']:.{train_digits}%}",
        f"val {row[f'val/{score}']:.{val_digits}%}",
        *([f"{dead:.0f} dead expert{'s' * (dead > 1)} on val"] if dead else []),
        f"lr {row['train/lr']:.2e}",
        f"{row['train/images_per_second']:.0f} images/s",
        f"{row['train/epoch_seconds']:.1f} s",
    )
    return "  ".join(parts)


class TrainingBar(RichProgressBar):
    """Lightning's bar without the logger's version number."""

    @override
    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return dict(items)
