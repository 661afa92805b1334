"""``pcenet check-data``: a data set's report as tables, JSON and a sample sheet."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.progress import track
from rich.table import Table

import pcenet.data as data
from pcenet.analysis.samples import sample_sheet
from pcenet.reporting.numbers import percent
from pcenet.reporting.plots import png_of
from pcenet.reporting.tables import console
from pcenet.runs.config import CheckDataConfig
from pcenet.texts import say
from pcenet.writing import write_bytes, write_json

SHEET = "samples.png"
MOST_ROWS = 10  # findings of one kind, sizes, or kinds of files that a table shows


def check_data(config: CheckDataConfig) -> data.CheckReport:
    """Check a data set, print what was found, write what was asked for.

    Raises:
        ValueError: there is no such data set.
        ModuleNotFoundError: a sample sheet was asked for without matplotlib.
    """
    report = data.check_data(
        config.data,
        config.task,
        classes=config.classes,
        ignore_index=config.ignore_index,
        grey_range=config.grey_range,
        progress=_progress,
    )
    show(report)
    if config.json:
        write_json(Path(config.json), report.to_json())
    if config.out and report.samples:
        path = Path(config.out, SHEET)
        figure = sample_sheet(report)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, png_of(figure))
        say(f"sample sheet: {path}")
    return report


def show(report: data.CheckReport) -> None:
    """Print a report as tables."""
    screen = console()
    if report.images:
        what = "images of each class" if report.task == "classify" else "share of each class in the pixels that count"
        table = Table("", *report.images, title=f"{report.source}: {what}")
        table.add_row("images", *map(str, report.images.values()))
        for name in report.classes:
            table.add_row(name, *(_count(report, split, name) for split in report.images))
        if report.ignored:
            table.add_row("pixels that do not count", *(_ignored(report, split) for split in report.images))
        screen.print(table)
        facts = Table(show_header=False, title="files")
        facts.add_row("sizes, width x height", _frequent(report.sizes))
        facts.add_row("formats and modes", _frequent(report.kinds))
        if report.mask_values:
            facts.add_row("mask values", _frequent(report.mask_values, len(report.mask_values)))
        screen.print(facts)
    if report.findings:
        table = Table("", "what", "file", "finding", title="findings")
        for finding, rest in _shortened(report.findings):
            table.add_row(finding.severity, finding.kind, finding.file, finding.message)
            if rest:
                table.add_row("", finding.kind, "", f"... and {rest} more (--json lists all)")
        screen.print(table)
    errors = sum(finding.severity == "error" for finding in report.findings)
    say(
        f"{errors} error(s), {len(report.findings) - errors} warning(s): training would"
        f" {'accept' if report.usable else 'refuse'} {report.source}"
    )


def _count(report: data.CheckReport, split: str, name: str) -> str:
    """Images of a class, or its share of the pixels."""
    counts = report.counts[split]
    return str(counts[name]) if report.task == "classify" else percent(counts[name] / max(sum(counts.values()), 1))


def _ignored(report: data.CheckReport, split: str) -> str:
    """The share of the pixels that do not count."""
    ignored = report.ignored[split]
    return percent(ignored / max(ignored + sum(report.counts[split].values()), 1))


def _progress(items: Sequence[Any]) -> Iterable[Any]:
    return track(items, "reading", transient=True, disable=not sys.stdout.isatty())


def _frequent(counts: Mapping[Any, int], most: int = MOST_ROWS) -> str:
    """The first values with their counts."""
    shown = [f"{value}: {count}" for value, count in list(counts.items())[:most]]
    return ", ".join([*shown, *([f"and {len(counts) - most} more"] if len(counts) > most else [])])


def _shortened(findings: Iterable[data.Finding]) -> Iterable[tuple[data.Finding, int]]:
    """The first findings of each kind; with the last one shown, how many are not."""
    for _, group in groupby(sorted(findings, key=_sort), _sort):
        alike = list(group)
        shown = alike[:MOST_ROWS]
        yield from ((finding, 0) for finding in shown[:-1])
        yield shown[-1], len(alike) - len(shown)


def _sort(finding: data.Finding) -> tuple[str, str]:
    return finding.severity, finding.kind
