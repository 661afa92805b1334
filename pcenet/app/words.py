"""What the page says, as HTML. Every text that is not ours (names of classes, files and layers) is escaped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape as escape_html

import numpy as np

from pcenet.app.pictures import expert_colour
from pcenet.app.session import Box, Change, LayerRouting, View, Visit, change
from pcenet.reporting.colours import class_colours
from pcenet.reporting.numbers import share_text
from pcenet.texts import shown

MOST_CLASSES = 8  # in the list under a prediction
TO = " → "
VIEWS: dict[View, str] = {
    "after": "prediction",
    "before": "before",
    "change": "what changed",
    "truth": "true mask",
    "image": "image",
}


def escape(text: str) -> str:
    """A text that is not ours as HTML, as it may be `shown`."""
    return escape_html(shown(text))


def short_name(layer: str) -> str:
    """A layer's name without what all names of PCE layers end in."""
    return layer.removesuffix(".body")


def layer_title(layer: str, layers: Mapping[str, LayerRouting]) -> str:
    """A layer in a list to choose from: where in the network it is, its patches, its name."""
    number, count = list(layers).index(layer) + 1, len(layers)
    part = f", {('early', 'middle', 'late')[min(2, 3 * (number - 1) // (count - 1))]}" if count > 1 else ""
    rows, columns = layers[layer].grid
    return f"Layer {number} of {count}{part}: {rows} x {columns} patches ({short_name(layer)})"


def notice(text: str = "") -> str:
    """A message that a screen reader reads out when it appears; empty when there is nothing to say."""
    return f'<div role="alert" class="pce-notice">{escape(text)}</div>' if text else ""


def swatch(colour: Sequence[int], text: str = "") -> str:
    """A spot of a colour, with a number in it."""
    return f'<span class="pce-swatch" style="background:rgb{tuple(colour)}"><span>{escape(text)}</span></span>'


def expert_legend(routing: LayerRouting) -> str:
    """The experts of a layer: colour, number, how many patches."""
    counts = Counter(routing.serving.ravel().tolist())
    items = [
        f"{swatch(expert_colour(expert), str(expert))}expert {expert}: {patches(counts[expert])}"
        for expert in range(routing.num_experts)
    ]
    if counts[-1]:
        items.append(f"{swatch(expert_colour(-1), '-')}dropped: {patches(counts[-1])}")
    return _legend("Experts of this layer", items)


def patches(count: int) -> str:
    """A number of patches."""
    return f"{count} patch" if count == 1 else f"{count} patches"


def class_list(visit: Visit, classes: Sequence[str]) -> str:
    """The classes with the largest shares; where patches were sent elsewhere, before and after it.

    To segment, each has the colour that it has in the picture.
    """
    before, after = visit.before.shares, visit.after.shares
    segment = visit.before.mask is not None
    items = []
    for number in np.argsort(-np.maximum(before, after), kind="stable")[:MOST_CLASSES].tolist():
        spot = swatch(class_colours()[number], str(number)) if segment else ""
        past = f"{share_text(before[number])}{TO}" if visit.moves else _bar(after[number])
        items.append(f"{spot}{escape(classes[number])} {past}{share_text(after[number])}")
    return _legend("Classes by their " + ("share of the pixels" if segment else "probability"), items)


def headline(visit: Visit, classes: Sequence[str]) -> str:
    """The prediction in one line, and how right it is where that is known."""
    largest = np.argsort(-visit.after.shares, kind="stable")[:3].tolist()
    if visit.after.mask is None:
        best, truth = largest[0], visit.image.truth
        known = f" (true class: {escape(truth)})" if isinstance(truth, str) else ""
        said = f"<strong>{escape(classes[best])}</strong>, probability {share_text(visit.after.shares[best])}{known}"
        return f"<h2>Prediction: {said}</h2>"
    right = [visit.image.right(outcome) for outcome in (visit.before, visit.after)][0 if visit.moves else 1 :]
    if shares := [share_text(share) for share in right if share is not None]:
        return f"<h2>Prediction: {TO.join(shares)} of pixels right</h2>"
    named = ", ".join(
        f"{escape(classes[n])} {share_text(visit.after.shares[n])}" for n in largest if visit.after.shares[n]
    )
    return f"<h2>Prediction: {named} of the pixels</h2>"


def patch_answer(visit: Visit) -> str:
    """What there is to know of the patch that is pointed at, and where on the page that is said; else nothing."""
    if visit.patch is None:
        return ""
    row, column = visit.patch
    routing = visit.routing
    gate, own, served = routing.gate[row, column], routing.preferred[row, column], routing.serving[row, column]
    if visit.place in visit.moves:
        said = f"you sent it to {_expert(served)}, the router chose {_expert(own)}, gate value {gate:.3f}."
    else:
        said = f"the router chose {_expert(own)}, <strong>gate value {gate:.3f}</strong>."
    lines = [f"Row {row}, column {column}: {said}", *_further(routing, row, column)]
    return f'<p class="pce-patch">{" ".join(lines)}{_place(routing.box(row, column, (1000, 1000)))}</p>'


def _place(box: Box) -> str:
    """Puts the frame on a patch, and the panel below or above it. ``box``: thousandths of the picture."""
    left, top, right, bottom = (edge / 10 for edge in box)
    beside = f"top:{bottom}%" if top + bottom <= 100 else f"bottom:{100 - top:.1f}%"
    frame = f"left:{left}%;top:{top}%;width:{right - left:.1f}%;height:{bottom - top:.1f}%"
    return f"<style>#experts::after{{{frame}}}#panel{{left:max(0px,min({left}%,100% - var(--panel)));{beside}}}</style>"


def expert_choices(visit: Visit) -> list[tuple[str, int]]:
    """Where the patch that is pointed at may go: each expert with the router's probability."""
    probs = visit.routing.probs[visit.patch or (0, 0)]
    return [(f"expert {number}: {share_text(share)}", number) for number, share in enumerate(probs.tolist())]


def _further(routing: LayerRouting, row: int, column: int) -> list[str]:
    """What is only sometimes worth saying: further experts, what was dropped, factors that are not the gate value."""
    lines = []
    choice, weight, kept = (
        values[row, column] for values in (routing.expert_ids, routing.weight, routing.dispatch_mask)
    )
    if len(choice) > 1:
        lines.append("It is served by experts " + ", ".join(str(expert) for expert in choice) + ".")
    if not kept.all():
        lines.append("Dropped for lack of capacity: " + ", ".join(str(expert) for expert in choice[~kept]) + ".")
    if not np.isclose(weight[0], routing.gate[row, column], atol=1e-3):
        factors = ", ".join(f"{factor:.3f}" for factor in weight)
        lines.append(f"The factor of an expert's output is not the gate value in this network but {factors}.")
    return lines


def _expert(number: int) -> str:
    return "no expert" if number < 0 else f"<strong>expert {number}</strong>"


def change_report(visit: Visit, classes: Sequence[str]) -> str:
    """What sending patches elsewhere did to the prediction."""
    if not visit.moves:
        return "<p>Click on a patch, and send it to another expert.</p>"
    found = change(visit)
    counts = Counter(place.layer for place in visit.moves)
    sent = ", ".join(f"{patches(count)} of {escape(short_name(layer))}" for layer, count in counts.items())
    if len(visit.moves) == 1:
        ((place, expert),) = visit.moves.items()
        sent += f" (row {place.row}, column {place.column}, to expert {expert})"
    return f"<p>You moved {sent}: {_effect(visit, found, classes)}{_followers(found)}</p>"


def _effect(visit: Visit, found: Change, classes: Sequence[str]) -> str:
    if found.pixels is not None:
        count, total = int(found.pixels.sum()), found.pixels.size
        return f"<strong>{share_text(count / total)} of the pixels</strong> ({count}) changed their class."
    old, new = (int(outcome.shares.argmax()) for outcome in (visit.before, visit.after))
    change = TO.join(f"{outcome.shares[new]:.2%}" for outcome in (visit.before, visit.after))
    if old == new:
        return f"still <strong>{escape(classes[new])}</strong>, probability {change}."
    return f"<strong>{escape(classes[old])} became {escape(classes[new])}</strong>, whose probability went {change}."


def _followers(found: Change) -> str:
    if not found.followers:
        return ""
    named = ", ".join(f"{patches(count)} of {escape(short_name(name))}" for name, count in found.followers.items())
    return f" The router then changed {named} by itself."


def _bar(share: float) -> str:
    return f'<span class="pce-bar" style="--share:{share:.3f}" aria-hidden="true"></span>'


def _legend(label: str, items: Sequence[str]) -> str:
    inside = "".join(f"<li>{item}</li>" for item in items)
    return f'<ul class="pce-legend" aria-label="{label}">{inside}</ul>'


def hints(formats: Sequence[str], megabytes: int, pixels: float) -> str:
    """How to read the pictures, and what may be dropped on the page: so many megabytes, and millions of pixels."""
    return (
        '<p class="pce-hint">Colour and number: the expert. Stronger colour: higher gate value. White frame: sent'
        f" elsewhere. Images of your own: {', '.join(formats)}, at most {megabytes} MB and {pixels:g} million"
        " pixels.</p>"
    )
