"""`pcenet models` and docs/models.md say what the raw results say."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest
import zoo as zoo_script  # experiments/zoo.py

from pcenet import cli, zoo
from pcenet.catalogue import bundled, networks

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
T_OF = {3: 4.302653, 4: 3.182446, 5: 2.776445}  # by seeds: Student's t at 97.5 %, from a printed table


def test_the_stored_results_and_the_page_are_up_to_date() -> None:
    assert zoo_script.measured() == zoo.results(), "run python experiments/zoo.py"
    page = zoo_script.PAGE.read_text(encoding="utf-8")
    assert page.count("<!-- zoo: end -->") == 3
    assert zoo_script.filled(page) == page, "run python experiments/zoo.py"


@pytest.mark.parametrize("name", bundled())
def test_scores_are_those_of_the_runs(name: str) -> None:
    """From the files of the single runs: mean and interval over the seeds, and the score of the weights' own run."""
    data, network = name.split("/")
    files = sorted((RESULTS / f"finals-{data}").glob(f"{network}-*/metrics.json"))
    seeds = len(files)
    found = [json.loads(file.read_text(encoding="utf-8"))["val"] for file in files]
    stored = zoo.results()["weights"][name]
    scores = [each[stored["score"]] for each in found]
    assert stored["seeds"] == seeds
    assert stored["mean"] == pytest.approx(sum(scores) / seeds)
    if seeds == 1:
        assert stored["half_width"] is None
    else:
        assert stored["half_width"] == pytest.approx(T_OF[seeds] * statistics.stdev(scores) / seeds**0.5, rel=1e-6)
    assert stored["value"] == pytest.approx(scores[0], abs=5e-5)
    assert stored["images"] == found[0]["images"]


def test_every_network_has_a_row_on_the_page() -> None:
    page = zoo_script.PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", page, re.MULTILINE)
    assert {name for name, _ in rows} == networks().keys()
    cells = {name: [[cell.strip() for cell in row.split("|")] for own, row in rows if own == name] for name, _ in rows}
    for name, found in cells.items():
        weights = [f"`{each}`" for each in bundled() if each.endswith(f"/{name}")]
        assert [row[0] for row in found] == (weights or ["none"])
        assert all(bool(row[1]) == bool(weights) for row in found)  # no weights, no score


def test_size_and_cost_are_those_at_which_weights_were_measured() -> None:
    """The network's own where there are none, or where they are of that size; speed is of the latter alone."""
    found = {row[1]: row[3:5] + row[6:7] for row in zoo.rows("segment")}
    assert found["scenes/pce_unet_nano"] == ["128 x 128", "0.23 G", ""]
    assert found["camvid/pce_unet_nano"][:2] == ["192 x 256", "0.70 G"]
    assert found["camvid/pce_unet_nano"][2]


def test_the_cells_by_hand() -> None:
    score = {"score": "top1", "mean": 0.8569333, "half_width": 0.0060713, "images": 5000}
    assert zoo.score_cell(score) == "85.69 ± 0.61"
    assert zoo.score_cell(score | {"score": "miou", "images": 101}) == "85.7 ± 0.6"
    assert zoo.score_cell(score | {"half_width": None}) == "85.69"
    assert zoo.score_cell(None) == ""
    assert zoo.count_cell(35_239_872) == "35.2 M"
    assert zoo.count_cell(1_969_000_000) == "1.97 G"


def test_speed_is_of_networks_that_are_not_compiled() -> None:
    about = {"what": "model", "name": "a", "precision": "fp32", "measure": "step", "compiled": False, "ratio": 0.5}
    records = [
        about,
        about | {"compiled": True, "ratio": 9},
        about | {"precision": "bf16", "ratio": 9},
        about | {"measure": "latency", "ratio": 1.5},
        about | {"measure": "memory", "ratio": 9},
        about | {"what": "layer", "name": "b"},
    ]
    machine = {"processor": "P", "kind": "K", "threads": 3, "torch": "2"}
    assert zoo_script.speed({"machine": machine, "records": records}) == {
        "processor": "P",
        "kind": "K",
        "threads": 3,
        "precision": "fp32",
        "ratios": {"a": {"step": 0.5, "latency": 1.5}},
    }


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (row,) = [line for line in lines if line.startswith("pce_nano ")]
    assert re.split(r"\s{2,}", row)[2] == zoo.score_cell(zoo.results()["weights"]["cifar10/pce_nano"])
    assert re.split(r"\s{2,}", row)[1:2] == ["cifar10/pce_nano"]
    ratios = zoo.results()["speed"]["ratios"]["pce_nano"]
    assert re.split(r"\s{2,}", row)[-2:] == [f"{ratios['step']:.2f}, {ratios['latency']:.2f}", "dense_nano"]
    assert any("has no score" in line for line in lines)
    assert cli.main(["models", "--json"]) == 0
    found = {each["name"]: each for each in json.loads(capsys.readouterr().out)}
    assert found["pce_nano"]["scores"] == {"cifar10": zoo.results()["weights"]["cifar10/pce_nano"]}
    assert found["pce_nano"]["weights"] == ["cifar10"]
    assert (found["pce_small"]["scores"], found["pce_small"]["time"]) == ({}, {})
