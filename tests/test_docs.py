"""The code of the pages runs, their commands are understood, and so are the examples of the docstrings.

`make docs` runs all of it; what takes a while is left out of the default suite.
"""

from __future__ import annotations

import doctest
import re
import shlex
from importlib import import_module
from inspect import isclass, isfunction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pcenet import cli, parsing
from pcenet.models import complexity, create_network, input_size_of, list_models, twin_of
from pcenet.parsing import parse_values

ROOT = Path(__file__).parents[1]
# The log keeps commands as they were; some have changed since.
DOCS = [path for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "log.md"]

TUTORIAL = ROOT / "docs" / "tutorial.md"
QUICK = {
    "train": ["--epochs", "1", "--workers", "0", "--threads", "1"],
    "compare": ["--epochs", "1", "--seeds", "1", "--workers", "0", "--threads", "1"],
    "eval": ["--workers", "0", "--threads", "1"],
    "predict": ["--workers", "0", "--threads", "1"],
    "explain": ["--workers", "0", "--threads", "1", "--intervention-images", "4"],
}


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(path: Path) -> list[list[str]]:
    """The calls of pcenet in a page's blocks of shell commands, as words."""
    lines = "\n".join(blocks(path, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("pcenet ")]


def modules_with_examples() -> list[str]:
    paths = sorted((ROOT / "pcenet").rglob("*.py"))
    found = [path for path in paths if ">>> " in path.read_text(encoding="utf-8")]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in found]


@pytest.mark.slow
@pytest.mark.parametrize("page", [path.name for path in DOCS if path != TUTORIAL and blocks(path, "python")])
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for code in blocks(ROOT / "docs" / page, "python"):
        if "cuda" in code and not torch.cuda.is_available():
            compile(code, page, "exec")
            pytest.skip("torch sees no GPU")
        exec(compile(code, page, "exec"), names)


@pytest.mark.slow
def test_the_tables_of_networks_are_true():
    """Patches, cost and twin, as rounded there, are those that the networks have."""
    page = (ROOT / "docs" / "networks.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(pce_\w+)`[^|]*\|(.*)\| `(dense_\w+)` \|$", page, re.MULTILINE)
    unlisted = {"pce_tiny_spec", "pce_small_spec"}  # as `pce_tiny` and `pce_small`
    assert {name for name, *_ in rows} == {name for name in list_models() if name.startswith("pce_")} - unlisted
    for name, row, twin in rows:
        *_, patches, multiply_adds, parameters = (cell.strip() for cell in row.strip("| ").split("|"))
        network = create_network(name)
        cost = complexity(network, input_size_of(name))
        sides = ["dense" if side is None else str(side) for side in network.model_args["patch_sizes"]]
        assert patches == ", ".join(sides)
        mega = cost.multiply_adds / 1e6
        assert multiply_adds == (f"{mega:.1f} M" if mega < 100 else f"{mega / 1000:.2f} G")
        assert parameters == f"{cost.parameters / 1e6:.2f} M ({cost.active_parameters / 1e6:.2f} M)"
        assert twin == twin_of(name)


@pytest.mark.slow
def test_the_tutorial_runs_from_the_top_to_the_end(tmp_path, monkeypatch):
    """On other pictures, for one epoch."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("airplane", "frog", "horse"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for index in range(20):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{index:04}.jpg")
    for words in commands(TUTORIAL):
        assert cli.main([*words, *QUICK.get(words[0], [])]) == 0
    names: dict = {}
    for code in blocks(TUTORIAL, "python"):
        exec(compile(code, "tutorial.md", "exec"), names)


@pytest.mark.parametrize("page", [path.name for path in DOCS if commands(path)])
def test_the_commands_of_a_page_are_understood(page, monkeypatch):
    """UnderstoodError to the end, options and values; not run."""
    for words in commands(ROOT / "docs" / page):
        assert words[0] in cli.COMMANDS
        with monkeypatch.context() as patch:
            for module in (cli, parsing):
                patch.setattr(module, "parse_values", stop_after(parse_values))
            if words[0] not in ("models", "doctor"):
                with pytest.raises(UnderstoodError):
                    cli.COMMANDS[words[0]](words[1:])


def test_every_command_has_a_section():
    headings = re.findall("^## (.*)$", (ROOT / "docs" / "commands.md").read_text(encoding="utf-8"), re.MULTILINE)
    named = [command for heading in headings for command in re.findall(r"pcenet ([\w-]+)", heading)]
    assert sorted(named) == sorted(cli.COMMANDS)


def test_the_links_of_the_pages_lead_somewhere():
    """In the repository; that they do so in the site, `make docs` sees to."""
    links = [
        (path, link)
        for path in (ROOT / "docs").rglob("*.md")
        for link in re.findall(r"\]\(([^)#:\s]+)\)", path.read_text(encoding="utf-8"))
    ]
    assert len(links) > 50
    for path, link in links:
        assert (path.parent / link).exists(), (path.name, link)


@pytest.mark.parametrize("package", ["nn", "models", "data", "analysis", "ops", "upcycling"])
def test_a_page_whose_names_are_in_groups_has_them_all(package):
    module = import_module(f"pcenet.{package}")
    public = {name: getattr(module, name) for name in module.__all__}
    page = (ROOT / "docs" / "api" / f"{package}.md").read_text(encoding="utf-8")
    named = re.findall(rf"^\.\. auto(?:class|function|exception):: pcenet\.{package}\.(\w+)$", page, re.MULTILINE)
    assert sorted(named) == sorted(name for name, each in public.items() if isclass(each) or isfunction(each))


class UnderstoodError(Exception):
    """Everything was understood."""


def stop_after(parse_values):
    def parse(command, entries, arguments):
        # The file need not be there: what it would say is not for the parser of the command line.
        without_config = [word for pair in zip(["", *arguments], arguments, strict=False) for word in without(pair)]
        parse_values(command, entries, without_config)
        raise UnderstoodError

    return parse


def without(pair: tuple[str, str]) -> list[str]:
    return [] if "--config" in pair else [pair[1]]


@pytest.mark.parametrize("name", modules_with_examples())
def test_the_examples_of_a_module_run(name):
    module = import_module(name)
    results = doctest.testmod(module)
    assert results.attempted
    assert not results.failed
