"""What the page says, as HTML. Every text that is not ours (names of classes, files and layers) is escaped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape as escape_html

import numpy as np

from pcenet.app.pictures import expert_colour
from pcenet.app.session import Change, Floats, LayerRouting, Visit, change
from pcenet.reporting.colours import class_colours
from pcenet.reporting.numbers import share_text
from pcenet.texts import shown

MOST_ROWS = 8  # classes in a table
SMALLEST = 0.00005  # a difference of shares below it is shown as 0
HOW_TO_READ = (
    '<p class="pce-hint">Colour and number: the expert. Stronger colour: higher gate value. Thick frame: the patch that'
    " is pointed at. White frame: sent elsewhere.</p>"
)


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
    return f"{number} of {count}{part}: {rows} x {columns} patches ({short_name(layer)})"


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
        f"<li>{swatch(expert_colour(expert), str(expert))} expert {expert}: {patches(counts[expert])}</li>"
        for expert in range(routing.num_experts)
    ]
    if counts[-1]:
        items.append(f"<li>{swatch(expert_colour(-1), '-')} dropped: {patches(counts[-1])}</li>")
    return f'<ul class="pce-legend" aria-label="Experts of this layer">{"".join(items)}</ul>'


def patches(count: int) -> str:
    """A number of patches."""
    return f"{count} patch" if count == 1 else f"{count} patches"


def points(difference: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return "0" if abs(difference) < SMALLEST else f"{100 * difference:+.2f}"


def class_table(visit: Visit, classes: Sequence[str]) -> str:
    """The classes with the largest shares; where patches were sent elsewhere, before and after it.

    To segment, each has the colour that it has in the picture.
    """
    before, after = visit.before, visit.after
    segment, moved = before.mask is not None, bool(visit.moves)
    kind = "share of pixels" if segment else "probability"
    largest = np.argsort(-np.maximum(before.shares, after.shares), kind="stable")[:MOST_ROWS]
    heads = ["class", *(("router", "now", "points") if moved else (kind,))]
    caption = f"Classes by their {kind}" + (", with the router's choices and now" if moved else "")
    rows = []
    for number in largest.tolist():
        spot = swatch(class_colours()[number], str(number)) if segment else ""
        figures = [share_text(before.shares[number]), share_text(after.shares[number])] if moved else []
        figures += [points(after.shares[number] - before.shares[number])] if moved else [_bar(after.shares, number)]
        rows.append([f"{spot} {escape(classes[number])}", *figures])
    return _table(caption, heads, rows)


def headline(visit: Visit, classes: Sequence[str]) -> str:
    """The prediction in one sentence."""
    largest = np.argsort(-visit.after.shares, kind="stable")[:3].tolist()
    if visit.after.mask is None:
        best = largest[0]
        return f"<p><strong>{escape(classes[best])}</strong>, probability {share_text(visit.after.shares[best])}</p>"
    named = ", ".join(
        f"{escape(classes[n])} {share_text(visit.after.shares[n])}" for n in largest if visit.after.shares[n]
    )
    return f"<p>Mostly <strong>{named}</strong> of the pixels.</p>"


def patch_answer(visit: Visit) -> str:
    """What there is to know of the patch that is pointed at: its expert, its gate value, all probabilities."""
    if visit.patch is None:
        return '<p class="pce-hint">Click on a patch in the picture, or give its row and column and press Look.</p>'
    row, column = visit.patch
    routing = visit.routing
    probs, own, served = routing.probs[row, column], routing.preferred[row, column], routing.serving[row, column]
    lines = [f"Patch in row {row}, column {column} of <strong>{escape(short_name(visit.layer))}</strong>."]
    if visit.place in visit.moves:
        lines.append(
            f"You sent it to {_expert(served)}. The router would have chosen {_expert(own)}, with gate value"
            f" {probs[own]:.3f}."
        )
    else:
        lines.append(f"The router chose {_expert(own)}, with <strong>gate value {probs[own]:.3f}</strong>.")
    lines += _further(routing, row, column)
    heads = ["expert", "probability"]
    rows = [
        [f"{swatch(expert_colour(expert), str(expert))} {_role(expert, int(own), int(served))}", _bar(probs, expert)]
        for expert in range(routing.num_experts)
    ]
    paragraphs = "".join(f"<p>{line}</p>" for line in lines)
    return paragraphs + _table("The router's probability of each expert for this patch", heads, rows)


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


def _role(expert: int, own: int, served: int) -> str:
    roles = [text for text, holds in (("router's choice", expert == own), ("serves it", expert == served)) if holds]
    return f"expert {expert}" + (f" ({', '.join(roles)})" if roles else "")


def change_report(visit: Visit, classes: Sequence[str]) -> str:
    """What sending patches elsewhere did to the prediction."""
    if not visit.moves:
        return (
            '<p class="pce-hint">Nothing is changed yet. Point at a patch, choose another expert and send the patch'
            " there; patches that you send one after the other add up.</p>"
        )
    found = change(visit)
    sent = "".join(
        f"<li>{escape(short_name(place.layer))}, row {place.row}, column {place.column}: to expert {expert}</li>"
        for place, expert in visit.moves.items()
    )
    return f"<p>Sent elsewhere:</p><ul>{sent}</ul><p>{_effect(visit, found, classes)}</p>{_followers(found)}"


def _effect(visit: Visit, found: Change, classes: Sequence[str]) -> str:
    if found.pixels is not None:
        count, total = int(found.pixels.sum()), found.pixels.size
        return f"<strong>{count} of {total} pixels</strong> ({share_text(count / total)}) changed their class."
    old, new = (int(outcome.shares.argmax()) for outcome in (visit.before, visit.after))
    largest = int(np.abs(found.points).argmax())
    most = f"the largest change is {escape(classes[largest])}, {points(found.points[largest])} points"
    if old == new:
        return f"The class stays <strong>{escape(classes[old])}</strong>; {most}."
    return f"<strong>The class changed</strong> from {escape(classes[old])} to {escape(classes[new])}; {most}."


def _followers(found: Change) -> str:
    if not found.followers:
        return "<p>No other patch changed its expert.</p>"
    named = ", ".join(f"{patches(count)} of {escape(short_name(name))}" for name, count in found.followers.items())
    return f"<p>What the router sees elsewhere changed, too: {named} went to another expert by themselves.</p>"


def _bar(values: Floats, number: int) -> str:
    share = float(values[number])
    return f'<span class="pce-bar" style="--share:{share:.3f}" aria-hidden="true"></span> {share_text(share)}'


def _table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    body = "".join(
        f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    head, body = f"<thead><tr>{head}</tr></thead>", f"<tbody>{body}</tbody>"
    return f'<table class="pce-table"><caption>{caption}</caption>{head}{body}</table>'


STYLE = """
.gradio-container {max-width: 1280px !important; margin: 0 auto !important}
.pce-notice {border: 2px solid #b3261e; border-left-width: 10px; padding: .6em 1em; border-radius: 4px;
  font-weight: 600; overflow-wrap: anywhere}
.pce-swatch {display: inline-grid; place-items: center; min-width: 1.9em; height: 1.6em; border: 1px solid #444;
  border-radius: 3px; vertical-align: middle; font-size: .8em; margin-right: .3em}
.pce-swatch span {background: #fff; color: #000; border-radius: 2px; padding: 0 .25em; line-height: 1.2}
.prose ul.pce-legend {display: flex; flex-wrap: wrap; gap: .3em 1.2em; list-style: none; padding: 0; margin: .2em 0}
.prose ul.pce-legend li {margin: 0; padding: 0; list-style: none}
.prose table.pce-table {border-collapse: collapse; width: 100%; border: 0}
.prose table.pce-table caption {text-align: left; padding: .3em 0}
.prose table.pce-table tr {border: 0; border-bottom: 1px solid var(--border-color-primary)}
.prose table.pce-table th, .prose table.pce-table td {text-align: left; font-weight: normal; border: 0;
  padding: .25em .6em .25em 0; font-variant-numeric: tabular-nums; vertical-align: middle}
.prose table.pce-table td, .prose table.pce-table thead th {white-space: nowrap}
.prose table.pce-table thead th {font-weight: 600}
.pce-bar {display: inline-block; width: 6em; height: .8em; border: 1px solid currentColor; margin-right: .4em;
  background: linear-gradient(to right, #0072B2 calc(var(--share) * 100%), transparent 0)}
.pce-hint {opacity: .85}
#experts img {cursor: crosshair}
@media (max-width: 480px) {.pce-bar {width: 3.5em} #title h1 {font-size: 1.3em} .prose h2 {font-size: 1.15em}}
#samples .grid-wrap {height: auto !important; max-height: none !important; min-height: 0}
#samples .grid-container {grid-template-columns: repeat(auto-fill, minmax(76px, 1fr)) !important}
"""
