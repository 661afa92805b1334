"""Reading what finished runs left: a run folder, or what is kept of one.

Needed are ``config.yaml``, ``metrics.json``, ``environment.json`` and ``logs/metrics.csv``, or ``metrics.csv`` in the
folder itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pcenet.runs.config import TrainConfig
from pcenet.runs.folder import RunFolder
from pcenet.runs.records import ENVIRONMENT, Row, metrics_of, read_record, read_rows
from pcenet.tasks import get_task


@dataclass(frozen=True)
class Result:
    """What a finished run left.

    Attributes:
        config: the run's options.
        environment: versions and hardware.
        metrics: the content of ``metrics.json``.
        rows: figures of each epoch, as in ``metrics.csv``; None where a figure was no finite number.
        score: the figure of merit of the finished network on ``val``.
    """

    config: TrainConfig
    environment: dict[str, Any]
    metrics: dict[str, Any]
    rows: tuple[Row, ...]
    score: float

    def curve(self) -> list[Row]:
        """Scores and losses of each epoch: ``epoch``, ``train_score``, ``val_score``, ``train_loss``, ``val_loss``."""
        objective = get_task(self.config.task).objective
        names = {
            "epoch": "epoch",
            "train_score": f"train/{objective.train_score}",
            "val_score": f"val/{objective.score}",
            "train_loss": "train/task_loss",
            "val_loss": "val/loss",
        }
        return [{ours: row[theirs] for ours, theirs in names.items()} for row in self.rows]


def finished(folder: Path) -> bool:
    """Whether there is the result of a run: ``metrics.json`` is the last file that it writes."""
    return (folder / "metrics.json").is_file()


def rows_file(folder: Path) -> Path:
    """Where the figures of each epoch are, or would be."""
    logged = RunFolder(folder).logs / "metrics.csv"
    return logged if logged.is_file() else folder / "metrics.csv"


def read_result(folder: Path) -> Result:
    """What a finished run left in its folder.

    Raises:
        ValueError: if a file is damaged.
        FileNotFoundError: if one is missing.
    """
    config = RunFolder(folder).read_config()
    score = get_task(config.task).objective.score
    try:
        metrics = read_record(folder / "metrics.json", metrics_of(score))
        environment = read_record(folder / "environment.json", ENVIRONMENT)
        result = Result(config, environment, metrics, read_rows(rows_file(folder)), metrics["val"][score])
        result.curve()
    except (KeyError, ValueError) as error:
        way_out = "restore it, or remove the folder to train anew"
        raise ValueError(f"{folder}: its figures are damaged ({error}); {way_out}") from error
    return result


def read_results(folder: Path) -> dict[str, Result]:
    """The finished runs among the folders ``LABEL-SEED`` in ``folder``, by the names of their folders.

    Raises:
        ValueError: if a file of theirs is damaged.
    """
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return {path.name: read_result(path) for path in paths if re.search(r"-\d+$", path.name) and finished(path)}
