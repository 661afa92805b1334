"""Puts the figures of ``benchmarks/results`` into README.md and docs/performance.md: ``python benchmarks/report.py``.

What stands between ``<!-- bench: NAME -->`` and ``<!-- bench: end -->`` is made anew: ``summary`` has a row per kind of
processor, ``tables`` a table of targets for each, ``twins`` the dense twin's own times.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pcenet.benchmark.targets import in_digits

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md")
MARKED = re.compile(r"(<!-- bench: (?!end)(\w+) -->\n).*?(?=<!-- bench: end -->)", re.DOTALL)
# Titles of the summary's columns, and which lines they are made of.
SUMMARY = {
    "layer, forward": r"layer, forward, (zero|halo|exchange)",
    "layer, forward and backward": r"layer, forward and backward, (zero|halo|exchange)",
    "network, training step": "network, training step",
    "network, batch 1": "network, batch 1",
    "network, peak memory": "network, peak memory of a training step",
}


def main() -> None:
    """Write the pages."""
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


def filled(text: str) -> str:
    """A page with its tables made anew."""
    files = sorted((ROOT / "benchmarks" / "results").glob("table-*.json"))
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return MARKED.sub(lambda found: found[1] + PARTS[found[2]](results), text)


def summary(results: Sequence[dict[str, Any]]) -> str:
    """A row per kind of processor: geometric means in float32."""
    rows = []
    for result in results:
        about = result["machine"]
        cells = [f"{about['processor']}, {about['kind']}"]
        for pattern in SUMMARY.values():
            ratios = [r["ratio"] for r in result["records"] if re.fullmatch(pattern, r["line"] or "")]
            cells.append(f"{math.exp(sum(map(math.log, ratios)) / len(ratios)):.2f}" if ratios else "")
        rows.append(cells)
    return markdown(["", *SUMMARY], rows)


def tables(results: Sequence[dict[str, Any]]) -> str:
    """The tables of targets, one for each kind of processor."""
    parts = []
    for result in results:
        about = result["machine"]
        rows = [
            [
                verdict["line"],
                str(verdict["cases"]),
                *(in_digits(verdict[key], verdict["figure"]) for key in ("mean", "worst", "must", "goal")),
                "yes" if verdict["holds"] else "no",
            ]
            for verdict in result["verdicts"]
        ]
        parts.append(
            f"**{about['kind']}**: {about['processor']}, {about['threads']} threads, backend {about['backend']}, "
            f"torch {about['torch']}, pcenet {about['pcenet']}, {about['date']}.\n\n"
            + markdown(["", "cases", "mean", "worst", "must", "goal", "holds"], rows)
        )
    return "\n".join(parts)


def twins(results: Sequence[dict[str, Any]]) -> str:
    """Milliseconds of the dense twin, a row for each thing measured and a column for each kind of processor.

    A twin is measured anew for every number of experts: the least of its medians stands here.
    """
    times: dict[str, dict[str, float]] = {}
    for result in results:
        for record in result["records"]:
            if record["beside"] == "dense" and "base_ms" in record:
                compiled = ", compiled" if record["compiled"] else ""
                row = times.setdefault(f"{record['name']}, {record['measure']}, {record['precision']}{compiled}", {})
                kind = result["machine"]["kind"]
                row[kind] = min(row.get(kind, math.inf), record["base_ms"])
    kinds = [result["machine"]["kind"] for result in results]
    rows = [[name, *(f"{row[kind]:.1f}" if kind in row else "" for kind in kinds)] for name, row in times.items()]
    return markdown(["ms", *kinds], rows)


PARTS: dict[str, Callable[[Sequence[dict[str, Any]]], str]] = {"summary": summary, "tables": tables, "twins": twins}


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("".join(f"| {cell} " if cell else "| " for cell in line) + "|\n" for line in lines)


if __name__ == "__main__":
    main()
