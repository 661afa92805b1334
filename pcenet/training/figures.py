"""What is noted of each batch, and the figures of an epoch."""

from __future__ import annotations

import csv
import io
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from pcenet.nn import Routing, RoutingStatistics
from pcenet.nn.processes import process_count
from pcenet.reporting.numbers import score_digits
from pcenet.runs.health import EVALUATED, TRAINED, bias_spreads, columns_of, count_routings
from pcenet.runtime.distributed import gather, over_processes, own_rank
from pcenet.tasks.means import EpochMeans
from pcenet.writing import write_text

Row = dict[str, float]  # the figures of an epoch by name, as in ``metrics.csv``


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
    values: Mapping[str, Tensor]
    records: Mapping[str, Sequence[Routing]]


def without_gradient(routing: Routing) -> Routing:
    """A Routing that keeps no graph alive."""
    return replace(
        routing,
        logits=routing.logits.detach(),
        probs=routing.probs.detach(),
        gates=routing.gates.detach(),
    )


class EpochFigures:
    """The figures of an epoch's training so far, those of this process; they survive an interruption."""

    def __init__(self) -> None:
        self.means = EpochMeans()
        self.routing: defaultdict[str, RoutingStatistics] = defaultdict(RoutingStatistics)

    def update(self, seen: Sequence[Seen]) -> None:
        """Add the batches of a step."""
        for batch in seen:
            self.means.update(batch.values, batch.images)
            count_routings(self.routing, batch.records)

    def compute(self, model: nn.Module) -> Row:
        """The figures of all processes, and how far the network's routers have to push."""
        means = {
            name if name.startswith(TRAINED) else f"train/{name}": float(mean)
            for name, mean in self.means.compute().items()
        }
        counted: defaultdict[str, RoutingStatistics] = defaultdict(RoutingStatistics)
        for state in gather({name: in_memory(counts.state_dict()) for name, counts in self.routing.items()}):
            for name, counts in state.items():  # one process may have seen nothing
                add_counts(counted[name], counts)
        dropped = {name: counts.compute().drop_rate for name, counts in counted.items()}
        return {
            **means,
            **{f"{TRAINED}/{name}/drop_rate": float(rate) for name, rate in dropped.items()},
            **{f"{TRAINED}/{name}/bias_spread": spread for name, spread in bias_spreads(model).items()},
        }

    def state_dict(self) -> list[dict[str, Any]]:
        """Everything, as a checkpoint keeps it: of each process, in their order."""
        routing = {name: statistics.state_dict() for name, statistics in self.routing.items()}
        return gather(in_memory({"means": self.means.state_dict(), "routing": routing}))

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Add them to none; where there are more or fewer processes than before, the first process has all."""
        for state in [states[own_rank()]] if len(states) == process_count() else states if own_rank() == 0 else []:
            self.means.add(state["means"])
            for name, counts in state["routing"].items():
                add_counts(self.routing[name], counts)


def in_memory(state: dict[str, Any]) -> dict[str, Any]:
    """A state with its tensors on the processor."""
    return dict(apply_to_collection(state, Tensor, Tensor.cpu))


def add_counts(statistics: RoutingStatistics, counts: Mapping[str, Tensor | None]) -> None:
    """Add the counts of another object's state to router statistics."""
    total = dict(counts)
    for name, own in statistics.state_dict().items():
        count = counts[name]
        total[name] = count if own is None or count is None else own + count
    statistics.load_state_dict(total)


def evaluation_routing(routing: Mapping[str, RoutingStatistics]) -> Row:
    """The health of each PCE layer in a validation of which each process had a part."""
    return {
        f"{EVALUATED}/{name}/{key}": float(value)
        for name, statistics in routing.items()
        for key, value in columns_of(over_processes(statistics).compute()).items()
    }


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write ``metrics.csv``: a row for each epoch."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def epoch_line(row: Row, epochs: int, train_score: str, score: str, images: tuple[int, int]) -> str:
    """What a user reads while training runs.

    Args:
        row: the figures of the epoch.
        epochs: how many there will be.
        train_score: the name of the score in training, see `pcenet.tasks.Objective`.
        score: that in validation.
        images: how many there are in training and in validation.
    """
    train_digits, val_digits = map(score_digits, images)
    dead = sum(value for name, value in row.items() if name.startswith(f"{EVALUATED}/") and name.endswith("/dead"))
    loss, task, balance, z, train = (  # none where all steps were left out
        row.get(f"train/{name}", math.nan) for name in ("loss", "task_loss", "balance_loss", "z_loss", train_score)
    )
    parts = (
        f"epoch {row['epoch']:.0f}/{epochs}",
        f"loss {loss:.4f} (task {task:.4f}, balance {balance:.4f}, z {z:.4f})",
        f"train {train:.{train_digits}%}",
        f"val {row[f'val/{score}']:.{val_digits}%}",
        *([f"{dead:.0f} dead expert{'s' * (dead > 1)} on val"] if dead else []),
        f"lr {row['train/lr']:.2e}",
        f"{row['train/images_per_second']:.0f} images/s",
        f"{row['train/epoch_seconds']:.1f} s",
    )
    return "  ".join(parts)
