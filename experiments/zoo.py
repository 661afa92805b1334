"""Scores and speed of the networks: writes ``pcenet/results.json``, and the tables of docs/models.md.

    python experiments/zoo.py

Scores are of the runs in ``experiments/results/finals-DATA``, and of the cards of the weights of the package;
speed is of the newest ``benchmarks/results/table-KIND.json``. What was not measured is left out.
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pcenet
from pcenet import zoo
from pcenet.catalogue import bundled, weights_root
from pcenet.comparison.statistics import half_width

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
TABLES = ROOT / "benchmarks" / "results"
STORED = Path(pcenet.__file__).parent / "results.json"
PAGE = ROOT / "docs" / "models.md"
MARKED = re.compile(r"(<!-- zoo: (?!end)(\w+) -->\n).*?(?=<!-- zoo: end -->)", re.DOTALL)
CARD = re.compile(r"^\| validation \| \S+ ([\d.]+)% of \d+ images \|$", re.MULTILINE)


def main() -> None:
    """Write the file, then the page."""
    STORED.write_text(json.dumps(measured(), indent=1) + "\n", encoding="utf-8")
    zoo.results.cache_clear()
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def measured() -> dict[str, Any]:
    """The content of the file, see `pcenet.zoo.results`."""
    scores = {name: score for name in bundled() if (score := score_of(name))}
    tables = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(TABLES.glob("table-*.json"))]
    return {"weights": scores, "speed": speed(max(tables, key=lambda table: table["machine"]["date"]))}


def score_of(name: str) -> dict[str, Any] | None:
    """The scores of the weights "DATA/NETWORK", and of the seeds trained by their recipe; None without any."""
    data, _, network = name.partition("/")
    files = (RESULTS / f"finals-{data}").glob(f"{network}-[0-9]/metrics.json")
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(files)]
    folder = weights_root() / name
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    own = CARD.search((folder / "README.md").read_text(encoding="utf-8"))
    if not runs or own is None:
        return None
    score = "top1" if runs[0]["task"] == "classify" else "miou"
    values = [run["val"][score] for run in runs]
    return {
        "score": score,
        "value": round(float(own[1]) / 100, 4),
        "mean": statistics.fmean(values),
        "half_width": half_width(values) if len(values) > 1 else None,
        "seeds": len(values),
        "split": "val",
        "images": runs[0]["val"]["images"],
        "epochs": runs[0]["epochs"],
        "input_size": config["pretrained_cfg"]["input_size"][1:],
        "multiply_adds": runs[0]["complexity"]["multiply_adds"],
    }


def speed(table: dict[str, Any]) -> dict[str, Any]:
    """The times of networks relative to their twins', in float32 and uncompiled, out of what `pcenet bench` left."""
    ratios: dict[str, dict[str, float]] = {}
    for record in table["records"]:
        eager = record["precision"] == "fp32" and not record["compiled"]
        if record["what"] == "model" and record["measure"] in zoo.SPEEDS and eager:
            ratios.setdefault(record["name"], {})[record["measure"]] = record["ratio"]
    about = table["machine"]
    return {name: about[name] for name in ("processor", "kind", "threads")} | {"precision": "fp32", "ratios": ratios}


def filled(text: str) -> str:
    """The page with its tables made anew."""
    return MARKED.sub(lambda found: found[1] + PARTS[found[2]](), text)


def table(task: str) -> str:
    """The networks for a task: names in code, figures in one line each."""
    lines = [list(zoo.TITLES), ["---", "---", *["---:"] * (len(zoo.TITLES) - 3), "---"]]
    for row in zoo.rows(task):
        coded = {row[zoo.TITLES.index(title)] for title in ("network", "twin", "weights")} - {"", "none"}
        lines.append([f"`{cell}`" if cell in coded else cell.replace(" ", "\N{NO-BREAK SPACE}") for cell in row])
    return "\n" + "".join("| " + " | ".join(line) + " |\n" for line in lines) + "\n"


PARTS = {
    "classify": lambda: table("classify"),
    "segment": lambda: table("segment"),
    "legend": lambda: "".join(f"- {line}\n" for line in zoo.legend()),
}

if __name__ == "__main__":
    main()
