"""YAML as people write it, and as attackers do."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import yaml

from pcenet.cli import main
from pcenet.yaml_files import BoundedLoader, parse_yaml, read_yaml


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


def bomb(kind: str) -> str:
    """Nine lists, or mappings, of nine of the one before: 9^9 values in under 1 kB."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for number in range(1, 9):
        of = f"*a{number - 1}"
        many = f"[{', '.join([of] * 9)}]" if kind == "list" else f"{{{', '.join(f'k{i}: {of}' for i in range(9))}}}"
        lines.append(f"a{number}: &a{number} {many}")
    return "\n".join(lines)


REFUSED = {
    "lists of lists": (bomb("list"), "it has more than 100000 values"),
    "mappings of mappings": (bomb("mapping"), "it has more than 100000 values"),
    "merged keys": ("a: &a {p: 1}\nb: &b {<<: [" + ", ".join(["*a"] * 60_000) + "]}", "more than 100000 values"),
    "an alias of itself": ("model_args: &a {x: *a}", "lie within each other more than 100 deep"),
    "deep lists": ("model_args: " + "[" * 100_000, "lie within each other more than 100 deep"),
    "deep mappings": ("".join(" " * n + "a:\n" for n in range(300)), "lie within each other more than 100 deep"),
    "equal keys": ("epochs: 3\nlr: 1\nepochs: 4\n", "'epochs' is given twice, in lines 1 and 3; keep one of them"),
    "equal keys in one line": ("model_args: {a: 1, a: 2}", "'a' is given twice, in lines 1 and 1"),
    "one option in two spellings": ("batch-size: 3\nbatch_size: 4", "'batch_size' is given twice, in lines 1 and 2"),
    "an empty file": ("", "is empty; write options into it, such as epochs: 10"),
    "comments alone": ("# nothing\n\n", "is empty; write options into it"),
    "a list": ("- 1\n", "must hold options by their names"),
    "a text": ("epochs 3\n", "must hold options by their names"),
    "a large file": ("# " + "x" * 2**18, "has more than 262144 bytes"),
    "bytes that are no text": (b"\xff\xfe\xfa", "is no text in UTF-8"),
    "a tag of Python's": ("data: !!python/name:os.system", "could not determine a constructor"),
    "an ESC in a key": ('"\\e[31mx": 3', "unknown option"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("command", ["train", "predict"])
def test_a_config_is_refused_in_one_line(
    kind: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, message = REFUSED[kind]
    path = tmp_path / "c.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main([command, "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pcenet: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert error.removesuffix("\n").isprintable()
    if "unknown option" not in message:
        assert str(path) in error


@pytest.mark.timeout(20)
@pytest.mark.parametrize("spelling", ["--config {}", "--config={}"])
def test_what_is_no_file_is_not_waited_for(spelling: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe", tmp_path / "zero", tmp_path):
        assert main(["train", *spelling.format(path).split()]) == 2
        assert capsys.readouterr().err == f"pcenet: error: {path} is no regular file\n"


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
