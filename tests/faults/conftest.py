"""What the fault tests share, and the table of faults that they end with."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faults.runs import Start, at_step, options_of

from pcenet.runs.folder import RunFolder
from pcenet.training.run import train

OUTCOMES = pytest.StashKey[dict[str, list[str]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[OUTCOMES] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test here has the marker, whose argument is a fault of the documentation's table."""
    lines = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text(encoding="utf-8").splitlines()
    known = {name for line in lines if line.startswith("| ") for name in line.split(" | ")[0][2:].split("; ")}
    for item in items:
        if Path(__file__).parent in item.path.parents:
            marker = item.get_closest_marker("faults")
            assert marker, f"{item.nodeid} has no marker faults(...)"
            assert marker.args[0] in known, f"docs/reliability.md does not name the fault {marker.args[0]!r}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    marker = item.get_closest_marker("faults")
    if marker and (report.when == "call" or report.outcome != "passed"):
        item.config.stash[OUTCOMES].setdefault(marker.args[0], []).append(report.outcome)
    return report


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Each fault, with the number of its tests by outcome; shown where faults were asked for."""
    if "faults" not in config.getoption("markexpr") or "not faults" in config.getoption("markexpr"):
        return
    terminalreporter.section("faults")
    for fault, outcomes in sorted(config.stash[OUTCOMES].items()):
        counts = ", ".join(f"{outcomes.count(kind)} {kind}" for kind in dict.fromkeys(outcomes))
        terminalreporter.line(f"{fault:60} {counts}")


@pytest.fixture(autouse=True, scope="session")
def _no_drawing() -> Iterator[None]:
    """The pictures of a run are no part of what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pcenet.training.run.draw", lambda *_: None)
        yield


@pytest.fixture
def start(pictures: Path, tmp_path: Path) -> Start:
    return lambda name="run", **changes: options_of(pictures, **{"out": str(tmp_path / name)} | changes)


@pytest.fixture(scope="session")
def whole(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The undisturbed run."""
    return train(options_of(pictures, str(tmp_path_factory.mktemp("whole") / "run")))


@pytest.fixture(scope="session")
def broken_off(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that died in its second epoch, with checkpoints of steps 4 (the end of an epoch), 5 and 6."""
    config = options_of(pictures, str(tmp_path_factory.mktemp("broken") / "run"))

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        at_step(6, patch, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    folder = RunFolder(config.folder)
    assert [path.name for path in folder.steps] == ["step-00000004", "step-00000005", "step-00000006"]
    return folder


@pytest.fixture
def copied(broken_off: RunFolder, start: Start) -> RunFolder:
    shutil.copytree(broken_off.path, start().folder)
    return RunFolder(start().folder)
