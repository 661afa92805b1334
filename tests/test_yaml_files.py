"""YAML as people write it, and as attackers do."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from pcenet.cli import main
from pcenet.yaml_files import BoundedLoader, parse_yaml, read_yaml


@pytest.mark.parametrize("text", ["!!bool foo", "!!int ''", "!!float ''", "!!timestamp foo"])
def test_a_value_that_does_not_fit_its_tag(text: str) -> None:
    with pytest.raises(ValueError, match=r"a value does not fit the tag \(!!...\) before it"):
        parse_yaml(f"lr: {text}")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("-1e-3", -0.001),
        ("1.5e3", 1500.0),
        ("0.5", 0.5),
        (".5", 0.5),
        ("1.", 1.0),
        ("-.inf", -math.inf),
        ("7", 7),
        ("-3", -3),
        ("1_000", 1000),
        ("0", 0),
        ("0x1F", 31),
        ("010", "010"),  # in YAML 1.1: 8
        ("08", "08"),
        ("1:30", "1:30"),  # in YAML 1.1: 90
        ("2020-01-01", "2020-01-01"),
        ("1,5e-3", "1,5e-3"),
        ("true", True),
        ("null", None),
        ("[1, {a: 2}]", [1, {"a": 2}]),
        ("'7'", "7"),
        ("a: &x [1, 2]\nb: *x", {"a": [1, 2], "b": [1, 2]}),
        ("a: &x {p: 1}\nb: {<<: *x, q: 2}", {"a": {"p": 1}, "b": {"p": 1, "q": 2}}),
        ("v: {1: a, '1': b}", {"v": {1: "a", "1": "b"}}),
        ("v: {a-b: 1, a_b: 2}", {"v": {"a-b": 1, "a_b": 2}}),  # labels, no options
    ],
)
def test_values(text: str, value: object) -> None:
    found = parse_yaml(text)
    assert found == value
    assert type(found) is type(value)


def test_what_a_run_has_saved_is_read_as_it_was() -> None:
    """PyYAML writes these texts without quotes."""
    saved = {"data": "08", "name": "1e3", "time": "1:30.5x", "lr": 1e-5, "classes": ["no", "010", "x"]}
    assert yaml.safe_load(yaml.safe_dump(saved)) == saved
    assert yaml.load(yaml.safe_dump(saved), BoundedLoader) == saved


@pytest.mark.parametrize(
    ("content", "batch_size"),
    [
        (b"batch_size: 010\n", 10),
        (b"batch-size: 12\r\nlr: 1e-3\r\n", 12),
        (b"\xef\xbb\xbfbatch_size: 7\n", 7),
    ],
)
def test_what_people_write_is_understood(
    content: bytes, batch_size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_bytes(content)
    assert main(["train", "--config", str(tmp_path / "c.yaml"), "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["batch_size"] == batch_size


def test_numbers_on_the_command_line_are_as_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--batch-size", "010", "--model-args", '{"num_experts": 010}', "--print-config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["batch_size"] == 10
    assert printed["model_args"] == {"num_experts": 10}


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_yaml(tmp_path / "nowhere")
