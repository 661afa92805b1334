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
PANEL = "15rem"  # width of the panel of a patch
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
    return f"<style>#experts::after{{{frame}}}#panel{{left:min({left}%,100% - {PANEL});{beside}}}</style>"


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


# A screen reader reads out what changes in a region only if it was marked before; gradio's text has no mark of its own.
HEAD = """<script>
new MutationObserver(() => document.querySelector("#report [data-testid=markdown]")?.setAttribute("role", "status"))
  .observe(document, {childList: true, subtree: true});
</script>"""

STYLE = f"""
.gradio-container {{width: 100%; max-width: 1280px !important; margin: 0 auto !important; --layout-gap: 8px}}
.gradio-container .main.app {{padding: 8px 16px !important}}
.prose h1, .prose h2, .prose p {{margin: 0 !important}}
.prose p {{line-height: 1.4}}
.prose h1 {{font-size: 1.15rem}}
.prose h2 {{font-size: 1rem}}
.pce-notice {{border: 2px solid #b3261e; border-left-width: 10px; padding: .6em 1em; border-radius: 4px;
  font-weight: 600; overflow-wrap: anywhere}}
.pce-swatch {{display: inline-grid; place-items: center; min-width: 1.9em; height: 1.6em; border: 1px solid #444;
  border-radius: 3px; vertical-align: middle; font-size: .8em; margin-right: .3em}}
.pce-swatch span {{background: #fff; color: #000; border-radius: 2px; padding: 0 .25em; line-height: 1.2}}
.prose ul.pce-legend {{display: flex; flex-wrap: wrap; gap: .2em 1em; list-style: none; padding: 0; margin: 0;
  font-size: .9em}}
.prose ul.pce-legend li {{margin: 0; padding: 0; list-style: none; font-variant-numeric: tabular-nums}}
#classes ul.pce-legend {{display: grid; grid-template-columns: repeat(auto-fill, minmax(12rem, 1fr));
  gap: .2em .6em}}
.pce-bar {{display: inline-block; width: 2.5em; height: .7em; border: 1px solid currentColor; margin: 0 .3em;
  background: linear-gradient(to right, #0072B2 calc(var(--share) * 100%), transparent 0)}}
.pce-hint {{opacity: .85; font-size: .85em}}

/* A strip of samples, and beside it the field for an image of one's own. */
#strip {{flex-wrap: nowrap}}
#samples {{flex: 1 1 0; min-width: 0 !important; contain: inline-size}}
#samples .thumbnail-item.selected {{outline: 3px solid var(--color-accent); outline-offset: -3px}}
#samples .grid-wrap {{height: auto !important; max-height: none !important; min-height: 0; padding: 4px}}
#samples .grid-container {{display: flex; overflow-x: auto; padding: 2px; gap: 4px}}
#samples .gallery-item, #samples button {{flex: none; width: 72px; height: 56px}}
#samples .caption-label {{display: none}}
#upload {{flex: 0 0 15rem; min-width: 0 !important}}
#upload .wrap {{flex-direction: row; flex-wrap: wrap; justify-content: center; gap: 0 .4em; min-height: 0; padding: 0;
  font-size: .9rem}}
#upload .icon-wrap {{display: none}}

/* Nothing of it means anything before there is an image. */
#board:not(:has(#experts img)) {{display: none}}

/* The pictures are as wide as the image, and so high that the whole page is seen at once. */
.pce-picture {{width: fit-content; max-width: 100%; border: 0; position: relative; margin: 0 !important}}
.pce-picture .image-container, .pce-picture button, .pce-picture .image-frame {{width: auto; height: auto}}
.pce-picture img {{display: block; width: auto; height: auto; max-width: 100%;
  max-height: max(240px, 100vh - 356px)}}
#experts img {{cursor: crosshair}}
.pce-head {{min-height: 5.6rem}}
#view label {{padding: 4px 8px}}
#view .wrap {{gap: 4px}}
#where, #tools {{align-items: center; flex-wrap: wrap}}
#where > .form, #tools > .form {{display: contents}}
#layer {{flex: 3 1 300px}}
#layer .secondary-wrap {{padding-right: 1.5rem}}
#layer input {{text-overflow: ellipsis}}
#typed {{flex: 1 1 100px}}
#whole {{flex: 0 0 auto; width: auto; border: 0; white-space: nowrap}}
#brush {{flex: 1 1 13rem}}
#tools button {{white-space: nowrap; padding: 0 .8em}}

/* The frame of the patch that is pointed at, and its panel; `_place` says where. */
#patches {{position: relative; width: fit-content; max-width: 100%}}
#experts::after {{content: ""; position: absolute; pointer-events: none; box-sizing: border-box;
  border: 3px solid #000; outline: 3px solid #fff; outline-offset: -6px}}
#patches:not(:has(.pce-patch)) #panel, #patches:not(:has(.pce-patch)) #experts::after {{display: none}}
#panel {{position: absolute; z-index: 5; width: {PANEL}; padding: 8px; border-radius: 6px; gap: 6px; flex: none;
  background: var(--background-fill-primary); border: 2px solid var(--body-text-color)}}
#expert .wrap {{display: grid; gap: 3px; max-height: 12rem; overflow-y: auto}}
#expert label {{padding: 2px 6px; white-space: nowrap}}

@media (max-width: 700px) {{
  .column, .row {{gap: 6px !important}}
  .prose h1, .prose h2 {{font-size: .9rem}}
  .prose p {{font-size: .9rem; line-height: 1.35}}
  #samples .gallery-item, #samples button {{width: 60px; height: 46px}}
  #upload {{flex-basis: 6rem}}
  #upload .wrap {{font-size: .7rem; line-height: 1.1}}
  #where {{flex-wrap: nowrap}}
  #layer {{min-width: 0 !important}}
  #typed {{flex: 0 0 6.5rem; min-width: 0 !important}}
  #board > .column {{display: contents}}
  #legend, #tools {{order: 1}}
  .pce-head {{display: contents}}
  .pce-picture img {{max-height: max(180px, 25vh)}}
  #panel {{position: static; width: 100%}}
  #expert .wrap {{grid-template-columns: 1fr 1fr}}
}}
"""
