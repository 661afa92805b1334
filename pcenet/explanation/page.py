"""The page: a report and its pictures as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from pcenet.explanation.drawing import Pictures
from pcenet.explanation.figures import Picture
from pcenet.explanation.findings import layer_findings, owners, points, row_label, summary
from pcenet.explanation.report import Report
from pcenet.reporting.colours import class_colours, css, expert_colours
from pcenet.reporting.numbers import in_prose, share_text
from pcenet.runs.health import ratio_in_words
from pcenet.texts import shown

TEMPLATE = "page.html"
MOST_SERVED = 3  # classes named of an expert that owns none


def page(report: Report, pictures: Pictures, captions: list[tuple[str, str]]) -> str:
    """The HTML text. What comes from users, such as the names of classes and files, is `shown`, and escaped.

    Args:
        report: the figures.
        pictures: what is drawn of them.
        captions: name and caption of each image that is shown.
    """
    environment = Environment(
        loader=PackageLoader("pcenet.explanation", package_path=""),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: shown(value) if type(value) is str else value,  # not Markup, which is made of such
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": share_text,
        "points": points,
        "score": in_prose,
        "uri": uri,
        "millions": millions,
        "short_path": short_path,
    }
    template = environment.get_template(TEMPLATE)
    return template.render(
        report=report,
        pictures=pictures,
        captions=captions,
        findings=summary(report),
        layer_findings=partial(layer_findings, task=report["task"]),
        row_label=row_label,
        expert_colour=expert_colour,
        class_colour=class_colour,
        served=served,
        without=without,
        ratio_in_words=ratio_in_words,
    )


def uri(picture: Picture) -> str:
    """A picture as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(picture.png).decode("ascii")


def millions(value: float) -> str:
    """A count in millions, with three digits."""
    return f"{value / 1e6:.3g} M"


def short_path(name: str) -> str:
    """A run or data set as somebody else may read it: of a path of this machine its last part alone."""
    path = Path(name)
    return path.name if path.is_absolute() else name


def expert_colour(number: int) -> str:
    """The colour of an expert, as CSS has it."""
    return css(expert_colours()[number])


def class_colour(number: int) -> str:
    """The colour of a class, likewise."""
    return css(class_colours()[number])


def served(layer: Report, expert: int) -> list[str]:
    """The classes that an expert owns, or else those of which it serves most for its load, in words."""
    owned = [owner for owner in owners(layer) if owner.expert == expert]
    if owned:
        return [f'{share_text(owner.share)} of "{owner.name}"' for owner in owned]
    shares = {name: of_class[expert] / sum(of_class) for name, of_class in layer["by_class"].items() if any(of_class)}
    most = sorted(shares, key=lambda name: -shares[name])[:MOST_SERVED]
    return [f'{share_text(shares[name])} of "{name}"' for name in most if shares[name]]


def without(report: Report, layer: Report, expert: int) -> dict[str, Any] | None:
    """What knocking an expert out did, where that was tried."""
    rows = [] if report["interventions"] is None else report["interventions"]["rows"]
    key = ("knocked out", layer["name"], expert)
    return next((row for row in rows if (row["name"], row["layer"], row["expert"]) == key), None)
