"""What a run leaves beside its network, read again: by comparisons, model cards, and the next evaluation."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

from pcenet.runs.health import EVALUATED, TRAINED
from pcenet.runs.schemas import (
    ANYTHING,
    BOOLEAN,
    COUNT,
    NUMBER,
    TEXT,
    Each,
    Maybe,
    Rule,
    Schema,
    or_none,
    read_json,
    read_text,
)

Row = dict[str, float | None]

ENVIRONMENT: Schema = {
    **dict.fromkeys(("pcenet", "python", "processor", "device", "precision"), TEXT),
    "threads": COUNT,
    "versions": Each(TEXT),
}
# Of versions that counted in training, whose ``dead`` was a list.
BEFORE: dict[str, Any] = {"load": [NUMBER], "entropy": NUMBER, "max_min": or_none(NUMBER), "drop_rate": NUMBER}
HEALTH = {**BEFORE, "dead": COUNT, "dead_experts": [COUNT]}


FINGERPRINT = Each(  # see pcenet.runs.fingerprint
    Rule(
        "a number of images and a digest",
        lambda value: isinstance(value, list) and len(value) == 2 and COUNT.holds(value[0]) and TEXT.holds(value[1]),
    )
)


def metrics_of(score: str) -> dict[str, Any]:
    """What ``metrics.json`` has to hold, of a run with this figure of merit."""
    return {
        "task": Maybe(TEXT),  # and data: versions before 0.1 did not write them
        "data": Maybe(TEXT),
        "fingerprint": Maybe(FINGERPRINT),
        "model": Maybe(TEXT),
        "epochs": COUNT,
        "weights_of_epoch": Maybe(COUNT),
        "val": {"images": COUNT, score: NUMBER},
        "best": {"epoch": COUNT, score: NUMBER},
        "epoch_seconds": NUMBER,
        "complexity": dict.fromkeys(("parameters", "active_parameters", "multiply_adds"), NUMBER),
        EVALUATED: Maybe(Each(HEALTH)),
        TRAINED: Maybe(Each({"drop_rate": Maybe(NUMBER)})),
        "router": Maybe(Each(BEFORE)),
    }


def evaluation_of(score: str) -> Schema:
    """What a file of ``pcenet eval`` has to hold, of a network with this figure of merit."""
    texts = dict.fromkeys(("source", "data", "split"), TEXT)
    return {
        **texts,
        "tta": Maybe(BOOLEAN),
        "fingerprint": Maybe(FINGERPRINT),
        "images": COUNT,
        score: NUMBER,
        "router": Each(BEFORE),
    }


def read_record(path: Path, schema: Schema = ANYTHING) -> Any:
    """What a JSON file of a run holds.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is no such file, or does not follow the schema; names it.
    """
    try:
        return read_json(path, schema)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error


def fingerprint_of(path: Path) -> dict[str, list[Any]]:
    """By what a finished run knows its data again, from ``metrics.json``; empty where it did not note it, or the file
    cannot be read, which is for those to say who need its figures."""
    try:
        return dict(read_record(path, {"fingerprint": Maybe(FINGERPRINT)}).get("fingerprint", {}))
    except (ValueError, OSError):
        return {}


def read_rows(path: Path) -> tuple[Row, ...]:
    """The figures of each epoch, from ``metrics.csv``; None for what is no finite number, which JSON has not.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is no such file; names it.
    """
    try:
        rows = [
            {name: number(text) for name, text in row.items()} for row in csv.DictReader(io.StringIO(read_text(path)))
        ]
    except (ValueError, TypeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if any(row.get("epoch") is None for row in rows):
        raise ValueError(f"{path} cannot be used: a row has no epoch")
    return tuple(rows)


def number(text: str | None) -> float | None:
    """A finite number, else None."""
    value = float(text or "nan")
    return value if math.isfinite(value) else None
