"""Data sets that the library datasets has saved."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pcenet.data import DataError, check_data, open_segmentation_source, open_source, task_for

datasets = pytest.importorskip("datasets")

CLASSES = ["dog", "cat"]  # not in the order of the alphabet


def picture(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (12, 10, 3), dtype=np.uint8))


def part(labels: Sequence[int | None], first: int = 0, **columns: Any) -> Any:
    """Pictures number ``first`` and so on, with these labels."""
    values = {"img": [picture(first + row) for row in range(len(labels))], "label": list(labels), **columns}
    features = {"img": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)}
    features |= {name: datasets.Value("string") for name in columns}
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


def save(path: Path, parts: Mapping[str, Any] | Any) -> Path:
    datasets.disable_progress_bars()
    (parts if isinstance(parts, datasets.Dataset) else datasets.DatasetDict(parts)).save_to_disk(str(path))
    return path


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    parts = {
        "train": part([1, 0, 0, 1], note=["a", "b", "c", "d"]),
        "validation": part([0, 1], first=10, note=["", ""]),
    }
    return save(tmp_path / "pets", parts)


def test_splits_classes_and_images_are_those_that_were_saved(pets: Path) -> None:
    assert task_for(pets) == "classify"
    train, val = open_source(pets, "train"), open_source(str(pets), "val")
    assert train.classes == val.classes == ("dog", "cat")
    assert [(train.labels[index], train.file_name(index)) for index in range(4)] == [
        *((0, "train[1]"), (0, "train[2]")),
        *((1, "train[0]"), (1, "train[3]")),
    ]
    assert [train.image(index).tobytes() for index in range(4)] == [picture(row).tobytes() for row in (1, 2, 0, 3)]
    assert [val.image(index).tobytes() for index in range(2)] == [picture(row).tobytes() for row in (10, 11)]
    with pytest.raises(DataError, match=r"pets: there is no split 'test', only train, val\."):
        open_source(pets, "test")


def test_one_without_splits_is_held_out(tmp_path: Path) -> None:
    path = save(tmp_path / "pets", part([row % 2 for row in range(40)]))
    sources = [open_source(path, split) for split in ("train", "val", "test")]
    assert [len(source) for source in sources] == [32, 4, 4]
    assert len({source.file_name(index) for source in sources for index in range(len(source))}) == 40


def test_a_split_without_labels_is_left_out_with_a_note(tmp_path: Path) -> None:
    path = save(tmp_path / "pets", {"train": part([0, 1] * 5), "test": part([-1, -1])})
    assert [note.text for note in open_source(path, "val").notes] == ["the split 'test' has no labels and is left out."]
    path = save(tmp_path / "some", {"train": part([0, 1, None]), "val": part([0, 1])})
    with pytest.raises(DataError, match=r"some: 'train\[2\]' has no label\."):
        open_source(path, "train")


def test_workers_that_are_spawned_read_it(pets: Path) -> None:
    again = pickle.loads(pickle.dumps(open_source(pets, "train")))
    assert again.image(2).tobytes() == picture(0).tobytes()


def test_columns_are_found_by_their_types(tmp_path: Path) -> None:
    two = part([0, 1] * 3).add_column("coarse", [0] * 6, feature=datasets.ClassLabel(names=["animal"]))
    assert open_source(save(tmp_path / "two", two), "train").classes == ("dog", "cat")  # the one called "label"
    renamed = save(tmp_path / "renamed", two.rename_column("label", "fine"))
    with pytest.raises(DataError, match=r"the columns fine, coarse are of the type ClassLabel\. Call .* 'label'\."):
        open_source(renamed, "train")
    texts = save(tmp_path / "texts", part([0, 1]).cast_column("label", datasets.Value("int64")))
    with pytest.raises(DataError, match=r"no column is of the type ClassLabel; there are img, label\. class_encode"):
        open_source(texts, "train")
    blind = save(tmp_path / "blind", part([0, 1]).remove_columns("img"))
    with pytest.raises(DataError, match="split 'train': no column is of the type Image; there are label"):
        open_source(blind, "train")


@pytest.mark.parametrize(
    ("parts", "fault"),
    [
        (lambda: {"trainn": part([0, 1])}, r"its name must be train, validation or test; did you mean 'train'\?"),
        (lambda: {"val": part([0, 1]), "dev": part([0, 1])}, "split 'dev': another one means 'val', too"),
        (lambda: {"train": part([0, 1]), "val": part([0, 0])}, "split 'val' has no image for class 'cat'"),
    ],
)
def test_a_fault_of_a_split_is_named(tmp_path: Path, parts: Any, fault: str) -> None:
    path = save(tmp_path / "pets", parts())
    with pytest.raises(DataError, match=fault):
        open_source(path, "train")
    assert not check_data(path).usable


def test_it_is_checked_like_any_set(tmp_path: Path) -> None:
    stream = io.BytesIO()
    picture(0).save(stream, "png")
    files = [{"bytes": stream.getvalue()}, {"bytes": b"no image"}, {"bytes": stream.getvalue()}]
    encoded = datasets.Dataset.from_dict({"img": files, "label": [0, 1, 1]})
    encoded = encoded.cast(
        datasets.Features(img=datasets.Image(decode=False), label=datasets.ClassLabel(names=CLASSES))
    )
    path = tmp_path / "pets"
    datasets.DatasetDict(train=encoded, val=part([0, 1], first=5)).save_to_disk(str(path))
    report = check_data(path)
    found = {(finding.kind, finding.file): finding.message for finding in report.findings}
    assert "is text" in found["broken image", "train[1]"]
    assert found["duplicate", "train[2]"].startswith("it shows what 'train[0]' shows")
    assert report.images == {"train": 3, "val": 2}


def test_a_row_without_an_image_is_named(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"img": [picture(0), None, picture(2)], "label": [0, 1, 1]})
    rows = rows.cast(datasets.Features(img=datasets.Image(), label=datasets.ClassLabel(names=CLASSES)))
    path = tmp_path / "pets"
    datasets.DatasetDict(train=rows, val=part([0, 1], first=5)).save_to_disk(str(path))
    (finding,) = [each for each in check_data(path).findings if each.file == "train[1]"]
    assert "'train[1]' has no image. Filter it out" in finding.message
    with pytest.raises(DataError, match=r"'train\[1\]' has no image"):
        open_source(path, "train").image(1)


def test_masks_are_asked_for_in_other_forms(pets: Path) -> None:
    with pytest.raises(DataError, match=r"the task is classify\. Give masks in a folder, \.zip or \.csv"):
        open_segmentation_source(pets, "train")


def test_damaged_files_are_one_error(pets: Path) -> None:
    (arrow,) = (pets / "train").glob("*.arrow")
    content = arrow.read_bytes()
    arrow.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="pets: the saved data set cannot be read") as caught:
        open_source(pets, "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../elsewhere", "..", "/etc"])
def test_files_elsewhere_are_not_read(pets: Path, name: str) -> None:
    (pets / "dataset_dict.json").write_text(json.dumps({"splits": [name]}))
    with pytest.raises(DataError, match=f"pets: .* cannot be read .'{name}' is no name of a file in it"):
        open_source(pets, "train")


def test_what_is_checked_is_what_is_read(pets: Path, tmp_path: Path) -> None:
    """A folder may be marked as one split and as several; files may be links."""
    (arrow,) = (pets / "train").glob("*.arrow")
    for name in ("dataset_info.json", "state.json"):
        shutil.copy(pets / "train" / name, pets / name)
    shutil.copy(arrow, pets / arrow.name)
    source = open_source(pets, "train")
    (pets / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../elsewhere.arrow"}]}))
    assert len(open_source(pets, "train")) == len(source)  # the folder of several splits
    arrow.rename(tmp_path / "elsewhere.arrow")
    arrow.symlink_to(tmp_path / "elsewhere.arrow")
    with pytest.raises(DataError, match=f"'{arrow.name}' is a link to a file elsewhere"):
        open_source(pets, "train")


def test_a_pipe_is_not_waited_for(pets: Path) -> None:
    state = json.loads((pets / "train" / "state.json").read_text())
    (name,) = [file["filename"] for file in state["_data_files"]]
    (pets / "train" / name).unlink()
    os.mkfifo(pets / "train" / name)
    with pytest.raises(DataError, match="it is no regular file"):
        open_source(pets, "train")
    state["_data_files"] = [{"filename": f"../validation/{name}"}]
    (pets / "train" / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match=f"'../validation/{name}' is no name of a file in it"):
        open_source(pets, "train")


def test_without_the_library_the_extra_is_named(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert task_for(pets) == "classify"
    with pytest.raises(DataError, match=r"needs the library datasets: pip install 'pcenet\[datasets\]'"):
        open_source(pets, "train")
