"""What the figures say, in sentences: pure functions from a report's values to words, good and bad alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pcenet.choices import TaskName
from pcenet.explanation.report import Report
from pcenet.reporting.numbers import in_prose, score_digits, share_text
from pcenet.runs.health import UNEVEN, experts_in_words

OWNED = 0.5  # of a class's patches go to one expert
LIFT = 1.5  # times that expert's load
ENOUGH = 30  # patches of a class, to say anything about it
MOST_OWNERS = 4  # named of a layer
APART = 0.02  # by so much must mutual information with the class exceed its control
BY_PLACE = 0.5  # by so much must mutual information with position exceed its control for that to be said
DROPPED = 0.01
UNSURE = 1.3  # times the gate value of a router that cannot tell
ELSEWHERE = ("random expert", "second choice", "one expert for all", "knocked out")  # interventions on who serves what

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


def points(value: float, images: int) -> str:
    """A difference of scores as text, in percentage points, with digits as those of the scores."""
    digits = _digits(images)
    return f"{round(100 * value, digits) + 0.0:+.{digits}f}"  # + 0.0 turns -0.0 into 0.0


def interval(values: Report, images: int) -> str:
    """The 95 % interval of a difference, in points."""
    return f"95 % interval {points(values['low'], images)} to {points(values['high'], images)}"


def row_label(row: Report) -> str:
    """An intervention in words."""
    if row["name"] == "one expert for all":
        return f"expert {row['expert']} for all"
    if row["name"] == "knocked out":
        return f"without expert {row['expert']}"
    return str(row["name"])


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
        *_dead(report),
        *_matters(report),
        *_single(report),
        *_knock_out(report),
        *_classes(report),
        *_places(report),
        *_unhealthy(report),
        *_twin(report),
    ]


def layer_findings(layer: Report, task: TaskName) -> list[Finding]:
    """What is to be said of one layer of a network for this task."""
    return [*_dead_of(layer), *_owned(layer, task), *_place(layer), *_health(layer), *_sharp(layer)]


def _dead(report: Report) -> Iterator[Finding]:
    dead = {layer["title"]: layer["health"]["dead_experts"] for layer in report["layers"] if layer["health"]["dead"]}
    if dead:
        count, experts = sum(map(len, dead.values())), sum(layer["experts"] for layer in report["layers"])
        cases = "; ".join(f"{experts_in_words(numbers)} of {title}" for title, numbers in dead.items())
        yield Finding("bad", f"Dead: {count} of {experts} experts get no patch at all: {cases}.")


def _matters(report: Report) -> Iterator[Finding]:
    """Whether it matters which expert serves a patch, by all interventions that send patches elsewhere."""
    rows, random = [row for row in _rows(report) if row["name"] in ELSEWHERE], _row(report, "random expert")
    if random is None:
        return
    name, tried = report["score"]["name"], report["interventions"]
    images = tried["images"]
    at_random = (
        f"with experts drawn at random in every layer {name} goes from {in_prose(tried['score'], images)} to "
        f"{in_prose(random['score'], images)} ({interval(random, images)} points, {images} images)"
    )
    if random["high"] < 0:
        yield Finding("good", f"Which expert serves a patch matters: {at_random}.")
        return
    harmful = [row for row in rows if row["high"] < 0]
    if not harmful:
        text = f"Nothing shows that it matters which expert serves a patch: {at_random}"
        yield Finding("bad", f"{text}, and of no other change of who serves what does the interval lie below 0.")
        return
    worst = min(harmful, key=lambda row: float(row["difference"]))
    yield Finding(
        "note",
        f"It is not shown that a random expert is worse than the router's choice: {at_random}. Still it matters which "
        f"expert serves a patch: the intervals of {len(harmful)} of {len(rows)} changes lie below 0, the largest loss "
        f"with {_change(report, worst)}: {points(worst['difference'], images)} points ({interval(worst, images)}).",
    )


def _single(report: Report) -> Iterator[Finding]:
    rows = [row for row in _rows(report) if row["name"] == "one expert for all"]
    if not rows:
        return
    images = report["interventions"]["images"]
    as_good = [row for row in rows if row["high"] >= 0]
    best = max(as_good or rows, key=lambda row: float(row["difference"]))
    text = (
        f"expert {best['expert']}, if it serves every patch of every layer: {report['score']['name']} "
        f"{in_prose(best['score'], images)} ({points(best['difference'], images)} points, {interval(best, images)})."
    )
    if not as_good:
        yield Finding("good", f"No single expert does as well as the router's choice; the best is {text}")
    elif best["low"] > 0:
        yield Finding("bad", f"A single expert does better than the router's choice: {text}")
    else:
        yield Finding("bad", f"It is not shown that more than one expert is needed; see {text}")


def _twin(report: Report) -> Iterator[Finding]:
    twin, name, images = report["twin"], report["score"]["name"], report["images"]
    if twin is None:
        return
    text = (
        f"{name} is {in_prose(report['score']['value'], images)}, its dense twin's {in_prose(twin['value'], images)}: "
        f"{points(twin['ahead'], images)} points ({interval(twin, images)}, over {images} images; of one training run "
        "each, so the seed's luck is not in it)."
    )
    yield Finding("bad" if twin["high"] < 0 else "note", text)  # one run each is no proof of being ahead


def _classes(report: Report) -> Iterator[Finding]:
    measured = [layer for layer in report["layers"] if layer["specialisation"] is not None]
    apart = [layer for layer in measured if _tells_class(layer, report["task"])]
    at_a_place = [layer["title"] for layer in measured if _tells_class_at_a_place(layer)]
    if measured and not apart and at_a_place:
        text = f"On the whole in no layer does the expert tell anything of the class, but in {', '.join(at_a_place)} it"
        yield Finding("note", f"{text} does among patches of one place.")
    elif measured and not apart:
        yield Finding(
            "bad", "In no layer does the expert tell anything of the class: no expert specialises in classes."
        )
    if apart:
        best = max(apart, key=lambda layer: _beyond_chance(layer, "class"))
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
            f"The clearest case: in {layer['title']} expert {owner.expert} serves {share_text(owner.share)} of the "
            f'patches of class "{owner.name}", but {share_text(owner.load)} of all patches.',
        )


def _places(report: Report) -> Iterator[Finding]:
    titles = [layer["title"] for layer in report["layers"] if _goes_by_place(layer)]
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
    dead = {(layer["name"], expert) for layer in report["layers"] for expert in layer["health"]["dead_experts"]}
    rows = [row for row in _rows(report) if row["name"] == "knocked out"]
    rows = [row for row in rows if (row["layer"], row["expert"]) not in dead]  # they serve nothing that could be missed
    if not rows:
        return
    name, images = report["score"]["name"], report["interventions"]["images"]

    def cost(row: Report) -> str:
        return f"{name} changes by {points(row['difference'], images)} points ({interval(row, images)})"

    needed = [row for row in rows if row["high"] < 0]
    worst = min(needed or rows, key=lambda row: float(row["difference"]))
    title = _title(report, worst["layer"])
    if needed:
        losses = {each: value for each, value in worst["by_class"].items() if value is not None and value < 0}
        hardest = min(losses, key=lambda each: float(losses[each]), default=None)
        of_class = "" if hardest is None else f', that of class "{hardest}" by {points(losses[hardest], images)}'
        yield Finding(
            "good",
            f"The expert that is missed most is {worst['expert']} of {title}: without it, its patches going to the "
            f"router's next best, {cost(worst)}{of_class}. Shown to be needed: {len(needed)} of {len(rows)} experts.",
        )
    elif worst["difference"] < 0:
        yield Finding(
            "bad",
            f"No single expert is shown to be needed: of {len(rows)} that were knocked out, one at a time, the largest "
            f"loss is without expert {worst['expert']} of {title}: {cost(worst)}.",
        )
    else:
        text = f"No single expert is missed: whichever of {len(rows)} is knocked out, {name} is no lower."
        yield Finding("bad", text)
    harmful = [row for row in rows if row["low"] > 0]
    if harmful:
        best = max(harmful, key=lambda row: float(row["difference"]))
        more = f"; so do {len(harmful) - 1} more" if len(harmful) > 1 else ""
        text = f"Expert {best['expert']} of {_title(report, best['layer'])} does harm: without it {cost(best)}{more}."
        yield Finding("bad", text)


def _owned(layer: Report, task: TaskName) -> Iterator[Finding]:
    found = owners(layer)
    if layer["specialisation"] is None:
        yield Finding("note", "No patch has a class here, so nothing is known of experts and classes.")
    elif found:
        cases = [
            f'expert {owner.expert} serves {share_text(owner.share)} of "{owner.name}" and '
            f"{share_text(owner.load)} of all"
            for owner in found[:MOST_OWNERS]
        ]
        more = f"; and {len(found) - MOST_OWNERS} more" if len(found) > MOST_OWNERS else ""
        text = f"Classes that one expert owns, by shares of patches: {'; '.join(cases)}{more}."
        if _tells_class_at_a_place(layer):
            yield Finding("good", text)
        else:
            yield Finding("note", f"{text} It may owe them to where they lie.")
    elif _tells_class(layer, task):
        yield Finding("note", "No expert owns a class, but classes are spread over the experts unevenly.")
    elif _tells_class_at_a_place(layer):
        yield Finding("note", "On the whole experts do not differ by class, but among patches of one place they do.")
    else:
        yield Finding("bad", "Experts do not differ by class: each class is spread over them as all patches are.")


def _place(layer: Report) -> Iterator[Finding]:
    if not _goes_by_place(layer):
        return
    numbers = layer["specialisation"]
    text = (
        f"Much of the routing follows from the place alone: mutual information {numbers['with_position']:.2f} (by "
        f"chance {numbers['control_position']:.2f})"
    )
    if _tells_class_at_a_place(layer):
        yield Finding("note", f"{text}; among patches of one place the expert still tells something of the class.")
    else:
        yield Finding("bad", f"{text}; among patches of one place the expert tells nothing of the class.")


def _dead_of(layer: Report) -> Iterator[Finding]:
    if layer["health"]["dead"]:
        dead = " or ".join(map(str, layer["health"]["dead_experts"]))
        yield Finding("bad", f"Dead: no patch goes to expert {dead}.")


def _health(layer: Report) -> Iterator[Finding]:
    health = layer["health"]
    if (health["max_min"] or 0) > UNEVEN:  # None where experts are dead, which is said apart
        yield Finding("bad", f"Uneven: the busiest expert has {health['max_min']:.1f} times the load of the idlest.")
    if health["drop_rate"] > DROPPED:
        yield Finding("bad", f"{share_text(health['drop_rate'])} of the patches are dropped for lack of capacity.")


def _sharp(layer: Report) -> Iterator[Finding]:
    gate, blind = layer["sharpness"]["gate"], 1 / layer["experts"]
    if layer["experts"] > 1 and gate < UNSURE * blind:
        yield Finding(
            "bad",
            f"The router hardly decides: its mean gate value is {gate:.2f}, and {blind:.2f} is that of one that cannot "
            "tell.",
        )


def _beyond_chance(layer: Report, what: str) -> float:
    numbers = layer["specialisation"]
    return float(numbers[f"with_{what}"] - numbers[f"control_{what}"])


def _tells_class(layer: Report, task: TaskName) -> bool:
    # To classify, all patches of an image have its class. Where they share an expert, too, such as those of a dark
    # image, few images tie experts to classes by chance, and a control that shuffles patches does not see it; among the
    # patches of one place, of which an image has one, it does.
    return _beyond_chance(layer, "class") > APART and (task == "segment" or _tells_class_at_a_place(layer))


def _tells_class_at_a_place(layer: Report) -> bool:
    return _beyond_chance(layer, "class_given_position") > APART


def _goes_by_place(layer: Report) -> bool:
    return layer["specialisation"] is not None and _beyond_chance(layer, "position") > BY_PLACE


def _digits(images: int) -> int:
    return min(1, score_digits(images))


def _title(report: Report, name: str) -> str:
    return next(str(layer["title"]) for layer in report["layers"] if layer["name"] == name)


def _change(report: Report, row: Report) -> str:
    """An intervention in words, with its layer."""
    where = "in all layers" if row["layer"] is None else f"in {_title(report, row['layer'])}"
    return f"{row_label(row)}, {where}"


def _rows(report: Report) -> list[dict[str, Any]]:
    return [] if report["interventions"] is None else report["interventions"]["rows"]


def _row(report: Report, name: str) -> dict[str, Any] | None:
    """The intervention of that name in all layers."""
    return next((row for row in _rows(report) if row["name"] == name and row["layer"] is None), None)
