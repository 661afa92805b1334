"""The run folder: what lies where, and when a run may start or continue in it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from pcenet.choices import without_removed
from pcenet.runs.config import TrainConfig
from pcenet.runs.locks import locked
from pcenet.runs.manifest import fault_of
from pcenet.writing import TEMPORARY, discard, remove, write_json, write_text
from pcenet.yaml_files import BoundedLoader, read_yaml, write_yaml

ELSEWHERE = {"out", "resume"}  # options that say where a run goes on, not what it is
SAFE_TO_CHANGE = ELSEWHERE | {
    *(
        "log",
        "device",
        "workers",
        "threads",
        "checkpoint_minutes",
        "skip_nonfinite",
        "strategy",
        "compile",
        "process_timeout",
    )
}
STEP = "step-"  # how the names of checkpoints begin

log = logging.getLogger(__name__)


def differences(saved: TrainConfig, config: TrainConfig, aside: set[str]) -> list[str]:
    """The options that differ, as "name old -> new", those named in ``aside`` left out."""
    return [
        f"{item.name} {getattr(saved, item.name)!r} -> {getattr(config, item.name)!r}"
        for item in fields(config)
        if item.name not in aside and getattr(saved, item.name) != getattr(config, item.name)
    ]


def images_per_step(config: TrainConfig) -> int:
    """Images of a batch, of all processes together."""
    return (config.batch_size or 0) * config.devices


def check_same(saved: TrainConfig, config: TrainConfig, where: str, way_out: str) -> None:
    """Raise a ``ValueError`` that names what differs, unless ``config`` may continue a run started with ``saved``.

    Args:
        saved: the options that the run was started with.
        config: those of now.
        where: the run folder or checkpoint that holds ``saved``.
        way_out: what the user can do instead.
    """
    aside = SAFE_TO_CHANGE | ({"devices", "batch_size"} if images_per_step(saved) == images_per_step(config) else set())
    changed = differences(saved, config, aside)
    if changed:
        if saved.devices != config.devices and "devices" not in aside:
            way_out = (
                f"batch_size times devices has to stay {images_per_step(saved)}, so that each step sees the images that"
                f" it would have seen; {way_out}"
            )
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
        of_layers = {
            name: without_removed(values[name], name)
            for name in ("model_args", "upcycle_args")
            if isinstance(values.get(name), dict)
        }
        return TrainConfig(**values | of_layers)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} is damaged or of another version of pcenet: {error}; {way_out}") from error


class RunFolder:
    """Paths of a run folder and the rules for entering it.

    Args:
        path: the folder; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = path / ".lock"
        self.config = path / "config.yaml"
        self.environment = path / "environment.json"
        self.logs = path / "logs"
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.json"
        self.model = path / "model"
        self.pictures = path / "pictures"

    @property
    def finished(self) -> bool:
        """Whether training came to its end here; ``metrics.json`` is the last file that is written."""
        return self.metrics.is_file() and self.model.is_dir()

    @property
    def free(self) -> bool:
        """Whether there is nothing here that a new run would overwrite."""
        return not self.path.exists() or (self.path.is_dir() and not set(self.path.iterdir()) - {self.lock})

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nobody else trains in this folder, which exists.

        Raises:
            ValueError: if another process does.
        """
        with locked(self.lock) as ours:
            if not ours:
                raise ValueError(f"out: another process is training in {self.path}; choose another folder with --out")
            yield

    @property
    def steps(self) -> list[Path]:
        """The checkpoints, intact or not, the newest last."""
        found = [path for path in self.checkpoints.glob(f"{STEP}*") if path.name.removeprefix(STEP).isdecimal()]
        return sorted(found, key=lambda path: int(path.name.removeprefix(STEP)))

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint after this many optimiser steps is."""
        return self.checkpoints / f"{STEP}{step:08d}"

    def enter(self, config: TrainConfig) -> list[Path]:
        """The checkpoints from which a run with these options may start in this folder, the first intact one of which
        counts (``pcenet.training.resume.first_intact``); empty to start afresh.

        Raises:
            ValueError: if that would overwrite a run, or continue one that was started with other options, or from
                a checkpoint that is damaged or not its newest.
            FileNotFoundError: if ``config.resume`` names a checkpoint that does not exist.
        """
        if config.resume not in (None, "auto"):
            return [self._enter_from(Path(config.resume), config)]
        if self.free:
            return []
        if config.resume is None:
            raise ValueError(
                f"out: {self.path} exists and is never overwritten; continue it with --resume auto, "
                "or choose another folder with --out"
            )
        if not self.config.is_file():
            raise ValueError(f"out: {self.path} exists and is no run folder; choose another folder with --out")
        self._check_same(config)
        return self.steps[::-1]

    def _enter_from(self, checkpoint: Path, config: TrainConfig) -> Path:
        if not checkpoint.exists():
            raise FileNotFoundError(f"resume: there is no checkpoint {checkpoint}; give auto or the path of one")
        if fault := fault_of(checkpoint):
            raise ValueError(f"resume: {checkpoint} {fault}; give the path of an intact checkpoint, or auto")
        if self.free:
            return checkpoint
        newest = next((path for path in reversed(self.steps) if fault_of(path) is None), None)
        if newest is None or checkpoint.resolve() != newest.resolve():
            raise ValueError(
                f"out: {self.path} exists and is never overwritten; a run continues in its folder from its newest"
                f" checkpoint alone (--resume auto), so to continue from {checkpoint} choose another folder with --out"
            )
        self._check_same(config)
        return newest

    def _check_same(self, config: TrainConfig) -> None:
        way_out = f"continue it with --config {self.config} --resume auto, or choose another folder with --out"
        check_same(self.read_config(), config, str(self.path), way_out)

    def read_config(self) -> TrainConfig:
        """The options that the run was started with.

        Raises:
            ValueError: if ``config.yaml`` is not what `create` writes.
        """
        try:
            values = read_yaml(self.config, BoundedLoader)
        except ValueError as error:
            raise ValueError(f"{self.config} is damaged: {error}; train anew in another --out") from error
        return saved_config(values, str(self.config))

    def create(self, config: TrainConfig, environment: dict[str, Any], checkpoint: Path | None) -> None:
        """Make the folder, with ``config.yaml`` (which ``pcenet train --config`` reads) and ``environment.json``.

        Args:
            config: the options.
            environment: versions and hardware.
            checkpoint: the one that the run goes on from; those of this folder that are newer are broken, and removed.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        # First: where the disk is full, nothing lies in the folder, and the same command may begin there again.
        write_text(self.config, write_yaml(asdict(config) | {"resume": None}))
        write_json(self.environment, environment)
        self.logs.mkdir(exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        for leftover in self.checkpoints.glob(f"*{TEMPORARY}"):
            log.warning("%s is what a write left that did not finish; it is removed", leftover)
            remove(leftover)
        for path in reversed(self.steps):
            if path == checkpoint:
                break
            discard(path)
