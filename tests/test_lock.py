"""The lock file names what the package asks for, in versions that it accepts, and no place to get it from."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def test_the_lock_file_is_that_of_the_dependencies() -> None:
    lines = (ROOT / "requirements-lock.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[a-z0-9._-]+==[0-9][\w.]* --hash=sha256:[0-9a-f]{64}", line) for line in lines)
    locked = dict(line.split(" ")[0].split("==") for line in lines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*map(Requirement, project["dependencies"]), *of_extra(project, "dev")]
    assert {"torch", "gradio", "pytest"} <= {requirement.name for requirement in wanted}
    for requirement in wanted:
        assert requirement.specifier.contains(locked[requirement.name.lower()]), requirement


def of_extra(project: dict[str, Any], name: str) -> list[Requirement]:
    """What an extra asks for, by way of other extras too."""
    found = []
    for requirement in map(Requirement, project["optional-dependencies"][name]):
        if requirement.name == project["name"]:
            found += [inner for extra in requirement.extras for inner in of_extra(project, extra)]
        else:
            found.append(requirement)
    return found
