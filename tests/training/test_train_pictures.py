"""Pictures of a run, from figures made by hand."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pcenet.reporting.plots import as_label, confusion, curves, expert_load, new_figure, pictures_of, png_of
from pcenet.runs.folder import RunFolder
from pcenet.training.run import draw
from pcenet.training.trackers import Trackers

DENSE = [
    {"epoch": 1, "train/loss": 2.0, "train/task_loss": 1.9, "val/loss": 1.5, "val/top1": 0.4, "train/lr": 0.003},
    {"epoch": 2, "train/loss": 1.0, "train/task_loss": 0.9, "val/loss": 1.2, "val/top1": 0.6, "train/lr": 0.001},
]
ROUTED = [
    row
    | {"val_router/stages.0.0.body/load_0": load, "val_router/stages.0.0.body/load_1": 1 - load}
    | {"train_router/stages.0.0.body/drop_rate": load / 2}
    for row, load in zip(DENSE, (0.25, 0.75), strict=True)
]


def run_in(folder: Path) -> Any:
    return SimpleNamespace(folder=RunFolder(folder))


RESULT = SimpleNamespace(confusion=[[3, 1], [0, 2]], per_class={"leaf": {}, "sky": {}})


def pictures() -> Any:
    return pictures_of(ROUTED, RESULT.confusion, list(RESULT.per_class), ["val/top1"]).items()


def test_curves_show_the_figures_of_every_epoch() -> None:
    losses, scores, rate = curves(DENSE, ("val/top1",)).axes
    assert {line.get_label(): list(line.get_ydata()) for line in losses.lines} == {
        "train/loss": [2.0, 1.0],
        "train/task_loss": [1.9, 0.9],
        "val/loss": [1.5, 1.2],
    }
    assert list(scores.lines[0].get_xdata()) == [1, 2]
    assert list(scores.lines[0].get_ydata()) == [0.4, 0.6]
    assert list(rate.lines[0].get_ydata()) == [0.003, 0.001]


def test_confusion_is_in_shares_of_each_class() -> None:
    axis = confusion([[3, 1], [0, 2]], ["leaf", "sky"]).axes[0]
    assert axis.images[0].get_array().tolist() == [[0.75, 0.25], [0.0, 1.0]]
    assert [text.get_text() for text in axis.texts] == ["75%", "25%", "0%", "100%"]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["leaf", "sky"]


def test_a_class_without_images_has_an_empty_row() -> None:
    axis = confusion([[1, 1], [0, 0]], ["leaf", "sky"]).axes[0]
    assert axis.images[0].get_array().tolist() == [[0.5, 0.5], [0.0, 0.0]]


def test_loads_are_stacked_and_drops_drawn_beside() -> None:
    load, dropped = expert_load(ROUTED).axes
    bars = [[(bar.get_y(), bar.get_height()) for bar in container] for container in load.containers]
    assert bars == [[(0, 0.25), (0, 0.75)], [(0.25, 0.75), (0.75, 0.25)]]
    assert load.get_ylabel() == "stages.0.0"
    assert list(dropped.lines[0].get_ydata()) == [0.125, 0.375]


def test_epochs_of_a_version_that_counted_in_training_have_no_load() -> None:
    before = DENSE[0] | {"router/stages.0.0.body/load_0": 0.5, "router/stages.0.0.body/load_1": 0.5}
    load, _ = expert_load([before, ROUTED[1]]).axes
    assert [[bar.get_height() for bar in container] for container in load.containers] == [[0.75], [0.25]]
    assert "expert_load" not in pictures_of([before], RESULT.confusion, ["leaf", "sky"], ["val/top1"])


def test_many_experts_leave_room_for_their_load(tmp_path: Path) -> None:
    """A legend of 64 would leave none, and matplotlib would warn, which is an error here."""
    loads = {f"val_router/stages.0.0.body/load_{expert}": 1 / 64 for expert in range(64)}
    figure = expert_load([row | loads | {"train_router/stages.0.0.body/drop_rate": 0.0} for row in DENSE])
    figure.savefig(tmp_path / "load.png")
    assert figure.axes[0].get_position().height > 0.5


def test_a_dense_network_has_no_load() -> None:
    assert set(pictures_of(DENSE, RESULT.confusion, ["leaf", "sky"], ["val/top1"])) == {"curves", "confusion"}
    with pytest.raises(ValueError, match="network without PCE layers"):
        expert_load(DENSE)


def test_the_run_folder_gets_them(tmp_path: Path) -> None:
    for _ in range(2):  # those of an earlier attempt are replaced
        draw(run_in(tmp_path), Trackers({}), 20, pictures)
    files = {path.name: path.read_bytes()[:8] for path in (tmp_path / "pictures").iterdir()}
    assert files == dict.fromkeys(("curves.png", "confusion.png", "expert_load.png"), b"\x89PNG\r\n\x1a\n")
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


def test_without_matplotlib_one_warning_and_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with caplog.at_level(logging.WARNING, "pcenet"):
        draw(run_in(tmp_path), Trackers({}), 20, pictures)
    missing = "pictures need matplotlib: pip install 'pcenet[plot]'"
    assert caplog.messages == [f"{missing}; {tmp_path / 'pictures'} was not drawn"]
    assert list(tmp_path.iterdir()) == []


def test_names_that_are_no_valid_unicode_are_drawn() -> None:
    """A folder's name of the bytes 63 61 66 e9, Latin-1's "café", as Python reads it from a disk."""
    figure = confusion([[1, 0], [0, 1]], [b"caf\xe9".decode(errors="surrogateescape"), "tea"])
    figure.canvas.draw()
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["caf\\udce9", "tea"]


@pytest.mark.parametrize(
    ("name", "drawn"), [("$x^2$", "$x^2$"), ("a$b", "a$b"), ("_background_", " _background_"), ("a\x1b\n", "a\\x1b\\n")]
)
def test_names_are_neither_formulas_nor_left_out_of_legends(name: str, drawn: str) -> None:
    figure = new_figure(2, 2)
    axis = figure.subplots()
    axis.plot([0], label=as_label(name))
    (text,) = axis.legend().get_texts()
    figure.canvas.draw()
    # What is drawn of a text that is no formula.
    assert text._preprocess_math(text.get_text()) == (drawn, False)


def test_letters_that_the_font_lacks_are_no_warning() -> None:
    assert png_of(confusion([[1, 0], [0, 1]], ["\u65e5\u672c", "b"])).startswith(b"\x89PNG")
