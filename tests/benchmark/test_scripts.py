"""The scripts under ``benchmarks/``: the guard's verdict by hand, figures in the pages, the profile's rows."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The guard with a record of its own, whose figures a test sets."""
    module = script("guard")
    monkeypatch.setattr(module, "RECORDED", tmp_path / "guard.json")
    monkeypatch.setattr(module.torch, "set_num_threads", lambda _threads: None)
    return module


@pytest.mark.parametrize(
    ("ratios", "slow"),
    [
        ([1.0], False),
        ([3.0], False),  # one and a half times 2
        ([3.1, 2.9], False),  # once is not enough
        ([3.1, 3.2], True),
    ],
)
def test_a_layer_is_too_slow_by_more_than_half_and_twice(
    guard: ModuleType, ratios: list[float], slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (case, *_) = guard.CASES
    measured = iter(ratios)
    monkeypatch.setattr(guard, "ratio", lambda _case: next(measured))
    found = guard.behind([case], {str(case): 2.0})
    assert found == ({str(case): min(ratios)} if slow else {})
    assert not list(measured)


def test_the_guard_fails_says_what_it_does_not_know_and_records(
    guard: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(guard, "ratio", lambda _case: 1.0)
    assert guard.main([]) == 0
    assert "NOTHING WAS CHECKED: no speed is recorded for" in capsys.readouterr().out
    assert guard.main(["--record"]) == 0
    assert guard.main([]) == 0
    assert "NOT" not in capsys.readouterr().out
    (recorded,) = json.loads(guard.RECORDED.read_text()).values()
    assert recorded["ratios"] == {str(case): 1.0 for case in guard.CASES}

    monkeypatch.setattr(guard, "ratio", lambda case: 1.6 if case.training else 1.0)
    assert guard.main([]) == 1
    complaints = capsys.readouterr().err.splitlines()
    assert len(complaints) == len(guard.CASES) // 2
    assert all("forward and backward: 1.60 times the dense block's time" in line for line in complaints)

    monkeypatch.setattr(guard, "CASES", (guard.CASES[0]._replace(experts=5),))
    assert guard.main([]) == 0
    assert "NOT CHECKED, no ratio is recorded: 32x64x32x8, 5 experts, halo, forward" in capsys.readouterr().out


def test_the_guard_measures(guard: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "ROUNDS", 2)
    for training in (False, True):
        assert 0 < guard.ratio(guard.Case(guard.Shape(2, 8, 8, 4), 2, "halo", training)) < math.inf


def test_pages_are_up_to_date() -> None:
    report = script("report")
    for page in report.PAGES:
        text = page.read_text(encoding="utf-8")
        assert "<!-- bench: end -->" in text
        assert report.filled(text) == text, "run python benchmarks/report.py"


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks" / "results").glob("table-*.json")), ids=lambda f: f.stem)
def test_figures_of_cost_are_those_of_the_raw_results(file: Path) -> None:
    """A row per line of the table: cases, geometric mean, worst case, must, goal, verdict."""
    table = json.loads(file.read_text(encoding="utf-8"))
    machine = table["machine"]
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    part = page[page.index(f"**{machine['kind']}**: {machine['processor']}, {machine['threads']} threads") :]
    for verdict in table["verdicts"]:
        found = [record for record in table["records"] if record["line"] == verdict["line"]]
        figures = [record["s" if "time to compile" in verdict["line"] else "ratio"] for record in found]
        mean = math.exp(sum(map(math.log, figures)) / len(figures))
        row = re.search(rf"^\| {re.escape(verdict['line'])} \|(.*)\|$", part, re.MULTILINE)
        assert row, verdict["line"]
        cells = [cell.strip().removesuffix(" s") for cell in row[1].split("|")]
        digits = 0 if "time to compile" in verdict["line"] else 2
        assert cells == [
            str(len(figures)),
            *(f"{value:.{digits}f}" for value in (mean, max(figures), verdict["must"], verdict["goal"])),
            "yes" if mean <= verdict["must"] and max(figures) <= 1.2 * verdict["must"] else "no",
        ]


def record(line: str, ratio: float, **more: Any) -> dict[str, Any]:
    plain = {"line": line, "ratio": ratio, "beside": "dense", "name": "x", "measure": "step", "precision": "fp32"}
    return {**plain, "compiled": False, "base_ms": 10.0, **more}


def test_the_summary_and_the_twins_by_hand() -> None:
    report = script("report")
    result = {
        "machine": {"processor": "Chip", "kind": "AVX2", "threads": 2},
        "records": [
            record("layer, forward, zero", 1.0, name="a"),
            record("layer, forward, halo", 4.0, name="a", base_ms=8.0),
            record("layer, forward, bfloat16", 9.0, precision="bf16", name="a"),
            record("layer, forward and backward, zero", 3.0, name="b", compiled=True),
            record("network, peak memory of a training step", 1.1, base_ms=7.0, beside="4 experts"),
        ],
    }
    # Geometric mean of 1 and 4; the network was not measured.
    assert report.summary([result]).splitlines()[-1] == "| Chip, AVX2 | 2.00 | 3.00 | | | 1.10 |"
    assert report.twins([result]).splitlines()[2:] == [
        "| a, step, fp32 | 8.0 |",
        "| a, step, bf16 | 10.0 |",
        "| b, step, fp32, compiled | 10.0 |",
    ]


def test_the_profile_has_a_row_for_each_operator_on_large_tensors() -> None:
    profile_step = script("profile_step")
    large, small = torch.ones(400, 400), torch.ones(4, 4)
    found = profile_step.profile(lambda _index: (large.mm(large), torch.cat([large]), small.exp()))
    assert set(found) == {"aten::mm", "aten::cat", "bookkeeping"}


def test_little_rows_of_a_profile_are_put_together() -> None:
    together = script("profile_step").together
    columns = {
        "dense": {"aten::mm": 99.0, "aten::exp": 0.5, "aten::log": 0.5},
        "PCE": {"aten::mm": 10.0, "aten::log": 90.0, "pcenet::patch_conv2d": 0.1},
    }
    assert together(columns) == {
        "dense": {"aten::mm": 99.0, "aten::log": 0.5, "other": 0.5},
        "PCE": {"aten::mm": 10.0, "aten::log": 90.0, "pcenet::patch_conv2d": 0.1, "other": 0},
    }


def test_the_profile_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    script("profile_step").main(["1x8x8x4", "--experts", "2", "--threads", "1"])
    out = capsys.readouterr().out
    assert "of which router" in out
    assert "bookkeeping" in out
