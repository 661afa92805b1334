"""The lock file names what the package asks for, in versions that it accepts, and no place to get it from."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def test_the_lock_file_is_that_of_the_dependencies() -> None:
    lines = (ROOT / "requirements-lock.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[a-z0-9._-]+==[0-9][\w.]* --hash=sha256:[0-9a-f]{64}", line) for line in lines)
    locked = dict(line.split(" ")[0].split("==") for line in lines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    names = ("train", "digits", "plot", "explain", "segment", "app", "trackio", "examples", "dev")
    asked = project["dependencies"] + [text for name in names for text in extras[name]]
    wanted = [Requirement(text) for text in asked]
    assert len(wanted) > 15
    for requirement in wanted:
        if requirement.name != project["name"]:
            assert requirement.specifier.contains(locked[requirement.name.lower()]), requirement
