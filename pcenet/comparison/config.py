"""The options of ``pcenet compare`` and the runs that they ask for. Imports no torch, so that ``--help`` is fast."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

from pcenet.choices import did_you_mean
from pcenet.runs.config import TrainConfig
from pcenet.runs.options import Option, check

# Options of `pcenet train` that a comparison sets for each run, that leave no run, or that are for several processes.
OF_A_RUN = (
    *("seed", "out", "resume", "dry_run", "find"),
    *("devices", "strategy", "sync_batch_norm", "process_timeout"),
)
# What must be the same for all runs: where what is scored differs, scores say nothing about each other, and torch keeps
# the number of threads from one run to the next.
OF_ALL_RUNS = ("task", "data", "classes", "ignore_index", "overfit", "device", "workers", "threads")
MAPPINGS = ("model_args", "upcycle_args")
OF_A_VARIANT = tuple(item.name for item in fields(TrainConfig) if item.name not in OF_A_RUN + OF_ALL_RUNS)


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison.

    Attributes:
        label: what is compared.
        seed: that of the run.
        config: its options, with the run folder.
    """

    label: str
    seed: int
    config: TrainConfig

    @property
    def name(self) -> str:
        """The name of its run folder."""
        return self.config.folder.name

    @property
    def lock(self) -> Path:
        """The file, beside the run folder, that a process locks while it works on this run."""
        return self.config.folder.with_name(f"{self.name}.lock")


@dataclass(frozen=True)
class CompareConfig:
    """What ``pcenet compare`` needs to know. Creating one checks every value, and those of every run.

    Raises:
        ValueError: for a value that breaks its rule; names the field and, where it is of one run, the label.
    """

    models: Annotated[
        list[str],
        Option(
            "What is compared: networks, and labels of --variants, such as '[pce_nano,dense_nano]'. []: all variants."
        ),
    ] = field(default_factory=list)
    seeds: Annotated[
        int | list[int], Option("How many seeds, counted from 0, or a list of them such as '[3,4]'.", at_least=1)
    ] = 3
    variants: Annotated[
        dict[str, Any],
        Option(
            "Changes of the recipe by label, such as {wide: {model: pce_nano, lr: 0.002}}; without a model there it is "
            "--model. model_args and upcycle_args are added to the recipe's."
        ),
    ] = field(default_factory=dict)
    baseline: Annotated[
        str | None,
        Option(
            "The label that the others are compared with. Default: the dense twin of the first, if it is there, else "
            "the last."
        ),
    ] = None
    out: Annotated[
        str | None,
        Option("Folder for the run folders LABEL-SEED and the comparison, old or new. Default: runs/compare-DATA."),
    ] = None
    status: Annotated[
        bool, Option("Train and write nothing: show what is done, what is left, and the figures so far.")
    ] = False
    recipe: Annotated[TrainConfig, Option("The options that all runs begin with.")] = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        check(self)
        check_seeds(self.seeds)
        for label, changes in self.variants.items():
            check_variant(label, changes)
        check_labels(self.labels)
        if self.baseline is not None and self.baseline not in self.labels:
            hint = did_you_mean(self.baseline, self.labels)
            raise ValueError(f"baseline {self.baseline!r} is not one of {', '.join(self.labels)}{hint}")
        for label in self.labels:
            try:
                for seed in self.seed_list:
                    self.options(label, seed)
            except ValueError as error:
                raise ValueError(f"{label}: {error}") from error

    @property
    def labels(self) -> tuple[str, ...]:
        """What is compared."""
        return tuple(self.models or self.variants)

    @property
    def seed_list(self) -> tuple[int, ...]:
        """The seeds themselves."""
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else tuple(self.seeds)

    @property
    def folder(self) -> Path:
        """``out``, or ``runs/compare-<data>``."""
        return Path(self.out or f"runs/compare-{Path(os.path.realpath(self.recipe.data)).stem}")

    @property
    def runs(self) -> tuple[PlannedRun, ...]:
        """All runs, seed by seed, so that pairs are complete early."""
        return tuple(
            PlannedRun(label, seed, self.options(label, seed)) for seed in self.seed_list for label in self.labels
        )

    def options(self, label: str, seed: int) -> TrainConfig:
        """The options of one run.

        Raises:
            ValueError: for a value that breaks its rule, naming the field.
        """
        changes = dict((self.variants[label] or {}) if label in self.variants else {"model": label})
        for name in MAPPINGS:  # which a variant adds to, key by key, and does not replace
            own, common = changes.get(name), getattr(self.recipe, name)
            if isinstance(own, Mapping) and common:
                changes[name] = {**common, **own}
        out = self.folder / f"{folder_name(label)}-{seed}"
        return replace(self.recipe, **changes, seed=seed, out=str(out), resume="auto")


def folder_name(label: str) -> str:
    """A label as the beginning of a folder's name: not every file system has colons."""
    return label.replace(":", "-")


def check_seeds(seeds: int | list[int]) -> None:
    """Raise a ``ValueError`` unless a list of seeds holds each once; `TrainConfig` bounds their values."""
    if isinstance(seeds, list) and (not seeds or len(set(seeds)) < len(seeds)):
        raise ValueError(f"seeds={seeds} must be one or more whole numbers, each once; give a count, or such a list")


def check_variant(label: str, changes: Mapping[str, Any] | None) -> None:
    """Raise a ``ValueError`` unless the changes, null for none, are options that may differ between runs."""
    if changes is not None and not isinstance(changes, Mapping):
        raise ValueError(f"variants: {label} must be a mapping of options such as {{lr: 0.002}}, got {changes!r}")
    for name in changes or {}:
        if name in OF_A_RUN + OF_ALL_RUNS:
            raise ValueError(
                f"variants: {label}: {name} is not for one variant; it is the same for all, or set by itself"
            )
        if name not in OF_A_VARIANT:
            raise ValueError(f"variants: {label}: unknown option {name!r}{did_you_mean(str(name), OF_A_VARIANT)}")


def check_labels(labels: tuple[str, ...]) -> None:
    """Raise a ``ValueError`` unless there are labels, each the name of a folder of its own."""
    if not labels:
        raise ValueError("models and variants are empty: give what is to be compared, such as '[pce_nano,dense_nano]'")
    names = [folder_name(label) for label in labels]
    for label, name in zip(labels, names, strict=True):
        if not re.fullmatch(r"\w[\w.:+=-]*", label):
            raise ValueError(
                f"models: {label!r} cannot be part of a folder's name; begin with a letter or digit, and go on with"
                " letters, digits and _ . : + = -"
            )
        if names.count(name) > 1:
            raise ValueError(f"models: {label!r} is there twice, or another label has the same folder; name each once")
