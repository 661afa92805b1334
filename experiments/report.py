"""docs/experiments.md and docs/trials.md: the texts of the same names here with tables filled in from the raw results.

    python experiments/report.py

A line ``<!-- trials NAME -->`` becomes the table of ``results/trials/NAME.json``, ``<!-- comparison NAME -->`` the
tables that `pcenet compare` made of the runs of ``NAME.yaml`` under ``results/NAME``, ``<!-- routers NAME -->`` the
router health that `pcenet eval` left in ``results/evaluation/NAME.json``, ``<!-- biases NAME -->`` the table of what
``evaluation_bias.py`` left in ``results/NAME.json``, ``<!-- probes NAME -->`` the table of what ``probe_scenes.py``
left there, of one pair of runs, ``<!-- screening NAME -->`` the table of the trial runs in
``results/screening-NAME.json``, which were scored on held-out training images, ``<!-- content NAME -->`` the table
of what ``routing_content.py`` left in ``results/NAME.json``, and ``<!-- gains NAME,NAME -->`` what each kind of network
gains over the plain twin, a column per comparison.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pcenet.comparison import statistics
from pcenet.comparison.tables import difference_text
from pcenet.reporting.numbers import SCORES, score_digits

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
PAGES = ("experiments.md", "trials.md")
# Rows of the table of gains: the labels that a network has in the comparisons.
KINDS = {
    "PCE": ("pce_nano", "pce_unet_nano"),
    "PCE with 8 experts instead of 4": ("experts_8",),
    "PCE with 16 experts": ("experts_16",),
    "PCE, routed by place alone": ("position_only",),
    "PCE, routed by content alone": ("content_only",),
    "the twin with a learned map of positions": ("dense_nano_position", "dense_unet_nano_position"),
    "the twin with four kernels mixed for each image (CondConv)": ("dense_nano_condconv",),
    "the wide twin, 0.8 times PCE's parameters, all at work": ("dense_nano_wide", "dense_unet_nano_wide"),
}
TWINS = ("dense_nano", "dense_unet_nano")


def main() -> None:
    """Write the pages."""
    for name in PAGES:
        (DOCS / name).write_text(page(name), encoding="utf-8")
        print(f"wrote {DOCS / name}")


def page(name: str) -> str:
    """The content of a page of docs/."""
    text = (HERE / name).read_text(encoding="utf-8")
    return re.sub(r"<!-- (\w+) (\S+) -->", lambda found: TABLES[found[1]](found[2]), text)


def trials_table(name: str) -> str:
    """A row per trial; differences are to the first one."""
    trials = json.loads((HERE / "results" / "trials" / f"{name}.json").read_text(encoding="utf-8"))
    score = next(name for name in SCORES if name in trials[0]["val"])
    trained = ("max/min load in training", "dropped in training")  # the former is 1 by construction under a bias
    header = ["trial", f"val {SCORES[score]}", "points", "train loss", "val loss", *trained]
    rows = []
    for trial in trials:
        router = list(trial["router"].values())
        rows.append(
            [
                f"{trial['label']}: {trial['change']}",
                f"{trial['score']:.2%}",
                "" if trial is trials[0] else f"{100 * (trial['score'] - trials[0]['score']):+.2f}",
                f"{trial['train_loss']:.3f}",
                f"{trial['val']['loss']:.3f}",
                highest_load_ratio(router),
                f"{max(layer['drop_rate'] for layer in router):.1%}" if router else "",
            ]
        )
    return markdown(header, rows)


def highest_load_ratio(router: list[dict[str, Any]]) -> str:
    """Of all layers, in training; empty without layers."""
    ratios = [layer["max_min"] for layer in router]
    if None in ratios:
        return "dead experts"
    return f"{max(ratios):.2f}" if ratios else ""


def routers_table(name: str) -> str:
    """A row per PCE layer: how evaluation spreads the patches of a split over its experts."""
    from pcenet.runs.health import ratio_in_words

    found = json.loads((HERE / "results" / "evaluation" / f"{name}.json").read_text(encoding="utf-8"))
    rows = [
        [
            layer.removesuffix(".body"),
            " ".join(f"{share:.1%}" for share in health["load"]),
            f"{health['entropy']:.3f}",
            ratio_in_words(health),
            str(health["dead"]),
        ]
        for layer, health in found["router"].items()
    ]
    return markdown(["layer", "load of each expert", "entropy", "max/min load", "dead experts"], rows)


def biases_table(name: str) -> str:
    """A row per network and form of its biases at evaluation, as ``evaluation_bias.py`` measured them."""
    from pcenet.runs.health import ratio_in_words

    rows = []
    for found in json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8")):
        score = next(name for name in SCORES if name in found["val"])
        ratios = ", ".join(ratio_in_words(health) for health in found["router"].values())
        form = "as saved" if found["centring"] is None else f"found anew, {found['centring']:g} of the image's mean"
        rows.append(
            [f"`{found['network']}`", form, ratios, f"{found['val'][score]:.2%}", f"{found['val']['loss']:.3f}"]
        )
    return markdown(["network", "biases", "max/min load of each layer", "score on val", "loss"], rows)


def content_table(name: str) -> str:
    """A row per network: its score with its routing and with others, as ``routing_content.py`` measured them."""
    rows = []
    for found in json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8")):
        scores = [f"{score:.2%}" for score in found["top1"].values()]
        shares = ", ".join(f"{share:.0%}" for share in found["commonest"].values())
        rows.append([f"`{found['network']}`", *scores, shares])
    routings = ("as it is", "commonest of its place", "another image's", "random")
    return markdown(["network", *routings, "patches that go to the commonest of their place"], rows)


def comparison_tables(name: str) -> str:
    """The tables of `pcenet compare`, from the ``comparison.json`` that it left."""
    from pcenet.comparison.tables import sheets

    path = HERE / "results" / name / "comparison.json"
    if not path.is_file():
        return f"No run of `experiments/{name}.yaml` is finished yet."
    report = json.loads(path.read_text(encoding="utf-8"))
    done = f"{len(report['runs'])} of {report['planned']} runs are finished.\n\n"
    return done + "\n".join(sheet.markdown().replace("## ", "### ") for sheet in sheets(report)).rstrip()


def gains_table(names: str) -> str:
    """A row per kind of network, a column per comparison: the gain over the plain twin in points, paired by seed."""
    columns = {name: gains(name) for name in names.split(",")}
    rows = [[kind, *(found.get(kind, "") for found in columns.values())] for kind in KINDS]
    return markdown(["points more than the twin", *(f"`{name}.yaml`" for name in columns)], rows)


def gains(name: str) -> dict[str, str]:
    """By kind of network the gain, with its interval where there are three seeds or more."""
    runs = json.loads((HERE / "results" / name / "comparison.json").read_text(encoding="utf-8"))["runs"]

    def scores(labels: tuple[str, ...]) -> dict[int, float]:
        return {run["seed"]: run["score"] for run in runs if run["label"] in labels}

    found = {}
    for kind, labels in KINDS.items():
        gain = statistics.difference(scores(labels), scores(TWINS))
        if gain is not None:
            seeds = len(gain.by_seed)
            text = difference_text(vars(gain), score_digits(runs[0]["val"]["images"]))
            few = f"{text.partition(' ')[0]} ({seeds} seed{'s' * (seeds > 1)})"
            found[kind] = text if seeds > 2 else few
    return found


def probes_table(name: str) -> str:
    """What a linear classifier reads off the features of each layer; both networks and their difference."""
    found = json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))
    first, second = found["networks"]
    (differences,) = found["differences"]
    pixels = found["controls"]["pixels"]["pixels"]["attributes"]
    names = list(pixels)

    def row(label: str, attributes: dict[str, Any], value: str = "accuracy") -> list[str]:
        return [label, *(f"{attributes[name][value]:.1%}" for name in names)]

    rows = [row("chance", pixels, "chance"), row("mean colours of the patch", pixels)]
    for layer, difference in differences.items():
        rows += [row(f"{layer}, `{side['network']}`", side["layers"][layer]["attributes"]) for side in (second, first)]
        changes = (difference[name] for name in names)
        rows.append(
            [f"{layer}, difference", *(f"{100 * each['value']:+.1f} ± {100 * each['error']:.1f}" for each in changes)]
        )
    return markdown(["features", *names], rows)


def screening_table(name: str) -> str:
    """A row per variant: its runs' losses and scores on the images held out for choices, seed by seed."""
    trials = json.loads((HERE / "results" / f"screening-{name}.json").read_text(encoding="utf-8"))
    score = next(key for key in SCORES if key in trials[0]["runs"][0])
    rows = []
    for trial in trials:
        runs = sorted(trial["runs"], key=lambda run: run["seed"])
        figures = [", ".join(f"{run[key]:.3f}" for run in runs) for key in ("loss", "train_loss")]
        rows.append([trial["variant"], figures[0], ", ".join(f"{run[score]:.1%}" for run in runs), figures[1]])
    return markdown(["variant", "dev loss", f"dev {SCORES[score]}", "train loss"], rows)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table: the first column is text, the others are figures."""
    ruler = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ruler, *rows))


TABLES = {
    "trials": trials_table,
    "comparison": comparison_tables,
    "routers": routers_table,
    "biases": biases_table,
    "probes": probes_table,
    "screening": screening_table,
    "content": content_table,
    "gains": gains_table,
}

if __name__ == "__main__":
    main()
