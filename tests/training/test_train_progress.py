"""The bar of a run."""

from __future__ import annotations

import torch

from pcenet.training.progress import RunBar


def test_a_bar_counts_the_whole_run_and_names_the_epoch_as_the_lines_do() -> None:
    bar = RunBar(3, shown=True)
    bar.start(1, batches=10, done=4)  # an epoch that goes on
    (task,) = bar.progress.tasks
    assert (task.completed, task.total, task.description) == (14, 30, "epoch 2/3, batch 4/10")
    bar.advance(2, torch.tensor(0.5))
    assert (task.completed, task.description, task.fields["loss"]) == (16, "epoch 2/3, batch 6/10", 0.5)


def test_where_nothing_is_shown_no_loss_is_read() -> None:
    class Unread:
        def __float__(self) -> float:
            raise AssertionError("it was read")

    RunBar(3, shown=False).advance(1, Unread())  # type: ignore[arg-type] # no tensor, so that reading it fails
