"""``pcenet compare``: the runs one after the other, shared with other processes, and a report after each."""

from __future__ import annotations

import gc
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pcenet.choices import Precision
from pcenet.comparison.config import CompareConfig, PlannedRun
from pcenet.comparison.report import Report, make_report, write_report
from pcenet.comparison.results import finished, rows_file
from pcenet.comparison.tables import Sheet, sheets, warnings
from pcenet.models import twin_of
from pcenet.reporting.tables import console
from pcenet.runs.config import TrainConfig
from pcenet.runs.fingerprint import Fingerprint, difference, fingerprint
from pcenet.runs.folder import RunFolder, check_same
from pcenet.runs.locks import is_locked, locked
from pcenet.runs.records import fingerprint_of, read_rows
from pcenet.runtime.device import resolve_device
from pcenet.texts import say
from pcenet.training.network import build_model, check_model, naming_model_args
from pcenet.training.preparation import open_sources, resolve
from pcenet.training.run import train

log = logging.getLogger(__name__)


def compare(config: CompareConfig) -> Report:
    """Train what is left to train, write the comparison after each run, and print it.

    Runs that are finished are left as they are, and so are those that another process is busy with: processes that are
    given the same options share the work.

    Returns:
        The content of ``comparison.json``.

    Raises:
        ValueError: before anything is trained, for options that make no network, or differ from those of a run that
            is there, and for data that do; at the end, if runs failed, naming the first.
    """
    check_networks(config, build=True)
    check_begun(config)
    check_data_now(config)
    baseline = baseline_of(config)
    config.folder.mkdir(parents=True, exist_ok=True)
    failed: dict[str, ValueError] = {}
    # After each run from the start again: meanwhile another process may have left one.
    while any(attempt(run, config, baseline, failed) for run in config.runs):
        pass
    report = write_report(config, baseline)
    show(config, report)
    if failed:
        name, error = next(iter(failed.items()))
        raise ValueError(f"{len(failed)} of {len(config.runs)} runs failed; {name}: {error}") from error
    return report


def status(config: CompareConfig) -> Report:
    """``pcenet compare --status``: show what is done, what is left and the figures so far; nothing is written.

    Raises:
        ValueError: for unknown networks, or options that differ from those of a run that is there, and where finished
            runs were not made with the same data.
    """
    check_networks(config)
    check_begun(config)
    report = make_report(config, baseline_of(config))
    show(config, report)
    return report


def attempt(run: PlannedRun, config: CompareConfig, baseline: str | None, failed: dict[str, ValueError]) -> bool:
    """Train a run, or continue it, unless it is finished, has failed, or another process is busy with it.

    Returns:
        Whether there was something to do.
    """
    folder = run.config.folder
    if run.name in failed or finished(folder):
        return False
    with locked(run.lock) as ours:
        if not ours or finished(folder):
            return False
        say(f"{run.name}: run {config.runs.index(run) + 1} of {len(config.runs)}")
        try:
            train(run.config)
        except ValueError as error:  # such as a loss that was no number in the end: the others may do better
            failed[run.name] = error
            log.warning("%s failed: %s", run.name, error)
        else:
            run.lock.unlink(missing_ok=True)  # whoever still has it open will find the run finished
    forget()
    write_report(config, baseline)
    return True


def forget() -> None:
    """Give back what a run leaves in memory: networks and optimisers know each other in circles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_networks(config: CompareConfig, build: bool = False) -> None:
    """Raise a ``ValueError`` naming the first label whose network, or an argument of it, does not exist.

    Args:
        config: the options.
        build: make each network once, so that values of its arguments are tried, too.
    """
    for label in config.labels:
        options = config.options(label, config.seed_list[0])
        try:
            check_model(options)
            if build:
                with naming_model_args(options.model_args):
                    build_model(options, ["0", "1"])
        except ValueError as error:
            known = (
                "" if label in config.variants or not config.variants else f"; variants: {', '.join(config.variants)}"
            )
            raise ValueError(f"{label}: {error}{known}") from error


def check_begun(config: CompareConfig) -> None:
    """Raise a ``ValueError`` naming the first run in the comparison's folder that was started with other options, or
    two that were finished with different images."""
    device = resolve_device(config.recipe.device)
    for run in config.runs:
        folder = RunFolder(run.config.folder)
        if folder.config.is_file():
            saved, expected = folder.read_config(), resolve(run.config, device)
            if finished(folder.path):
                expected = as_elsewhere(expected, saved, run.config.precision)
            way_out = "change the options back, or choose another label or another folder with --out"
            check_same(saved, expected, str(folder.path), way_out)
    known = fingerprints(config)
    for name, own in known.items():
        first, of_first = next(iter(known.items()))
        if changed := difference(of_first, own):
            way_out = f"remove {config.folder / first} or {config.folder / name} to train it anew"
            raise ValueError(f"{name} was not trained with the data of {first}: {changed}; {way_out}")


def fingerprints(config: CompareConfig) -> dict[str, Fingerprint]:
    """By what the runs that are finished know their data again, by their names; without those that did not note it."""
    paths = {run.name: RunFolder(run.config.folder).metrics for run in config.runs if finished(run.config.folder)}
    found = {name: fingerprint_of(path) for name, path in paths.items()}
    return {name: known for name, known in found.items() if known}


def check_data_now(config: CompareConfig) -> None:
    """Raise a ``ValueError`` if runs are left to train, and the data have changed since others were finished."""
    known = fingerprints(config)
    if not known or all(finished(run.config.folder) for run in config.runs):
        return
    name, before = next(iter(known.items()))
    if changed := difference(before, fingerprint(open_sources(config.runs[0].config))):
        way_out = "put them back, or choose another folder with --out"
        raise ValueError(f"{config.recipe.data} has changed since {name} was trained: {changed}; {way_out}")


def as_elsewhere(expected: TrainConfig, saved: TrainConfig, precision: Precision) -> TrainConfig:
    """What a finished run may differ in: where its data lay, and the precision, if its machine chose it."""
    changes: dict[str, Any] = {}
    here, there = expected.data, saved.data
    both = os.path.exists(here) and os.path.exists(there)  # which for a folder that may not be entered is no error
    if Path(here).name == Path(there).name and not (both and not os.path.samefile(here, there)):
        changes["data"] = saved.data
    if precision == "auto":
        changes["precision"] = saved.precision
    return replace(expected, **changes)


def baseline_of(config: CompareConfig) -> str | None:
    """The label that the others are compared with: as asked, else the first one's dense twin, else the last."""
    if len(config.labels) < 2:
        return None
    if config.baseline is not None:
        return config.baseline
    networks = {label: config.options(label, config.seed_list[0]).model_name for label in config.labels}
    twin = twin_of(networks[config.labels[0]])
    return next((label for label, network in networks.items() if network == twin), config.labels[-1])


def show(config: CompareConfig, report: Report) -> None:
    """Print how far the runs are, and the tables."""
    screen = console()
    say(f"{config.folder}: {len(report['runs'])} of {len(config.runs)} runs are finished")
    left = [(run.label, str(run.seed), state(run)) for run in config.runs if not finished(run.config.folder)]
    tables = [Sheet("left to do", ("network", "seed", "state"), left)] if left else []
    for sheet in [*tables, *sheets(report)]:
        screen.print(sheet.rich())
    for warning in warnings(report):
        log.warning("%s", warning)


def state(run: PlannedRun) -> str:
    """How far a run is that is not finished."""
    rows = rows_file(run.config.folder)
    done = len(read_rows(rows)) if rows.is_file() else 0
    if is_locked(run.lock):
        return f"another process is in epoch {done + 1} of {run.config.epochs}"
    return f"stopped after {done} of {run.config.epochs} epochs" if done else "not begun"
