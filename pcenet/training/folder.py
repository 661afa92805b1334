"""The run folder: what lies where, how files are written, and when a run may start or continue in it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from pcenet.training.config import TrainConfig

SAFE_TO_CHANGE = {"out", "resume", "log", "device", "workers", "threads"}


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file or folder beside ``path``, then give it that name in one step.

    ``path`` is complete or absent at any moment; a folder that was there is replaced.
    """
    temporary = path.with_name(path.name + ".tmp")
    if temporary.is_dir():
        shutil.rmtree(temporary)
    write(temporary)
    if path.is_dir():
        shutil.rmtree(path)
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON, atomically. NaN and infinity are errors: JSON has neither."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def check_same(saved: TrainConfig, config: TrainConfig, where: str, way_out: str) -> None:
    """Raise a ``ValueError`` that names what differs, unless ``config`` may continue a run started with ``saved``.

    Args:
        saved: the options that the run was started with.
        config: those of now.
        where: the run folder or checkpoint that holds ``saved``.
        way_out: what the user can do instead.
    """
    changed = [
        f"{item.name} {getattr(saved, item.name)!r} -> {getattr(config, item.name)!r}"
        for item in fields(config)
        if item.name not in SAFE_TO_CHANGE and getattr(saved, item.name) != getattr(config, item.name)
    ]
    if changed:
        raise ValueError(f"resume: {where} was started with other options ({', '.join(changed)}); {way_out}")


def saved_config(values: Any, where: str) -> TrainConfig:
    """The options that a run saved.

    Args:
        values: option to value, as they were read.
        where: the file that holds them.

    Raises:
        ValueError: if they are no such mapping, or of another version of pcenet: an option or value that there is not.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where} is damaged: it holds no options; train anew in another --out")
    unknown = [name for name in values if name not in {item.name for item in fields(TrainConfig)}]
    way_out = "use the version that made it, or train anew in another --out"
    if unknown:
        raise ValueError(f"{where} is of another version of pcenet: unknown option {unknown[0]!r}; {way_out}")
    try:
        return TrainConfig(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} is damaged or of another version of pcenet: {error}; {way_out}") from error


class RunFolder:
    """Paths of a run folder and the rules for entering it.

    Args:
        path: the folder; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.environment = path / "environment.json"
        self.logs = path / "logs"
        self.checkpoints = path / "checkpoints"
        self.last = self.checkpoints / "last.ckpt"
        self.best = self.checkpoints / "best.ckpt"
        self.metrics = path / "metrics.json"
        self.model = path / "model"
        self.pictures = path / "pictures"

    @property
    def finished(self) -> bool:
        """Whether training came to its end here: ``metrics.json`` is the last file that is written."""
        return self.metrics.is_file() and self.model.is_dir()

    @property
    def free(self) -> bool:
        """Whether there is nothing here that a new run would overwrite."""
        return not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir()))

    def enter(self, config: TrainConfig) -> Path | None:
        """The checkpoint from which a run with these options starts in this folder; None to start afresh.

        Raises:
            ValueError: if that would overwrite a run, or continue one that was started with other options.
            FileNotFoundError: if ``config.resume`` names a checkpoint that does not exist.
        """
        if config.resume not in (None, "auto"):
            return self._enter_from(Path(config.resume), config)
        if self.free:
            return None
        if config.resume is None:
            raise ValueError(
                f"out: {self.path} exists and is never overwritten; continue it with --resume auto, "
                "or choose another folder with --out"
            )
        if not self.config.is_file():
            raise ValueError(f"out: {self.path} exists and is no run folder; choose another folder with --out")
        self._check_same(config)
        return self.last if self.last.is_file() else None

    def _enter_from(self, checkpoint: Path, config: TrainConfig) -> Path:
        if not checkpoint.is_file():
            raise FileNotFoundError(f"resume: there is no checkpoint {checkpoint}; give auto or the path of one")
        if checkpoint.resolve() == self.last.resolve():
            self._check_same(config)
            return self.last
        if not self.free:
            raise ValueError(
                f"out: {self.path} exists and is never overwritten; a run continues in its folder from"
                f" {self.last.name} alone (--resume auto), so to continue from {checkpoint} choose another folder"
                " with --out"
            )
        return checkpoint

    def _check_same(self, config: TrainConfig) -> None:
        way_out = f"continue it with --config {self.config} --resume auto, or choose another folder with --out"
        check_same(self.read_config(), config, str(self.path), way_out)

    def read_config(self) -> TrainConfig:
        """The options that the run was started with.

        Raises:
            ValueError: if ``config.yaml`` is not what `create` writes.
        """
        try:
            values = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.config} is damaged: {error}; train anew in another --out") from error
        return saved_config(values, str(self.config))

    def create(self, config: TrainConfig, environment: dict[str, Any]) -> None:
        """Make the folder, with ``config.yaml`` (which ``pcenet train --config`` reads) and ``environment.json``."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.logs.mkdir(exist_ok=True)
        write_text(self.config, yaml.safe_dump(asdict(config) | {"resume": None}, sort_keys=False))
        write_json(self.environment, environment)
