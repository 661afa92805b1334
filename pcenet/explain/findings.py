"""What the figures say, in sentences: pure functions from a report's values to words, good and bad alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pcenet.explain.report import Report

OWNED = 0.5  # of a class's patches go to one expert
LIFT = 1.5  # times that expert's load
ENOUGH = 30  # patches of a class, to say anything about it
MOST_OWNERS = 4  # named of a layer
APART = 0.02  # by how much mutual information must exceed its control
BY_PLACE = 0.5  # mutual information with position from which on that is said
UNEVEN = 3.0  # max/min load
DROPPED = 0.01
UNSURE = 1.3  # times the gate value of a router that cannot tell

Sign = Literal["good", "bad", "note"]


@dataclass(frozen=True)
class Finding:
    """One sentence.

    Attributes:
        sign: ``"good"``: experts differ, and it matters; ``"bad"``: something may be amiss; ``"note"``: neither.
        text: the sentence.
    """

    sign: Sign
    text: str


@dataclass(frozen=True)
class Owner:
    """A class that mostly goes to one expert.

    Attributes:
        name: of the class.
        expert: its expert.
        share: of the class's patches that go there.
        load: of all patches that go there.
        patches: of the class.
    """

    name: str
    expert: int
    share: float
    load: float
    patches: int


def percent(value: float) -> str:
    """A share as text, with one decimal."""
    return f"{100 * value:.1f} %"


def points(value: float) -> str:
    """A difference of shares as text, in percentage points."""
    return f"{round(100 * value, 1) + 0.0:+.1f}"  # + 0.0 turns -0.0 into 0.0


def owners(layer: Report) -> list[Owner]:
    """The classes of which one expert serves most patches, and far more than its load; the clearest first."""
    counts = layer["by_class"]
    loads = [sum(of_expert) for of_expert in zip(*counts.values(), strict=True)]
    found = []
    for name, of_class in counts.items():
        patches = sum(of_class)
        if patches < ENOUGH:
            continue
        expert = of_class.index(max(of_class))
        share, load = of_class[expert] / patches, loads[expert] / sum(loads)
        if share >= OWNED and share >= LIFT * load:
            found.append(Owner(name, expert, share, load, patches))
    return sorted(found, key=lambda owner: -owner.share / owner.load)


def summary(report: Report) -> list[Finding]:
    """What the whole report says, the most important first."""
    return [
        *_random(report),
        *_single(report),
        *_knock_out(report),
        *_classes(report),
        *_places(report),
        *_unhealthy(report),
        *_twin(report),
    ]


def layer_findings(layer: Report) -> list[Finding]:
    """What is to be said of one layer."""
    return [*_owned(layer), *_place(layer), *_health(layer), *_sharp(layer)]


def _random(report: Report) -> Iterator[Finding]:
    row = _row(report, "random expert")
    if row is None:
        return
    name, before = report["score"]["name"], report["interventions"]["score"]
    interval = f"95 % interval {points(row['low'])} to {points(row['high'])} points"
    if row["high"] < 0:
        yield Finding(
            "good",
            f"Which expert serves a patch matters: with experts drawn at random in every layer {name} falls from "
            f"{percent(before)} to {percent(row['score'])} ({interval}).",
        )
    else:
        yield Finding(
            "bad",
            f"Nothing shows that it matters which expert serves a patch: with experts drawn at random in every layer "
            f"{name} goes from {percent(before)} to {percent(row['score'])}, and the {interval} does not lie below 0.",
        )


def _single(report: Report) -> Iterator[Finding]:
    rows = [row for row in _rows(report) if row["name"] == "one expert for all"]
    if not rows:
        return
    best = max(rows, key=lambda row: float(row["difference"]))
    text = (
        f"expert {best['expert']}, if it serves every patch of every layer: {report['score']['name']} "
        f"{percent(best['score'])} ({points(best['difference'])} points, 95 % interval {points(best['low'])} to "
        f"{points(best['high'])})."
    )
    if best["high"] < 0:
        yield Finding("good", f"No single expert does as well as the router's choice; the best is {text}")
    else:
        yield Finding("bad", f"It is not shown that more than one expert is needed; see {text}")


def _twin(report: Report) -> Iterator[Finding]:
    twin, name = report["twin"], report["score"]["name"]
    if twin is None:
        return
    text = (
        f"{name} is {percent(report['score']['value'])}, its dense twin's {percent(twin['value'])}: "
        f"{points(twin['ahead'])} points (95 % interval over images {points(twin['low'])} to {points(twin['high'])}; "
        "of one training run each, so the seed's luck is not in it)."
    )
    yield Finding("bad" if twin["high"] < 0 else "note", text)  # one run each is no proof of being ahead


def _classes(report: Report) -> Iterator[Finding]:
    measured = [layer for layer in report["layers"] if layer["specialisation"] is not None]
    apart = [layer for layer in measured if _tells_class(layer)]
    if measured and not apart:
        yield Finding(
            "bad", "In no layer does the expert tell anything of the class: no expert specialises in classes."
        )
    if apart:
        best = max(apart, key=lambda layer: float(layer["specialisation"]["with_class"]))
        numbers = best["specialisation"]
        yield Finding(
            "good",
            f"In {len(apart)} of {len(measured)} layers the expert tells something of the class, most of all in "
            f"{best['title']}: normalised mutual information {numbers['with_class']:.3f} (by chance "
            f"{numbers['control_class']:.3f}), and among patches of one place "
            f"{numbers['with_class_given_position']:.3f} (by chance {numbers['control_class_given_position']:.3f}); "
            "0 is nothing, 1 everything.",
        )
    owned = [(owner, layer) for layer in measured if _tells_class_at_a_place(layer) for owner in owners(layer)[:1]]
    if owned:
        owner, layer = max(owned, key=lambda pair: pair[0].share / pair[0].load)
        yield Finding(
            "good",
            f"The clearest case: in {layer['title']} expert {owner.expert} serves {percent(owner.share)} of the "
            f'patches of class "{owner.name}", but {percent(owner.load)} of all patches.',
        )


def _places(report: Report) -> Iterator[Finding]:
    titles = [
        layer["title"]
        for layer in report["layers"]
        if layer["specialisation"] is not None and layer["specialisation"]["with_position"] > BY_PLACE
    ]
    if titles:
        yield Finding(
            "note",
            f"In {', '.join(titles)} much of the routing follows from where a patch lies, whatever is in it.",
        )


def _unhealthy(report: Report) -> Iterator[Finding]:
    for layer in report["layers"]:
        for finding in (*_health(layer), *_sharp(layer)):
            yield Finding(finding.sign, f"{layer['title']}: {finding.text}")


def _knock_out(report: Report) -> Iterator[Finding]:
    rows = [row for row in _rows(report) if row["name"] == "knocked out"]
    if not rows:
        return
    worst = min(rows, key=lambda row: float(row["difference"]))
    title = next(layer["title"] for layer in report["layers"] if layer["name"] == worst["layer"])
    losses = {name: value for name, value in worst["by_class"].items() if value is not None}
    hardest = min(losses, key=lambda name: float(losses[name]))
    text = (
        f"The expert that is missed most is {worst['expert']} of {title}: without it, its patches going to the "
        f"router's next best, {report['score']['name']} changes by {points(worst['difference'])} points (95 % interval "
        f'{points(worst["low"])} to {points(worst["high"])}), that of class "{hardest}" by {points(losses[hardest])}.'
    )
    if worst["high"] < 0:
        yield Finding("good", text)
    else:
        yield Finding("bad", text + " The interval holds 0: no single expert is shown to be needed.")


def _owned(layer: Report) -> Iterator[Finding]:
    found = owners(layer)
    if layer["specialisation"] is None:
        yield Finding("note", "No patch has a class here, so nothing is known of experts and classes.")
    elif found:
        cases = [
            f'expert {owner.expert} serves {percent(owner.share)} of "{owner.name}" and {percent(owner.load)} of all'
            for owner in found[:MOST_OWNERS]
        ]
        more = f"; and {len(found) - MOST_OWNERS} more" if len(found) > MOST_OWNERS else ""
        text = f"Classes that one expert owns, by shares of patches: {'; '.join(cases)}{more}."
        if _tells_class_at_a_place(layer):
            yield Finding("good", text)
        else:
            yield Finding("note", f"{text} It may owe them to where they lie.")
    elif _tells_class(layer):
        yield Finding("note", "No expert owns a class, but classes are spread over the experts unevenly.")
    elif _tells_class_at_a_place(layer):
        yield Finding("note", "On the whole experts do not differ by class, but among patches of one place they do.")
    else:
        yield Finding("bad", "Experts do not differ by class: each class is spread over them as all patches are.")


def _place(layer: Report) -> Iterator[Finding]:
    numbers = layer["specialisation"]
    if numbers is None or numbers["with_position"] <= BY_PLACE:
        return
    text = f"Much of the routing follows from the place alone: mutual information {numbers['with_position']:.2f}"
    if _tells_class_at_a_place(layer):
        yield Finding("note", f"{text}; among patches of one place the expert still tells something of the class.")
    else:
        yield Finding("bad", f"{text}; among patches of one place the expert tells nothing of the class.")


def _health(layer: Report) -> Iterator[Finding]:
    health = layer["health"]
    if health["dead"]:
        dead = " or ".join(map(str, health["dead"]))
        yield Finding("bad", f"Dead: no patch goes to expert {dead}.")
    elif health["max_min"] > UNEVEN:
        yield Finding("bad", f"Uneven: the busiest expert has {health['max_min']:.1f} times the load of the idlest.")
    if health["drop_rate"] > DROPPED:
        yield Finding("bad", f"{percent(health['drop_rate'])} of the patches are dropped for lack of capacity.")


def _sharp(layer: Report) -> Iterator[Finding]:
    gate, blind = layer["sharpness"]["gate"], 1 / layer["experts"]
    if layer["experts"] > 1 and gate < UNSURE * blind:
        yield Finding(
            "bad",
            f"The router hardly decides: its mean gate value is {gate:.2f}, and {blind:.2f} is that of one that cannot "
            "tell.",
        )


def _tells_class(layer: Report) -> bool:
    numbers = layer["specialisation"]
    return bool(numbers["with_class"] - numbers["control_class"] > APART)


def _tells_class_at_a_place(layer: Report) -> bool:
    numbers = layer["specialisation"]
    return bool(numbers["with_class_given_position"] - numbers["control_class_given_position"] > APART)


def _rows(report: Report) -> list[dict[str, Any]]:
    return [] if report["interventions"] is None else report["interventions"]["rows"]


def _row(report: Report, name: str) -> dict[str, Any] | None:
    """The intervention of that name in all layers."""
    return next((row for row in _rows(report) if row["name"] == name and row["layer"] is None), None)
