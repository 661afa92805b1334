"""A comparison as tables: Markdown for ``comparison.md``, the same on the terminal. Made of `Report` values alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from pcenet.reporting.numbers import SCORES, score_digits
from pcenet.runs.health import EVALUATED, complaint, ratio_in_words
from pcenet.texts import shown


@dataclass(frozen=True)
class Sheet:
    """A table that can be shown in several ways: the first column is left-aligned, the others are figures."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The table in Markdown."""
        ruler = ["---", *["---:"] * (len(self.header) - 1)]
        lines = ["| " + " | ".join(cells) + " |" for cells in (self.header, ruler, *self.rows)]
        return f"## {self.title}\n\n" + "\n".join(lines) + "\n"

    def rich(self) -> Table:
        """The table for the terminal."""
        table = Table(title=self.title)
        for index, name in enumerate(self.header):
            table.add_column(name, justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*row)
        return table


def sheets(report: Mapping[str, Any]) -> list[Sheet]:
    """The tables of a comparison: labels, routers where there are such, single runs."""
    routers = [row for row in report["summary"] if row["routers"]]
    tables = [label_sheet(report), router_sheet(routers), run_sheet(report)]
    return [sheet for sheet in tables if sheet.rows]


def label_sheet(report: Mapping[str, Any]) -> Sheet:
    """A row per label: score, difference to the baseline, cost."""
    against = report["baseline"]
    digits = digits_of(report)
    header = ["network", "seeds", f"val {SCORES[report['score']]}"]
    header += ["difference, points"] if against else []
    header += ["multiply-adds", "parameters", "active", "s per epoch"]
    rows = []
    for row in report["summary"]:
        cost = row["complexity"]
        rows.append(
            [
                row["label"],
                str(len(row["seeds"])),
                with_spread(row["mean"], row["deviation"], digits),
                *([difference_text(row["difference"], digits)] if against else []),
                f"{cost['multiply_adds'] / 1e6:.1f} M",
                f"{cost['parameters'] / 1e6:.2f} M",
                f"{cost['active_parameters'] / 1e6:.2f} M",
                f"{row['epoch_seconds']:.1f}",
            ]
        )
    title = f"against {against}" if against else "result"
    return Sheet(f"{title}, {images_of(report)} validation images", header, rows)


def router_sheet(summary: Sequence[Mapping[str, Any]]) -> Sheet:
    """A row per label with PCE layers: the least healthy of their layers in any run."""
    rows = []
    for row in summary:
        health, trained = row["routers"]["val"], row["routers"]["train"]
        cells = [f"{health['entropy']:.3f}", ratio_in_words(health), str(health["dead"])] if health else 3 * ["n/a"]
        dropped = "n/a" if trained["drop_rate"] is None else f"{trained['drop_rate']:.1%}"
        rows.append([row["label"], *cells, dropped])
    header = ["network", "lowest entropy", "highest max/min load", "most dead experts", "most dropped in training"]
    return Sheet("routers at evaluation on val, the worst layer of all runs", header, rows)


def run_sheet(report: Mapping[str, Any]) -> Sheet:
    """A row per run."""
    score, digits = report["score"], digits_of(report)
    rows = [
        [
            run["label"],
            str(run["seed"]),
            f"{run['score']:.{digits}%}",
            f"{run['best'][score]:.{digits}%} ({run['best']['epoch']})",
            str(run["epochs"]) + (f", {run['stopped']}" if run["stopped"] else ""),
            f"{run['epoch_seconds']:.1f}",
        ]
        for run in report["runs"]
    ]
    name = SCORES[score]
    return Sheet("runs", ["network", "seed", f"val {name}", f"best {name} (epoch)", "epochs", "s per epoch"], rows)


def images_of(report: Mapping[str, Any]) -> int:
    """How many validation images the scores are of."""
    return min((run["val"]["images"] for run in report["runs"]), default=0)


def digits_of(report: Mapping[str, Any]) -> int:
    """Decimals of the scores."""
    return score_digits(images_of(report))


def with_spread(mean: float, deviation: float | None, digits: int) -> str:
    """A score as a percentage, with its standard deviation where there is one."""
    return f"{mean:.{digits}%}" + ("" if deviation is None else f" ± {100 * deviation:.{digits}f}")


def difference_text(difference: Mapping[str, Any] | None, digits: int) -> str:
    """A difference in points, with its confidence interval where there is one."""
    if difference is None:
        return ""
    text = f"{100 * difference['mean']:+z.{digits}f}"
    if difference["low"] is None:
        return text
    return f"{text} [{100 * difference['low']:+z.{digits}f}, {100 * difference['high']:+z.{digits}f}]"


def markdown(report: Mapping[str, Any]) -> str:
    """The content of ``comparison.md``."""
    recipe = report["recipe"]
    done = f"{len(report['runs'])} of {report['planned']} runs are finished"
    parts = [f"# {', '.join(report['models'])}\n", f"Data `{recipe['data']}`, {recipe['epochs']} epochs; {done}.\n"]
    parts += [sheet.markdown() for sheet in sheets(report)]
    parts += [f"**Warning:** {warning}\n" for warning in warnings(report)]
    parts.append(legend(report) + "\n")
    parts += [f"- {machine(environment)}\n" for environment in report["environments"]]
    return "\n".join(map(shown, "\n".join(parts).split("\n")))


def warnings(report: Mapping[str, Any]) -> list[str]:
    """A line for each run whose routers are not healthy, and one where runs were not validated on the same images."""
    found = ((run["name"], complaint(run[EVALUATED] or {})) for run in report["runs"])
    lines = [f"{name}: {text}" for name, text in found if text]
    runs_by_images: dict[int, list[str]] = {}
    for run in report["runs"]:
        runs_by_images.setdefault(run["val"]["images"], []).append(run["name"])
    if len(runs_by_images) > 1:
        numbers = "; ".join(f"{number}: {', '.join(names)}" for number, names in sorted(runs_by_images.items()))
        lines.append(
            f"runs were validated on different numbers of images, so their scores cannot be compared ({numbers})"
        )
    return lines


def legend(report: Mapping[str, Any]) -> str:
    """What the figures mean."""
    text = "Scores: mean over the seeds ± sample standard deviation, of the finished network."
    if report["baseline"]:
        text += (
            f" Differences: mean over the seeds of a network's score less that of `{report['baseline']}` with the same"
            f" seed, and its {report['confidence']:.0%} confidence interval by Student's t."
        )
    if any(row["routers"] and row["routers"]["val"] is None for row in report["summary"]):
        text += " n/a: the runs are of a version that counted routing in training only, where a bias makes loads even."
    return text + " Every figure, and each epoch, is in `comparison.json`; the curves are in `curves.png`."


def machine(environment: Mapping[str, Any]) -> str:
    """Where runs were made, in a line."""
    where = environment["processor"] if environment["device"] == "cpu" else environment["device"]
    return (
        f"{', '.join(environment['runs'])}: {where}, {environment['threads']} threads, {environment['precision']};"
        f" torch {environment['versions']['torch']}, pcenet {environment['pcenet']}, Python {environment['python']}"
    )
