"""Settings from strangers: refused in one line, quickly."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pcenet.cli import main


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
    "equal numbers as keys": ("variants:\n  1: {}\n  0x1: {}", "'0x1' is given twice, in lines 2 and 3"),
    "one option in two spellings": ("batch-size: 3\nbatch_size: 4", "'batch_size' is given twice, in lines 1 and 2"),
    "an empty file": ("", "is empty; write options into it, such as epochs: 10"),
    "comments alone": ("# nothing\n\n", "is empty; write options into it"),
    "a list": ("- 1\n", "must hold options by their names"),
    "a text": ("epochs 3\n", "must hold options by their names"),
    "a large file": ("# " + "x" * 2**18, "bytes, more than 262144"),
    "bytes that are no text": (b"\xff\xfe\xfa", "is no text in UTF-8"),
    "a tag of Python's": ("data: !!python/name:os.system", "could not determine a constructor"),
    "a word of trust": ("trust_code: true", "cannot say whom you trust; give --trust-code on the command line"),
    "an ESC in a key": ('"\\e[31mx": 3', "unknown option"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.faults(f"settings: {kind}")) for kind in REFUSED]
)
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


@pytest.mark.faults("settings: a pipe")
@pytest.mark.timeout(20)
@pytest.mark.parametrize("spelling", ["--config {}", "--config={}"])
def test_what_is_no_file_is_not_waited_for(spelling: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe", tmp_path / "zero", tmp_path):
        assert main(["train", *spelling.format(path).split()]) == 2
        assert capsys.readouterr().err.startswith(f"pcenet: error: {path}: it is no regular file. ")
